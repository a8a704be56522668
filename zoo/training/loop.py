"""Training: batches in, checkpoints and a result out. A run that is stopped at any moment resumes to the same bits."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import Diverged, RunError, UsageError
from zoo.models.create import create_model
from zoo.models.ends import Ends
from zoo.objectives.base import Carry, Encoded, Update, figures
from zoo.protocol import Mixer, not_cuttable
from zoo.tasks.protocol import Batch, Streamed
from zoo.training import checkpoint, machine, solving
from zoo.training.best import BestWeights
from zoo.training.callbacks import CallbackError, Callbacks
from zoo.training.clock import Clock
from zoo.training.compiling import compile_layers
from zoo.training.data import DataEnded, Flow, Stream, any_rows
from zoo.training.evaluation import Stopped, decode_rate, row_figures, scalars, scored
from zoo.training.extending import STEPS, Extension, schedule
from zoo.training.failures import LostProcess
from zoo.training.fit import Parts
from zoo.training.group import Group, joined_pieces, joined_rows
from zoo.training.joining import launched
from zoo.training.leading import Leading
from zoo.training.options import Experiment
from zoo.training.outcome import outcome
from zoo.training.progress import Reporter
from zoo.training.result import Result, has_more_time
from zoo.training.run import RunFolder
from zoo.training.scoring import Scoring
from zoo.training.session import Best, Session
from zoo.training.starting import Start
from zoo.training.stopping import Interrupted, Stop
from zoo.training.watch import Pruned, Watch


class Trainer:
    """One training in this process: the order in which things happen."""

    def __init__(
        self,
        experiment: Experiment,
        parts: Parts,
        run: RunFolder,
        reporter: Reporter,
        stop: Stop,
        callbacks: Callbacks | None = None,
        watch: Watch | None = None,
        changed: Mapping[str, list[Any]] = {},
        start: Start | None = None,
        group: Group = Group(),
    ):
        self.group = group
        self.leading = Leading(group, stop)
        self.experiment, self.config, self.parts = experiment, experiment.train, parts
        self.folder, self.reporter, self.stop = run, reporter, stop
        self.callbacks, self.watch = callbacks or Callbacks([]), watch or Watch()
        self.task, self.objective, self.model_config = parts
        self.device = machine.choose_device(self.config.device)
        self.precision = machine.choose_precision(self.config.computes_in, self.device)
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.baseline_memory = machine.peak_memory(self.device)
        self.session = Session(self.model_config, self.config, self.device, start, group, self.objective.trains)
        self.starts = any(group.largest(start is not None))
        carries = functools.partial(self.objective.carries, n=self.config.batch_size)
        group.told(lambda: self.session.resume(run.checkpoints, reporter.say, carries))
        self.session.share(group)
        self.model, self.at = self.session.model, self.session.at
        self.mixers = [module for module in self.model.modules() if isinstance(module, Mixer)]
        if self.config.sequence_processes > 1:
            self._check_cuts()
        self.best = BestWeights(run.checkpoints, self.at, group, reporter.say)
        self._go_on(changed)
        how: dict[str, Any] = {"precision": self.precision, "stop": stop, "group": group}
        self.scoring = Scoring(self.task, self.objective, self.config, **how)

    def _check_cuts(self) -> None:
        """Refuse layers that read whole sequences.

        Raises:
            UsageError: there is one.
        """
        told = f"train.sequence_processes={self.config.sequence_processes} is not allowed"
        if self.model_config.recursion is not None:
            raise UsageError(f"{told}: a recursive model reads whole rows.")
        for mixer in self.mixers:
            if (why := not_cuttable(mixer)) is not None:
                raise UsageError(f"{told}: {mixer.name} cannot be cut, as {why}.")

    def _go_on(self, changed: Mapping[str, list[Any]]) -> None:
        """Take an ended run up again where it was given more time or more steps, or another target."""
        at, config = self.at, self.config
        if has_more_time(config, at.model_dump(include={"status", "seconds"})):
            at.status = None
        if changed and self.session.saved is not None:
            at.extended = [*at.extended, Extension(step=at.step, changes=dict(changed))]
            if at.status == "target":
                at.status, at.seconds_to_target = None, None
            if STEPS in changed:
                self.reporter.say(schedule(config, at.step, changed[STEPS][0]))
        if at.status == "finished" and at.step < config.steps:
            at.status = None
        elif at.status is None and at.step >= config.steps:
            at.status, at.to_evaluate = "finished", at.to_evaluate or at.step % config.eval_every > 0

    def run(self) -> Result:
        """Train to an end, then read test once with the weights that validation chose."""
        self.stream: Stream | Flow | None = None
        self.written: dict[str, Any] = {"name": self.experiment.name, "status": "failed", "steps": self.at.step}
        try:
            result = self._run()
        except (Exception, Interrupted):
            self.callbacks.end(self.written, say=self.reporter.say)
            raise
        self.callbacks.end(result.data)
        return result

    def _run(self) -> Result:
        self.leading.do(self.folder.start_records, self.at.metrics_size, self.reporter.say)
        self.clock = Clock(self.at.seconds, self.at.tokens)
        self.rate: float | None = None
        self.grad_norm: Tensor | None = None
        self.loss_sum = torch.full((), self.at.loss_sum, device=self.device)
        self.saved_moment = self.at.moment
        self.saved_at = time.perf_counter()
        self.model.train()
        try:
            with self.group.contact():
                if self.callbacks:
                    self.leading.do(self._start_callbacks)
                if self.config.compile:
                    self._compile()
                self.stepping = self.group.stepping(self.model, self.config.accumulate)
                if self.at.best is not None:
                    self.best.check()
                self._train()
                peak_memory = machine.peak_memory(self.device)
                test, decode = self._test() if self.watch.reads_test else ({}, None)
                self.leading.meet()
                data = self.group.told(lambda: self._write_result(self.at.status, test, decode, peak_memory))
        except Pruned:
            data = self.group.told(lambda: self._write_result("pruned"))
        except Stopped:
            self.group.told(lambda: self._write_result("interrupted"))
            again = f" --processes {self.group.size}" if launched() else ""
            told = f"Interrupted at step {self.at.step}. Go on with: zoo train {self.folder.path} --resume{again}"
            raise Interrupted(told, int(self.stop.number or signal.SIGINT)) from None
        except RunError as error:
            with contextlib.suppress(RunError):  # the disk may be full
                if self.group.leads:
                    self._write_result("failed")
            saved = self.session.saved
            last = f" The last good checkpoint is {saved}." if saved else " There is no checkpoint yet."
            told = f"{error}{last if self.group.leads and (saved is None or saved.exists()) else ''}"
            if isinstance(error, LostProcess):
                raise LostProcess(told, named=error.named, speaks=error.speaks) from None
            kind = Diverged if isinstance(error, Diverged) else RunError
            raise kind(told) from (error.__cause__ if isinstance(error, CallbackError) else None)
        return Result(self.folder.path, data["status"], data)

    def _train(self) -> None:
        self.stream = stream = self._stream()
        try:
            self._loop(stream)
        except Stopped:
            self._save()
            self._end_save()
            self.leading.meet()
            raise
        except LostProcess:
            raise
        except (RunError, Pruned) as error:  # of all processes alike
            if isinstance(error, CallbackError | DataEnded) and self.at.moment != self.saved_moment:
                self._write_checkpoint()
            self.session.end_save()
            raise
        finally:
            stream.close()

    def _stream(self) -> Stream | Flow:
        common: dict[str, Any] = {"seed": self.config.seed, "batch_size": self.config.batch_size, "start": self.at.step}
        if isinstance(self.task, Streamed):
            if self.config.rows is not None:
                told = f"the rows of {self.task.name} come in order"
                raise UsageError(f"train.rows={self.config.rows} is not allowed: {told}.")
            say, state = self.reporter.say, self.session.data
            return Flow(self.task, self.objective, **common, state=state, device=self.device, say=say)
        rows, stop = self.config.rows, self.config.steps
        return Stream(self.task, self.objective, **common, stop=stop, device=self.device, rows=rows)

    def _start_callbacks(self) -> None:
        at, config = self.at, self.experiment.resolved(self.parts)
        run = {"name": self.experiment.name, "folder": str(self.folder.path), "config": config, "step": at.step}
        self.callbacks.start({**run, "resumed": self.session.saved is not None})

    def _loop(self, stream: Stream | Flow) -> None:
        config, at = self.config, self.at
        if self.starts and self.session.saved is None:
            self._save()  # so that the run can be resumed without what it started from
        while True:
            if at.to_evaluate:
                self._evaluate()
            writes = not self.session.is_written()
            stops, saves, writes = self.leading.meet(self.stop(), self._checkpoint_due(), writes)
            if self.session.writing is not None and not writes:
                self._end_save()
            if at.status is not None:
                break
            if stops:
                raise Stopped
            if saves:
                self._save()

            data = next(stream)
            self.group.seed_step(config.seed, at.step, self.device)
            parts = self._step(data)
            at.tokens += data.n_steps
            at.step += 1

            if at.step == config.steps:
                at.status = "finished"
            elif config.time_budget is not None and self.leading.meet(self.clock.seconds() >= config.time_budget)[0]:
                at.status = "time_budget"
            ended = at.status is not None
            at.to_evaluate = ended or at.step % config.eval_every == 0
            if ended or at.step % config.log_every == 0:
                self._log(parts)
        if at.moment != self.saved_moment:
            self._save()
        self._end_save()

    def _step(self, data: Encoded) -> list[Update]:
        """Learn one batch; returns all parts of its last update."""
        updates = self._updates(data, self.session.carry, self.session.generator)
        parts: list[Update] = []
        if self.config.cuda_graphs:  # whose outputs of the step before are overwritten from here on
            self.session.carry.update({name: x.clone() for name, x in self.session.carry.items()})
            torch.compiler.cudagraph_mark_step_begin()
        while True:
            with machine.autocast(self.precision, self.device):  # over the forward pass only
                update = self.stepping.next(updates)
            if update is None:
                break
            if not parts or parts[-1].last:
                parts = []
            with self.group.contact():
                update.loss.backward()
            self.loss_sum += self.group.total(update.loss.detach())
            parts.append(update if self.config.accumulate == 1 else update.light())
            if update.last:
                self.stepping.finish()
                self.grad_norm = self.session.optimizer.step(self.at.step)
                for mixer in self.mixers:
                    for name in mixer.step_sums:
                        setattr(mixer, name, self.group.total(getattr(mixer, name)))
                    mixer.after_step()
                self.at.loss_count += 1
        if self.session.average is not None:
            self.session.average.update(self.at.step)
        return parts

    def _updates(self, data: Encoded, carry: Carry, generator: torch.Generator) -> Iterator[Update]:
        more: Any = {"parts": self.config.accumulate} if self.config.accumulate > 1 else {}
        if (rows := self.group.rows(self.config.batch_size)) is not None:
            more["rows"] = rows
        if self.group.pieces is not None:
            more["pieces"] = self.group.pieces
        return self.objective.updates(self.model, data, carry, generator, **more)

    # ---- records

    def _log(self, parts: list[Update]) -> None:
        at = self.at
        loss = self.loss_sum.item() / at.loss_count
        self._check_finite(loss)
        self.rate = self.clock.rate(at.tokens)
        if self.group.size > 1:
            everywhere = self.group.gathered([part.light() for part in parts])
            parts = joined_pieces(everywhere, self.config.sequence_processes)
        line = self._line("train", loss=loss, **figures(parts))
        if self.grad_norm is not None:
            line["grad_norm"] = self.grad_norm.item()
        self.loss_sum.zero_()
        at.loss_count = 0
        self.leading.do(self.folder.record, line)
        self.reporter.train(line)
        self._call(self.callbacks.log, line)

    def _call(self, method: Callable[[dict[str, Any]], None], record: dict[str, Any]) -> None:
        """Pass a record to the callbacks, in time that is not spent on training."""
        if self.callbacks:
            with self.clock.aside():
                self.leading.do(method, record)

    def _line(self, split: str, **figures: Any) -> dict[str, Any]:
        at = self.at
        line = {"step": at.step, "split": split, "seconds": self.clock.seconds(), "tokens": at.tokens, **figures}
        return line | {"lr": self.session.optimizer.lr(at.step - 1), "tokens_per_second": self.rate}

    def _evaluate(self) -> None:
        """The evaluation due at this step, and a checkpoint where its weights are the best so far."""
        at = self.at
        if self.scoring.validation is None:
            at.to_evaluate = False
            if at.status is not None:  # with nothing to choose by, the last weights are the best
                at.best = Best(step=at.step, rank=[float(at.step)], score={})
                self._save()
            return
        with self.clock.aside():
            score = self._score(self.session.evaluated, self.scoring.validation)
            self._check_finite(score["loss"])
            rank = self.scoring.rank(score)
            improved = at.best is None or rank > at.best.rank
            if improved:
                at.best = Best(step=at.step, rank=rank, score=score)
            line = self._line("validation", **scalars(score))
            if self.scoring.reaches_target(score):
                at.status, at.seconds_to_target = "target", line["seconds"]
            at.to_evaluate = False
            self.leading.do(self.folder.record, line)
            self.reporter.evaluation(line, self.rate)
        self._call(self.callbacks.evaluation, line)
        if improved:
            self._save()
        if self.watch.evaluated(line) and at.status is None:
            self.leading.meet()
            raise Pruned

    def _score(self, model: Ends, rows: Batch) -> dict[str, Any]:
        return self.scoring.score(model, rows)

    def _test(self) -> tuple[dict[str, Any], float | None]:
        """The test score of the best weights, and their speed of decoding."""
        model = self._best_model()
        test = {} if "test" in self.task.absent else self._score_test(model)
        with self.group.together(model):
            if not self.group.leads:
                return test, None
            if self.scoring.validation is not None:
                self.leading.do(
                    lambda: solving.record(self.folder.path, self.objective, model, precision=self.precision)
                )
            with machine.autocast(self.precision, self.device):
                return test, decode_rate(model, self.objective.length)

    def _best_model(self) -> Ends:
        """A model with the best weights; if their checkpoint is damaged, with those that are the best now."""
        if self.session.in_pieces:
            if not self.best.check():
                self._evaluate()
                self._end_save()
            return self.session.load(self.best.path)
        model = create_model(self.model_config).to(self.device)
        weights: dict[str, Tensor] = {}

        def read(path: Path) -> None:
            weights.update(checkpoint.read_weights(path))

        if not self.best.check(read):
            self._evaluate()
            self.leading.do(lambda: read(self.best.path))
        self.leading.do(lambda: checkpoint.load_weights(model, weights, self.best.path))
        self.leading.meet()
        self.group.share(model)
        return model

    def _score_test(self, model: Ends) -> dict[str, Any]:
        rows = self.scoring.test_rows()
        answers = self.scoring.answers(model, rows)
        test = scored(self.objective, rows, answers)
        if self.watch.keeps_rows:
            self.watch.rows = row_figures(self.task, rows, answers.predictions)
        line = self._line("test", **scalars(test))
        self.leading.do(self.folder.record, line)
        self._call(self.callbacks.evaluation, line)
        return test

    def _write_result(
        self,
        status: str | None,
        test: Mapping[str, Any] = {},
        decode: float | None = None,
        peak_memory: int | None = None,
    ) -> dict[str, Any]:
        peak = peak_memory or machine.peak_memory(self.device)
        data = outcome(
            self.experiment,
            self.parts,
            self.model,
            self.at,
            status=status,
            seconds=self.clock.seconds(),
            test=test,
            validation=self.scoring.validation,
            rates={"tokens_per_second": self.folder.training_rate(), "decode_tokens_per_second": decode},
            memory={"peak_memory_bytes": peak, "baseline_memory_bytes": self.baseline_memory},
            processes=self.group.size,
            backends=self.scoring.forms,
            precision=self.precision,
        )
        self.folder.write_result(data)
        self.written = data
        return data

    # ---- checkpoints

    def _checkpoint_due(self) -> bool:
        every, seconds = self.config.checkpoint_every, self.config.checkpoint_seconds
        if self.at.moment == self.saved_moment:
            return False
        if every is not None and self.at.step % every == 0:
            return True
        return seconds is not None and time.perf_counter() - self.saved_at >= seconds

    def _save(self) -> None:
        self._end_save()
        self._write_checkpoint()
        self.leading.meet()
        if self.session.writing is None:
            self._call_saved()

    def _end_save(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one."""
        if self.session.writing is not None:
            self.session.end_save()
            self._call_saved()

    def _call_saved(self) -> None:
        if not self.callbacks:
            return
        best, path = self.at.best, self.session.saved
        assert path is not None
        step = checkpoint.step_of(path)
        saved = {"step": step, "path": str(path), "is_best": best is not None and best.step == step}
        self._call(self.callbacks.checkpoint, saved)

    def _write_checkpoint(self) -> None:
        with self.clock.aside():
            self.at.loss_sum = self.loss_sum.item()
            self._check_finite(self.at.loss_sum)
            if not self.session.optimizer.is_finite():
                raise Diverged(f"A weight is not finite at step {self.at.step}: {self._advice()}.")
            carry = joined_rows(self.group, self.session.carry)
            ready = self.leading.do(self._prepare_files)  # what failed before, such as a callback, does not count here
            if self.session.in_pieces:
                [unready] = self.group.largest(int(not ready))
                if not unready:
                    self._write_files(carry)
            elif ready:
                self.leading.do(self._write_files, carry)
            self.saved_at, self.saved_moment = time.perf_counter(), self.at.moment

    def _prepare_files(self) -> None:
        self.at.seconds, self.at.metrics_size = self.clock.seconds(), self.folder.records_size()
        self.folder.check()

    def _write_files(self, carry: Carry) -> None:
        place = self.stream.state() if isinstance(self.stream, Flow) else None
        self.session.save(self.folder.checkpoints, self.experiment.resolved(self.parts), place, carry)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"The loss became {loss} by step {self.at.step}: {self._advice()}.")

    def _advice(self) -> str:
        return f"try a lower train.lr (now {self.config.lr:g}), a longer train.warmup_steps, or train.clip"

    # ---- compilation

    def _compile(self) -> None:
        data = self.objective.encode(any_rows(self.task, self.config.batch_size, self.config.seed)).to(self.device)

        def loss() -> Tensor:
            carry = {k: v.clone() for k, v in self.session.carry.items()}
            with machine.autocast(self.precision, self.device):
                return next(self._updates(data, carry, torch.Generator())).loss

        self.at.compile_seconds += compile_layers(self.model, loss, cuda_graphs=self.config.cuda_graphs)
        self.clock.rate(self.at.tokens)


__all__ = ["Trainer"]
