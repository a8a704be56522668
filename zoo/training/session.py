"""All that changes while a model is trained, and its way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tasks.registry import UsageError
from zoo.models.token import ModelConfig, TokenModel, create_model
from zoo.objectives.base import Carry
from zoo.training import checkpoint
from zoo.training.experiment import TrainConfig
from zoo.training.optimizer import Average, Optimizer
from zoo.training.randomness import seed_device


@dataclass
class Position:
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

    @property
    def moment(self) -> tuple[Any, ...]:
        """Two positions of one run with the same moment are the same."""
        return self.step, self.to_evaluate, self.status


class Session:
    """Model, running average, optimizer, random states and position, made anew from a config and its seed."""

    def __init__(self, model: ModelConfig, config: TrainConfig, device: torch.device):
        seed_device(config.seed, device)
        self.config, self.device = config, device
        self.model = create_model(model).to(device)
        self.average = None if config.ema is None else Average(self.model, config.ema, warmup=config.ema_warmup)
        self.optimizer = Optimizer(self.model, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.carry: Carry = {}
        self.at = Position()
        self.saved: Path | None = None
        """The newest checkpoint known to be whole."""

    @property
    def evaluated(self) -> TokenModel:
        """The weights that evaluation reads."""
        return self.model if self.average is None else self.average.module

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return bool(torch.stack(torch._foreach_norm(self.optimizer.parameters)).isfinite().all())

    def save(self, folder: Path) -> None:
        """Write a checkpoint of this moment and delete those no longer kept.

        Raises:
            RunError: the file system refuses; earlier checkpoints are as they were.
        """
        cuda = self.device.type == "cuda"
        training = {
            "position": asdict(self.at),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            "generator": self.generator.get_state(),
            "carry": self.carry,
        }
        self.saved = checkpoint.save(
            folder,
            self.at.step,
            weights=self.model.state_dict(),
            average=None if self.average is None else self.average.module.state_dict(),
            training=training,
            best=self.at.best["step"] if self.at.best else None,
        )
        checkpoint.prune(folder, self.config.keep)

    def resume(self, folder: Path, say: Callable[[str], None]) -> None:
        """Go on from the newest checkpoint that is whole, or stay at the start where there is none.

        Raises:
            UsageError: there are checkpoints, but none that can be read.
        """
        checkpoint.clear_leftovers(folder)
        problems: list[tuple[Path, str]] = []
        for path, manifest in checkpoint.newest(folder):
            try:
                if isinstance(manifest, checkpoint.Damaged):
                    raise manifest
                self._restore(path)
            except checkpoint.Damaged as error:
                problems.append((path, str(error).rstrip(".")))
                continue
            for damaged, told in problems:
                say(f"{told}; going on from {path} instead.")
                damaged.rename(checkpoint.aside(damaged))
            self.saved = path
            say(f"Going on from {path}.")
            return
        if problems:
            told = ". ".join(text for _, text in problems)
            raise UsageError(f"{told}. No checkpoint is left to go on from: start over with --fresh.")

    def _restore(self, path: Path) -> None:
        weights = checkpoint.read_weights(path, average=False)
        average = None if self.average is None else checkpoint.read_weights(path)
        training = checkpoint.read_training(path)
        try:
            position = Position(**training["position"])
            optimizer, random, generator = training["optimizer"], training["random"], training["generator"]
            carry, random_cuda = training["carry"], training["random_cuda"]
        except (KeyError, TypeError):
            raise checkpoint.Damaged(f"The checkpoint {path} is of another version of this package.") from None
        checkpoint.load_weights(self.model, weights, path)
        if self.average is not None and average is not None:
            checkpoint.load_weights(self.average.module, average, path)
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(random)
        if random_cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(random_cuda, self.device)
        self.generator.set_state(generator)
        self.carry = {k: v.to(self.device) for k, v in carry.items()}
        self.at = position
