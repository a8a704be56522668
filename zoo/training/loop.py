"""Training: batches in, checkpoints and a result out; stopped at any moment it goes on to the same bits."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.protocol import Batch
from tasks.registry import UsageError, unknown
from zoo.models.token import TokenModel, create_model
from zoo.objectives.base import Carry, Update
from zoo.training import checkpoint, machine
from zoo.training.data import Stream
from zoo.training.evaluation import Stopped, decode_rate, evaluate, held_out, scalars
from zoo.training.experiment import Experiment, Parts, read_experiment
from zoo.training.files import RunError
from zoo.training.optimizer import Average, Optimizer
from zoo.training.progress import Reporter
from zoo.training.run import RunFolder, load

ENDED = ("finished", "target", "time_budget")


class Result(NamedTuple):
    """What a training leaves: its folder, how it ended, and all figures of `result.json`."""

    path: Path
    status: str
    data: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """`{"validation": {...}, "test": {...}}` of the best weights."""
        return {split: self.data[split] for split in ("validation", "test")}

    def load(self) -> TokenModel:
        """The model with its best weights."""
        return load(self.path)


class Interrupted(KeyboardInterrupt):
    """A training stopped by a signal, after its checkpoint was written; its text says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


@dataclass
class Position:
    """Where a training stands: all plain values, kept in every checkpoint.

    Attributes:
        step: batches trained.
        tokens: tokens trained.
        seconds: of training, interruptions left out.
        compile_seconds: of those, spent on compilation.
        loss_sum: of the batches since the last training line.
        loss_count: number of those.
        to_evaluate: whether the evaluation due at this step is still to be made.
        status: how the training ended, once it has.
        best: step and validation figures of the best weights.
        seconds_to_target: when the target was reached.
        metrics_size: bytes of metrics.jsonl.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    to_evaluate: bool = False
    status: str | None = None
    best: dict[str, Any] | None = None
    seconds_to_target: float | None = None
    metrics_size: int = 0


def train(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    resume: bool = False,
    fresh: bool = False,
    quiet: bool = False,
) -> Result:
    """Train one experiment into its run folder.

    A folder that already holds the run is gone on from, to the same bits as if it had never stopped; a finished run is
    returned as it is.

    Args:
        experiment: a recipe's name, a YAML file, a run folder, a mapping or an `Experiment`.
        overrides: dotted keys and values, such as `{"train.steps": 500}`.
        variant: which of a recipe's variants.
        resume: insist that there is a run to go on from.
        fresh: delete the run that the folder holds and start over.
        quiet: print nothing.

    Raises:
        UsageError: any wrong input, a folder in use, a run of another config, no checkpoint that can be read.
        RunError: a full disk, or a loss that is not finite; the last good checkpoint stays.
        Interrupted: SIGINT or SIGTERM, after a checkpoint.
    """
    chosen = read_experiment(experiment, overrides, variant)
    parts = chosen.build()
    if resume and not checkpoint.steps(chosen.folder / "checkpoints"):
        raise UsageError(
            f"There is nothing to resume: {chosen.folder} holds no checkpoint. Leave out --resume to start."
        )
    with RunFolder(chosen.folder) as run:
        run.open(chosen.resolved(parts), fresh=fresh)
        old = run.result()
        reporter = Reporter(chosen.name, chosen.train.steps, chosen.train.selection, quiet=quiet)
        budget = chosen.train.time_budget
        more_time = old is not None and old["status"] == "time_budget" and (budget is None or budget > old["seconds"])
        if old is not None and old["status"] in ENDED and not more_time:
            reporter.say(f"{run.path} holds this run, {old['status']} at step {old['steps']}: nothing to do.")
            return Result(run.path, old["status"], old)
        with _signals() as stop, reporter:
            return Trainer(chosen, parts, run, reporter, stop).run()


class Trainer:
    """One training in this process."""

    def __init__(self, experiment: Experiment, parts: Parts, run: RunFolder, reporter: Reporter, stop: _Stop):
        self.experiment, self.config, self.folder, self.reporter, self.stop = (
            experiment,
            experiment.train,
            run,
            reporter,
            stop,
        )
        self.task, self.objective, self.model_config = parts
        self.device = machine.choose_device(self.config.device)
        self.precision = machine.choose_precision(self.config.precision, self.device)
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.baseline_memory = machine.peak_memory(self.device)
        self.eval_batch_size = self.config.eval_batch_size or self.config.batch_size

        torch.manual_seed(self.config.seed)
        self.model = create_model(self.model_config).to(self.device)
        self.average = None if self.config.ema is None else Average(self.model, self.config.ema)
        self.optimizer = Optimizer(self.model, self.config)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.carry: Carry = {}
        self.at = Position()
        self.rate: float | None = None
        self.grad_norm: Tensor | None = None
        self.peak_memory = 0
        self.last_good: Path | None = None
        self._resume()

    # ---- the course of a run

    def run(self) -> Result:
        self.validation = held_out(self.task, "validation", self.config.eval_rows)
        known = ["loss", *scalars(self.task.score(self.validation, self.validation.targets))]
        if self.config.selection not in known:
            raise unknown("metric", self.config.selection, known)
        self.folder.start_records(self.at.metrics_size)
        self._start_clock()
        if self.config.compile:
            self._compile()
        self.model.train()
        try:
            self._train()
            return self._finish()
        except Stopped:
            raise self._interrupted() from None
        except RunError as error:
            raise self._failed(error) from None

    def _train(self) -> None:
        stream = Stream(
            self.task,
            self.objective,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            start=self.at.step,
            stop=self.config.steps,
            device=self.device,
        )
        try:
            self._loop(stream)
        except Stopped:
            self._save()
            raise
        finally:
            stream.close()
        self.peak_memory = machine.peak_memory(self.device)

    def _loop(self, stream: Stream) -> None:
        config, at = self.config, self.at
        loss_sum = torch.zeros((), device=self.device)
        self._loss_sum = loss_sum
        loss_sum += at.loss_sum
        while True:
            if at.to_evaluate:
                self._evaluate()
                at.to_evaluate = False
                if self._is_best_now():
                    self._save()
            if at.status is not None:
                break
            if self.stop.signal is not None:
                raise Stopped
            if self._checkpoint_due():
                self._save()

            data = next(stream)
            update: Update | None = None
            for update in self._updates(data):
                update.loss.backward()
                self.grad_norm = self.optimizer.step(at.step)
                loss_sum += update.loss.detach()
                at.loss_count += 1
            if self.average is not None:
                self.average.update(at.step)
            at.tokens += data.tokens.numel()
            at.step += 1

            if at.step == config.steps:
                at.status = "finished"
            elif config.time_budget is not None and self._seconds() >= config.time_budget:
                at.status = "time_budget"
            ended = at.status is not None
            at.to_evaluate = ended or at.step % config.eval_every == 0
            if update is not None and (ended or at.step % config.log_every == 0):
                self._log(update)
        if self._moment() != self._saved:
            self._save()

    def _updates(self, data: Any) -> Iterator[Update]:
        updates = self.objective.updates(self.model, data, self.carry, self.generator)
        while True:
            with machine.autocast(self.precision, self.device):  # over the forward pass only
                update = next(updates, None)
            if update is None:
                return
            yield update

    # ---- records

    def _log(self, update: Update) -> None:
        at = self.at
        loss = self._loss_sum.item() / at.loss_count
        self._check_finite(loss)
        now = time.perf_counter()
        seconds = max(now - self._logged_at - self._paused, 1e-9)
        line = {
            "step": at.step,
            "split": "train",
            "seconds": self._seconds(),
            "tokens": at.tokens,
            "loss": loss,
            **update.figures(),
            "lr": self.optimizer.lr(at.step - 1),
            "tokens_per_second": (at.tokens - self._logged_tokens) / seconds,
        }
        if self.grad_norm is not None:
            line["grad_norm"] = self.grad_norm.item()
        self._logged_at, self._logged_tokens, self._paused = now, at.tokens, 0.0
        self._loss_sum.zero_()
        at.loss_count = 0
        self.rate = line["tokens_per_second"]
        self.folder.record(line)
        self.reporter.train(line)

    def _evaluate(self) -> None:
        at, config = self.at, self.config
        started = time.perf_counter()
        model = self.model if self.average is None else self.average.module
        score = self._score(model, self.validation)
        self._check_finite(score["loss"])
        value = score[config.selection]
        rank = [-value if config.selection == "loss" else value, -score["loss"]]
        if at.best is None or rank > at.best["rank"]:
            at.best = {"step": at.step, "rank": rank, "score": score}
        seconds = self._seconds()
        if config.target is not None:
            reached = score[config.target.metric]
            lower = config.target.metric == "loss"
            if (reached <= config.target.value) if lower else (reached >= config.target.value):
                at.status, at.seconds_to_target = "target", seconds
        line = {"step": at.step, "split": "validation", "seconds": seconds, "tokens": at.tokens, **scalars(score)}
        line |= {"lr": self.optimizer.lr(at.step - 1), "tokens_per_second": self.rate}
        self.folder.record(line)
        self.reporter.evaluation(line, self.rate)
        self._paused += time.perf_counter() - started

    def _score(self, model: TokenModel, rows: Batch) -> dict[str, Any]:
        with _eagerly(self.config.compile):
            return evaluate(
                model,
                self.objective,
                rows,
                batch_size=self.eval_batch_size,
                precision=self.precision,
                stop=lambda: self.stop.signal is not None,
            )

    def _is_best_now(self) -> bool:
        return self.at.best is not None and self.at.best["step"] == self.at.step

    # ---- checkpoints

    def _checkpoint_due(self) -> bool:
        every, seconds = self.config.checkpoint_every, self.config.checkpoint_seconds
        if self._moment() == self._saved:
            return False
        if every is not None and self.at.step % every == 0 and self.at.step > 0:
            return True
        return seconds is not None and time.perf_counter() - self._saved_at >= seconds

    def _save(self) -> None:
        """A checkpoint of this moment, between two steps."""
        started = time.perf_counter()
        at = self.at
        at.loss_sum = self._loss_sum.item()
        self._check_finite(at.loss_sum)
        if not torch.stack(torch._foreach_norm(self.optimizer.parameters)).isfinite().all():
            raise RunError(self._not_finite("A weight"))
        at.seconds, at.metrics_size = self._seconds(), self.folder.records_size()
        training = {
            "position": asdict(at),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "generator": self.generator.get_state(),
            "carry": self.carry,
        }
        self.last_good = checkpoint.save(
            self.folder.checkpoints,
            at.step,
            weights=self.model.state_dict(),
            average=None if self.average is None else self.average.module.state_dict(),
            training=training,
            best=at.best["step"] if at.best else None,
        )
        checkpoint.prune(self.folder.checkpoints, self.config.keep)
        self._saved_at, self._saved = time.perf_counter(), self._moment()
        self._paused += self._saved_at - started

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole; say so where that is not the newest one."""
        folder = self.folder.checkpoints
        checkpoint.clear_leftovers(folder)
        problems: list[tuple[Path, str]] = []
        for path, manifest in checkpoint.newest(folder):
            try:
                if isinstance(manifest, checkpoint.Damaged):
                    raise manifest
                weights = checkpoint.read_weights(path, average=False)
                average = None if self.average is None else checkpoint.read_weights(path)
                training = checkpoint.read_training(path)
                position = Position(**training["position"])
            except (checkpoint.Damaged, KeyError, TypeError) as error:
                problems.append((path, str(error) if isinstance(error, checkpoint.Damaged) else f"{path} is damaged."))
                continue
            for bad, told in problems:
                self.reporter.say(f"{told.rstrip('.')}; going on from {path} instead.")
                bad.rename(bad.with_name(f"{bad.name}.damaged"))
            self._restore(path, weights, average, training)
            budget = self.config.time_budget
            if position.status == "time_budget" and (budget is None or budget > position.seconds):
                position.status = None  # it was given more time
            self.at, self.last_good = position, path
            self.reporter.say(f"{self.folder.path}: going on from step {position.step}.")
            return
        if problems:
            told = " ".join(text for _, text in problems)
            raise UsageError(f"{told} No other checkpoint is left: start over with --fresh.")

    def _restore(self, path: Path, weights: Any, average: Any, training: dict[str, Any]) -> None:
        checkpoint.load_weights(self.model, weights, path)
        if self.average is not None:
            checkpoint.load_weights(self.average.module, average, path)
        self.optimizer.load_state_dict(training["optimizer"])
        torch.set_rng_state(training["random"])
        if training["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(training["random_cuda"], self.device)
        self.generator.set_state(training["generator"])
        self.carry = {k: v.to(self.device) for k, v in training["carry"].items()}

    # ---- endings

    def _check_finite(self, loss: float) -> None:
        if not torch.isfinite(torch.tensor(loss)):
            raise RunError(self._not_finite(f"The loss became {loss}; it"))

    def _not_finite(self, what: str) -> str:
        fix = f"try a lower train.lr (now {self.config.lr:g}), a longer warm-up, or train.clip"
        return f"{what} is not finite at step {self.at.step}: {fix}."

    def _interrupted(self) -> Interrupted:
        self._write_result("interrupted")
        told = f"Interrupted at step {self.at.step}. Go on with: zoo train {self.folder.path} --resume"
        return Interrupted(told, int(self.stop.signal or signal.SIGINT))

    def _failed(self, error: RunError) -> RunError:
        last = f"The last good checkpoint is {self.last_good}." if self.last_good else "There is no checkpoint yet."
        with contextlib.suppress(RunError):  # a full disk
            self._write_result("failed")
        return RunError(f"{error} {last}")

    def _finish(self) -> Result:
        """Read test once, with the weights that validation chose."""
        at = self.at
        assert at.best is not None
        assert at.status is not None
        best = self.folder.checkpoints / f"step_{at.best['step']}"
        checkpoint.verify(best)
        model = create_model(self.model_config).to(self.device)
        checkpoint.load_weights(model, checkpoint.read_weights(best), best)
        rows = held_out(self.task, "test", self.config.test_rows)
        test = self._score(model, rows)
        line = {"step": at.best["step"], "split": "test", "seconds": self._seconds(), "tokens": at.tokens}
        self.folder.record(line | scalars(test) | {"lr": self.optimizer.lr(at.step - 1), "tokens_per_second": None})
        with machine.autocast(self.precision, self.device):
            decode = decode_rate(model, self.objective.length)
        data = self._write_result(at.status, test, decode)
        return Result(self.folder.path, at.status, data)

    def _write_result(
        self, status: str, test: dict[str, Any] | None = None, decode: float | None = None
    ) -> dict[str, Any]:
        at = self.at
        context = self.objective.length
        sections = self.experiment.resolved(Parts(self.task, self.objective, self.model_config))
        data = {
            "name": self.experiment.name,
            "status": status,
            **{k: sections[k] for k in ("task", "model", "objective", "train")},
            "seed": self.config.seed,
            "steps": at.step,
            "best_step": at.best["step"] if at.best else None,
            "tokens": at.tokens,
            "seconds": self._seconds(),
            "seconds_to_target": at.seconds_to_target,
            "compile_seconds": at.compile_seconds,
            "validation": at.best["score"] if at.best else {},
            "test": test or {},
            "n_parameters": self.model.n_parameters(),
            "state_bytes": self.model.state_bytes(1, context),
            "context_length": context,
            "flops_per_token": self.model.flops_per_token(context),
            "tokens_per_second": self.folder.training_rate(),
            "decode_tokens_per_second": decode,
            "peak_memory_bytes": self.peak_memory or machine.peak_memory(self.device),
            "baseline_memory_bytes": self.baseline_memory,
            "machine": machine.describe_machine(self.device),
            "versions": machine.versions(),
            "backends": {},
            "precision": self.precision,
            "commit": machine.commit(),
        }
        self.folder.write_result(data)
        return data

    # ---- time

    def _start_clock(self) -> None:
        self._started = time.perf_counter() - self.at.seconds
        self._logged_at: float = time.perf_counter()
        self._logged_tokens: int = self.at.tokens
        self._paused: float = 0.0  # evaluating and saving since the last training line
        self._saved_at, self._saved = time.perf_counter(), self._moment()

    def _moment(self) -> tuple[Any, ...]:
        return self.at.step, self.at.to_evaluate, self.at.status

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _compile(self) -> None:
        """Compile the layers, and time it: one pass forward and back over the first batch, of which nothing stays."""
        started = time.perf_counter()
        self.model.backbone.compile()
        self.model.train()
        random = torch.get_rng_state()
        rows = self.task.sample(self.config.batch_size, split="train", seed=self.config.seed)
        data = self.objective.encode(rows).to(self.device)
        generator = torch.Generator().manual_seed(0)
        carry = {k: v.clone() for k, v in self.carry.items()}
        with machine.autocast(self.precision, self.device):
            update = next(iter(self.objective.updates(self.model, data, carry, generator)))
        update.loss.backward()
        self.model.zero_grad(set_to_none=True)
        torch.set_rng_state(random)
        seconds = time.perf_counter() - started
        self.at.compile_seconds += seconds
        self._logged_at = time.perf_counter()


def _eagerly(compiled: bool) -> Any:
    """Evaluation runs uncompiled: its shapes differ, and each would be compiled anew."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


class _Stop:
    """The signal that asks for an end, once there is one."""

    signal: int | None = None
    at: float = 0.0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask the training to end after its step; SIGINT again a second later ends it at once."""
    stop = _Stop()

    def ask(number: int, frame: Any) -> None:
        now = time.perf_counter()
        if stop.signal is not None and number == signal.SIGINT and now - stop.at > 1.0:
            raise KeyboardInterrupt
        if stop.signal is None:
            stop.signal, stop.at = number, now

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return
    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
