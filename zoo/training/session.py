"""All that changes while a model is trained, and its way into a checkpoint and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError
from torch import Tensor

from zoo.core.errors import UsageError, quoted
from zoo.models.config import ModelConfig
from zoo.models.create import create_model
from zoo.models.ends import Ends
from zoo.objectives.base import Carry
from zoo.training import checkpoint, checkpoints
from zoo.training.extending import Extension
from zoo.training.group import Group, on_cpu, row_pieces
from zoo.training.optimizer import Average, Optimizer, averaging, freeze
from zoo.training.pieces import OPTIMIZER, moments, parameter_of, with_moments
from zoo.training.randomness import seed_device
from zoo.training.resharding import check_fits, load_rows, own_moments
from zoo.training.shards import here, n_pieces
from zoo.training.starting import Start
from zoo.training.train_options import TrainConfig
from zoo.training.writing import Writing


class Best(BaseModel):
    """Where the best weights so far are, and how good."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: NonNegativeInt
    rank: list[float]
    score: dict[str, Any]


class Position(BaseModel):
    """Where a training stands, in plain values.

    Attributes:
        step: batches trained.
        tokens: tokens trained.
        seconds: of training, interruptions left out.
        compile_seconds: of those, spent on compilation.
        loss_sum: of the updates since the last training line.
        loss_count: number of those.
        to_evaluate: whether the evaluation due at this step is still to be made.
        status: how the training ended, once it has.
        best: step, rank and validation score of the best weights.
        lost_best: the step of weights that were the best, and whose checkpoint was then damaged or deleted.
        seconds_to_target: when the target was reached.
        metrics_size: bytes of metrics.jsonl.
        extended: the changes of the run's length, in order.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    compile_seconds: NonNegativeFloat = 0.0
    loss_sum: float = 0.0
    loss_count: NonNegativeInt = 0
    to_evaluate: bool = False
    status: Literal["finished", "target", "time_budget"] | None = None
    best: Best | None = None
    lost_best: NonNegativeInt | None = None
    seconds_to_target: NonNegativeFloat | None = None
    metrics_size: NonNegativeInt = 0
    extended: list[Extension] = []

    @property
    def moment(self) -> tuple[Any, ...]:
        """Two positions of one run with the same moment are the same."""
        return self.step, self.to_evaluate, self.status


class Training(BaseModel):
    """What a checkpoint keeps of a training beside its weights; refuses all else."""

    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    position: Position
    optimizer: list[Any]
    random: Tensor
    random_cuda: Tensor | None
    generator: Tensor
    carry: dict[str, Tensor]
    data: dict[str, Any] | None = None


class Session:
    """Model, running average, optimizer, random states and position, made anew from a config and its seed.

    With `start`, the model has the weights that it keeps of another one. With `trains`, only the weights whose names
    begin so are trained.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        device: torch.device,
        start: Start | None = None,
        group: Group = Group(),
        trains: str = "",
    ):
        seed_device(config.seed, device)
        self.config, self.device, self.group = config, device, group
        self.in_pieces = group.cuts(config)

        def create(on: torch.device) -> Ends:
            with on if on.type == "meta" else contextlib.nullcontext():
                made = create_model(model).to(on)
            if start is not None and on.type != "meta":
                start.into(made)
            return made.to(torch.bfloat16) if config.parameters == "bfloat16" else made

        self.model = create(torch.device("meta") if self.in_pieces else device)
        self.model.recompute = config.recompute
        freeze(self.model, trains)
        follows = None if config.ema is None or not self.in_pieces else averaging(self.model)
        if self.in_pieces:
            pieces = [self.model] if follows is None else [self.model, follows]
            for each in pieces:
                group.cut(each, config, device)
            seed_device(config.seed, device)
            group.pour(lambda: create(torch.device("cpu")), *pieces)
        self.average = None
        if config.ema is not None:
            how: dict[str, Any] = {"warmup": config.ema_warmup, "start": config.ema_start, "module": follows}
            self.average = Average(self.model, config.ema, **how)
        self.optimizer = Optimizer(self.model, config, group)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.carry: Carry = {}
        self.data: dict[str, Any] | None = None
        """The place of training rows that come in order, at the checkpoint that was resumed."""
        self.at = Position()
        self._read: dict[str, Any] | None = None
        self.writing: Writing | None = None
        """The checkpoint that is being written meanwhile, where the model is in pieces."""
        self.saved: Path | None = None
        """The newest checkpoint known to be whole."""

    @property
    def evaluated(self) -> Ends:
        """The weights that evaluation reads."""
        return self.model if self.average is None else self.average.module

    def save(
        self,
        folder: Path,
        config: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        carry: Carry | None = None,
    ) -> None:
        """Write a checkpoint of this moment of a run of this config, and delete those no longer kept.

        Args:
            folder: of the checkpoints.
            config: of the run.
            data: the place of training rows that come in order.
            carry: what goes from batch to batch, where this process has only some rows of it.

        Raises:
            RunError: the file system refuses; earlier checkpoints are as they were.
        """
        training = {**self._kept(), **({} if data is None else {"data": data})}
        if carry is not None:
            training["carry"] = carry
        best = self.at.best.step if self.at.best else None
        if self.in_pieces:
            self.writing = Writing(self.group, folder, self.at.step, self._files(), training, best=best, config=config)
            return
        self.saved = checkpoint.save(
            folder,
            self.at.step,
            weights=self.model.state_dict(),
            average=None if self.average is None else self.average.module.state_dict(),
            training=training,
            best=best,
            config=config,
        )
        checkpoints.prune(folder, self.config.keep)

    def _files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of this process's pieces of a checkpoint, by the names of the files.

        What several processes have is written by the first of them.
        """
        each = {checkpoint.WEIGHTS: self.model}
        if self.average is not None:
            each[checkpoint.AVERAGE] = self.average.module
        found = {
            name: {k: here(v) for k, v in module.state_dict().items() if self.group.rank < n_pieces(v)}
            for name, module in each.items()
        }
        of_optimizer, cut = moments(self.optimizer.state_dict())[1], self.optimizer.n_pieces()
        found[OPTIMIZER] = {k: v for k, v in of_optimizer.items() if self.group.rank < cut[parameter_of(k)]}
        return found

    def is_written(self) -> bool:
        """Whether this process's files of a checkpoint that was begun are there."""
        return self.writing is None or self.writing.is_done()

    def end_save(self) -> None:
        """Wait for the checkpoint that was begun, which then appears; all processes call this.

        Raises:
            RunError: the file system refuses; earlier checkpoints are as they were.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            self.saved = writing.end()
            if self.group.leads:
                checkpoints.prune(self.saved.parent, self.config.keep)

    def _kept(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, in the form of `Training`."""
        cuda, state = self.device.type == "cuda", self.optimizer.state_dict()
        return {
            "position": self.at.model_dump(),
            "optimizer": moments(state)[0] if self.in_pieces else state,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            "generator": self.generator.get_state(),
            "carry": self.carry,
        }

    def share(self, group: Group) -> None:
        """Give every process of a group what the leading one has resumed; each then has its rows of the carry."""
        if group.size == 1:
            return
        told = group.told(lambda: None if self.saved is None else (self.saved, self.data, on_cpu(self._resumed)))
        if not self.in_pieces:
            group.share(self.model)
            if self.average is not None:
                group.share(self.average.module)
        if told is None:
            return
        self.saved, self.data, kept = told
        if self.in_pieces:
            kept = group.agreed(lambda: self._read_pieces(kept), lambda _: {})
        if self.in_pieces or not group.leads:
            self._take(Training.model_validate({**kept, "position": Position.model_validate(kept["position"])}))
        self.carry = row_pieces(self.carry, group.rows(self.config.batch_size))

    @property
    def _resumed(self) -> dict[str, Any]:
        """What the leading process has read of the checkpoint that is resumed, without what every process reads."""
        if self._read is None:
            return self._kept()
        return {**self._read, "optimizer": moments(self._read["optimizer"])[0]}

    def _read_pieces(self, kept: dict[str, Any]) -> dict[str, Any]:
        """Read this process's rows of the checkpoint that is resumed, of all weights and moments.

        Raises:
            Damaged: this process cannot read it.
        """
        assert self.saved is not None
        load_rows(self.model, self.saved, self.group, average=False)
        if self.average is not None:
            load_rows(self.average.module, self.saved, self.group)
        cut = self.optimizer.n_pieces()
        return {**kept, "optimizer": with_moments(kept["optimizer"], own_moments(self.saved, self.group, cut))}

    def load(self, path: Path) -> Ends:
        """Another model in pieces, with the weights of a checkpoint that evaluation reads.

        Raises:
            Damaged: a process cannot read it.
        """
        with torch.device("meta"):
            model = create_model(self.model.config)
        dtype = self.model.compute_dtype() if self.average is None else self.average.module.compute_dtype()
        model.to(dtype)
        self.group.cut(model, self.config, self.device)
        return self.group.agreed(lambda: load_rows(model, path, self.group), lambda _: {})

    def resume(self, folder: Path, say: Callable[[str], None], carries: Callable[[Carry, Ends], bool]) -> None:
        """Continue from the newest complete checkpoint, or stay at the start if there is none.

        Args:
            folder: of the checkpoints.
            say: takes a line for a person.
            carries: whether what went from batch to batch is the objective's.

        Raises:
            UsageError: there are checkpoints, but none that can be read.
        """
        checkpoints.clear_leftovers(folder)
        problems: list[tuple[Path, str]] = []
        for step in reversed(checkpoints.steps(folder)):
            path = folder / checkpoint.name_of(step)
            try:
                checkpoint.verify(path)
                self._restore(path, carries)
            except checkpoint.Damaged as error:
                problems.append((path, str(error).rstrip(".")))
                continue
            for damaged, told in problems:
                say(f"{told}; going on from {path} instead.")
                damaged.rename(checkpoints.aside(damaged))
            self.saved = path
            say(f"Going on from {path}.")
            return
        if problems:
            told = ". ".join(text for _, text in problems)
            raise UsageError(f"{told}. No checkpoint is left to go on from: start over with --fresh.")

    def _restore(self, path: Path, carries: Callable[[Carry, Ends], bool]) -> None:
        weights: dict[str, Tensor] = {}
        average: dict[str, Tensor] | None = None
        if self.in_pieces:
            check_fits(self.model, path, average=False)
        else:
            weights = checkpoint.read_weights(path, average=False)
            average = None if self.average is None else checkpoint.read_weights(path)
        try:
            data = checkpoint.read_training(path, values=not self.in_pieces)
            position = Position.model_validate(data["position"])
            training = Training.model_validate({**data, "position": position})
            self.optimizer.check(training.optimizer)
            if not carries(training.carry, self.model):
                raise ValueError("carry: what goes from batch to batch is something else")
        except checkpoint.Damaged:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # ValidationErrors are ValueErrors
            raise self._foreign(path, error) from None
        self.data = training.data
        if self.in_pieces:
            self._read = data
            return
        checkpoint.load_weights(self.model, weights, path)
        if self.average is not None and average is not None:
            checkpoint.load_weights(self.average.module, average, path)
        try:
            self._take(training)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise self._foreign(path, error) from None

    def _take(self, training: Training) -> None:
        """Be where a training was, weights aside."""
        self.optimizer.load_state_dict(training.optimizer)
        torch.set_rng_state(training.random)
        if training.random_cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(training.random_cuda, self.device)
        self.generator.set_state(training.generator)
        self.carry = {k: v.to(self.device) for k, v in training.carry.items()}
        self.at = training.position

    def _foreign(self, path: Path, error: Exception) -> checkpoint.Damaged:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            told = " ".join(str(error).split())
        other = "is of another version of this package, or of another training"
        return checkpoint.Damaged(f"The checkpoint {path} {other} ({quoted(told, 120)}).")
