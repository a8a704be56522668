"""What a training would take, before it is started: parameters, memory, work. Nothing is written or trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.core.run_files import CHECKPOINTS
from zoo.models.create import create_model
from zoo.models.ends import Ends
from zoo.objectives.base import Objective
from zoo.training import checkpoints, machine
from zoo.training.fit import Parts
from zoo.training.optimizer import Optimizer, freeze, kept_by
from zoo.training.options import Experiment
from zoo.training.randomness import kept_random_state
from zoo.training.recipes import read_experiments
from zoo.training.starting import open_model, planned
from zoo.training.train_options import TrainConfig

LARGEST = 0.25  # share of this machine's memory that the weights may take if activations are to be measured
MOST_WORK = 5e10  # FLOPs of the forward pass over which activations are measured: seconds on one core
MOST_ROWS = 8


def estimate(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    variants: list[str] | None = None,
) -> list[dict[str, Any]]:
    """What each experiment of a recipe would take; `zoo train --dry-run` prints it. Nothing is written.

    Bytes of weights, gradients, optimizer and running average are exact. Those of the activations are what a forward
    pass of a few rows stores for the backward pass, scaled to the rows of a part of the batch; with `train.recompute`,
    and those of one step of the pattern. The largest memory of a run is larger by what torch itself takes, and by what
    an op of the backward pass needs for a moment.

    Args:
        experiment: as for `zoo.train`.
        overrides: dotted keys and values.
        variants: names of those wanted, all by default.

    Returns:
        For each experiment `name`, `out`, `config` (every option), `first_weights` (what `init` keeps, None for new
        weights and for a run that has begun), `n_parameters`, `tokens_per_step`, `flops_per_step`
        (matrix products, forward and backward, by the model's own formulas) and `memory`: bytes of `weights`,
        `gradients`, `optimizer`, `average`, `activations` and their `total`; the last two None where activations are
        not measured, as the weights alone would take much of this machine's memory.

    Raises:
        UsageError: any wrong option.
    """
    return [_one(chosen) for chosen in read_experiments(experiment, overrides, variants or []).values()]


def _one(chosen: Experiment) -> dict[str, Any]:
    parts = chosen.build()
    device = machine.choose_device(chosen.train.device)
    with torch.device("meta"):
        model = create_model(parts.model)
    if chosen.train.parameters == "bfloat16":
        model.to(torch.bfloat16)
    tokens = chosen.train.batch_size * parts.objective.length
    return {
        "name": chosen.name,
        "out": str(chosen.folder),
        "config": chosen.resolved(parts),
        "first_weights": _first_weights(chosen, parts),
        "n_parameters": model.n_parameters(),
        "tokens_per_step": tokens,
        "flops_per_step": tokens * parts.objective.training_flops(model, recompute=chosen.train.recompute),
        "memory": _memory(model, parts, chosen.train, device),
    }


def _first_weights(chosen: Experiment, parts: Parts) -> str | None:
    init = chosen.init
    if init is None or init.source is None or checkpoints.steps(chosen.folder / CHECKPOINTS):
        return None
    source, found = open_model(init.source, init.which)
    return f"{found}: {planned(init, source, parts.model, parts.objective.trains)}"


def _memory(model: Ends, parts: Parts, train: TrainConfig, device: torch.device) -> dict[str, int | None]:
    freeze(model, parts.objective.trains)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = Optimizer(model, train)
    moments = 0
    for part in optimizer.parts:
        n = len(kept_by(part) - {"step"})
        moments += n * sum(_bytes(p) for group in part.param_groups for p in group["params"])
    weights = sum(map(_bytes, [*model.parameters(), *model.buffers()]))
    found: dict[str, int | None] = {
        "weights": weights,
        "gradients": sum(map(_bytes, trained)),
        "optimizer": moments,
        "average": 0 if train.ema is None else sum(4 * t.numel() for t in [*model.parameters(), *model.buffers()]),
    }
    memory = machine.total_memory()
    small = not memory or weights < LARGEST * memory
    activations = _activations(parts, train, device) if small else None
    known = [size for size in found.values() if size is not None]
    return found | {"activations": activations, "total": None if activations is None else sum(known) + activations}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@kept_random_state()
def _activations(parts: Parts, train: TrainConfig, device: torch.device) -> int:
    """Bytes that the forward pass of a part of a batch stores for the backward pass."""
    torch.manual_seed(train.seed)
    model = create_model(parts.model).to(device).train()
    if train.parameters == "bfloat16":
        model.to(torch.bfloat16)
    model.recompute = train.recompute
    rows = -(-train.batch_size // train.accumulate)
    length = parts.objective.length
    most = int(min(rows, MOST_ROWS, max(MOST_WORK // max(length * model.flops_per_token(length), 1), 1)))

    def measured(n: int) -> int:
        return _stored(model, parts.objective, n, train, device)

    def scaled() -> float:
        stored = measured(most)
        if most == rows or most < 4:
            return stored / most * rows
        few = measured(most // 4)
        return stored + (stored - few) / (most - most // 4) * (rows - most)

    size = scaled()
    if train.recompute:
        model.recompute = False
        size += max(scaled() - size, 0) / _pieces(model)
    return round(size)


def _pieces(model: Ends) -> int:
    """How many parts of a pass are computed again, one by one: steps of the pattern, or applications of a network."""
    recursion = model.config.recursion
    if recursion is not None:
        return 2 if recursion.gradient == "step" else recursion.updates + 1
    return max(len(model.backbone.recomputed_parts()), 1)


def _stored(model: Ends, objective: Objective, n: int, train: TrainConfig, device: torch.device) -> int:
    data = objective.encode(objective.task.sample(n, split="train", seed=train.seed)).to(device)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[Tensor, int]] = {}  # by storage, which lives as long as its tensor

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor.detach(), storage.nbytes()
        return tensor

    precision = machine.choose_precision(train.computes_in, device)
    generator = torch.Generator().manual_seed(train.seed)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), machine.autocast(precision, device):
        next(iter(objective.updates(model, data, {}, generator)))
    return sum(size for _, size in kept.values())
