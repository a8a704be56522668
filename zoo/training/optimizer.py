"""Parameter groups, optimizers, schedules and the running average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from zoo.objectives.base import at_least_float32
from zoo.parameters import Rule, rules_of
from zoo.training.group import Group
from zoo.training.muon import SharedMuon
from zoo.training.shards import here, is_shard, n_pieces, trained_here
from zoo.training.train_options import TrainConfig

Model = TypeVar("Model", bound=nn.Module)

SMALLEST_MATRIX = 8  # a depthwise convolution is no matrix to orthogonalise


def parameter_groups(model: nn.Module, *, muon: bool = False, by_row: bool = False) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter in exactly one of `rows` (for `SignRows`), `matrices` (for Muon), `decay`, `no_decay`.

    Without `muon`, matrices are part of `decay`. With `by_row`, `rows` has the tables of which a batch uses few rows.
    What single parameters need is said by their modules (`zoo.parameters.set_rule`).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "head", None)
    heads = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    rules = rules_of(model)
    groups: dict[str, list[nn.Parameter]] = {"rows": [], "matrices": [], "decay": [], "no_decay": []}
    for p in model.parameters():  # a shared parameter once
        if not p.requires_grad:
            continue
        rule = rules.get(id(p), Rule())
        if by_row and rule.by_row:
            groups["rows"].append(p)
        elif p.ndim < 2 or not rule.weight_decay or id(p) in embeddings:
            groups["no_decay"].append(p)
        elif muon and p.ndim == 2 and min(p.shape) > SMALLEST_MATRIX and id(p) not in heads:
            groups["matrices"].append(p)
        else:
            groups["decay"].append(p)
    placed = [id(p) for group in groups.values() for p in group]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(placed) == len(set(placed)), "a parameter is in two groups"
    assert set(placed) == trainable, "a parameter is in no group"
    return groups


def freeze(model: nn.Module, trains: str) -> None:
    """Leave only those weights to be trained whose names begin so (`Objective.trains`)."""
    for name, p in model.named_parameters():
        if not name.startswith(trains):
            p.requires_grad_(False)


def by_lr_scale(parameters: Sequence[nn.Parameter], rules: Mapping[int, Rule]) -> dict[float, list[nn.Parameter]]:
    """Parameters by the factor on their learning rate."""
    scales: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        scales.setdefault(rules.get(id(p), Rule()).lr_scale, []).append(p)
    return scales


class AdamATan2(torch.optim.Optimizer):
    """AdamW with atan2(m, sqrt(v)) in place of m / (sqrt(v) + eps): no eps, no scale.

    As in the package adam-atan2 (github.com/imoneoi/adam-atan2), which HRM and TRM are trained with: m's correction
    stands outside of atan2. Everett et al. (2024, arXiv 2407.05872, section 6), whose idea it is, have it inside.

        p <- (1 - lr decay) p - lr / (1 - beta1^t) atan2(m, sqrt(v / (1 - beta2^t)))

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the first and the second moment.
        weight_decay: decoupled.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p]["step"] += 1
            gradients = [p.grad for p in params]
            means, squares = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(means, gradients, 1 - beta1)
            torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - beta2)
            for p, mean, square in zip(params, means, squares, strict=True):
                t = self.state[p]["step"]
                root = square.sqrt().div_((1 - beta2**t) ** 0.5)
                p.sub_(torch.atan2(mean, root), alpha=group["lr"] / (1 - beta1**t))


class SignRows(torch.optim.Optimizer):
    """Descent by the sign of the gradient, and decoupled weight decay, of the rows of a table that a batch has used.

        p <- (1 - lr decay) p - lr sign(g)    where g, the row's gradient, is not 0

    What Adam comes to where each row has a gradient once in a long while (HRM, arXiv 2506.21734, and TRM have it so).

    Args:
        params: tables (rows, width), or groups of them.
        lr: learning rate.
        weight_decay: decoupled.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every row that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                used = (p.grad != 0).any(1).nonzero().squeeze(1)
                p[used] = p[used] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * p.grad[used].sign()


class Optimizer:
    """AdamW, AdamATan2, or Muon for hidden matrices and AdamW for the rest, under one schedule, with gradient clipping.

    With `puzzle_lr`, `SignRows` for what is learned of each puzzle.

    A module's own rules (`zoo.parameters`) are kept: a parameter without weight decay is not given to Muon either.

    Where the model's weights are in pieces, it moves this process's rows of each, and its state is that of these rows.

    Muon's updates are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one
    learning rate serves both; or as Keller Jordan has them (`muon_scaling="original"`).
    """

    def __init__(self, model: nn.Module, config: TrainConfig, group: Group = Group()):
        self.config, self._group = config, group
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        held = {id(p): trained_here(p) for p in self.parameters}  # what is moved: of a shard its rows
        self._held = list(held.values())
        self._shapes = {held[id(p)]: p.shape for p in self.parameters}
        self._in_pieces = any(map(is_shard, self.parameters))
        self._pieces = {held[id(p)]: n_pieces(p) for p in self.parameters}
        groups = parameter_groups(model, muon=config.optimizer == "muon", by_row=config.puzzle_lr is not None)
        rules = rules_of(model)
        self.peaks: list[list[float]] = []  # of every group of every part

        def scaled(peak: float, **decays: float) -> list[dict[str, Any]]:
            """Groups with the weight decays given, cut by learning rate; notes their peaks."""
            cut = [(s, ps, d) for name, d in decays.items() for s, ps in by_lr_scale(groups[name], rules).items()]
            self.peaks.append([peak * scale for scale, _, _ in cut])
            return [{"params": [held[id(p)] for p in ps], "weight_decay": decay} for _, ps, decay in cut]

        rest = scaled(config.lr, decay=config.weight_decay, no_decay=config.weight_decay if config.decay_all else 0.0)
        betas = config.beta1, config.beta2
        self.parts: list[torch.optim.Optimizer] = []
        if config.optimizer == "adam_atan2":
            self.parts.append(AdamATan2(rest, lr=config.lr, betas=betas))
        else:
            fused = all(p.device.type in ("cpu", "cuda", "mps") for p in self.parameters)
            self.parts.append(torch.optim.AdamW(rest, lr=config.lr, betas=betas, eps=config.eps, fused=fused))
        if groups["matrices"]:
            peak = config.muon_lr or config.lr
            decay = config.weight_decay if config.muon_weight_decay is None else config.muon_weight_decay
            how: dict[str, Any] = {
                "lr": peak,
                "momentum": config.momentum,
                "nesterov": config.nesterov,
                "ns_steps": config.newton_schulz_steps,
                "adjust_lr_fn": config.muon_scaling,
            }
            if group.size == 1:
                self.parts.append(torch.optim.Muon(scaled(peak, matrices=decay), **how))
            else:
                how |= {"shapes": self._shapes, "in_pieces": any(map(is_shard, groups["matrices"]))}
                self.parts.append(SharedMuon(scaled(peak, matrices=decay), group=group, **how))
        if config.puzzle_lr is not None and groups["rows"]:
            self.parts.append(SignRows(scaled(config.puzzle_lr, rows=config.weight_decay), lr=config.puzzle_lr))

    def step(self, index: int) -> Tensor | None:
        """Clip, update with the learning rate of step `index` (from 0) and drop the gradients.

        Returns:
            The norm of the gradient before clipping, where clipping is on.
        """
        if self._in_pieces:
            for p, held in zip(self.parameters, self._held, strict=True):
                held.grad = None if p.grad is None else here(p.grad)
        gradients = [p.grad for p in self._held if p.grad is not None]
        norm = None
        if self.config.clip is not None:
            counted = gradients
            if self._in_pieces:  # what several processes have counts in the first of them
                counted = [p.grad for p, n in self._pieces.items() if p.grad is not None and self._group.rank < n]
            norms = torch._foreach_norm(counted) if counted else [gradients[0].new_zeros(())]
            norm = torch.linalg.vector_norm(at_least_float32(torch.stack(norms)))
            if self._in_pieces:
                norm = self._group.total(norm.square()).sqrt()
            # A product with a tensor: no decision in Python, so no wait for the device.
            torch._foreach_mul_(gradients, (self.config.clip / (norm + 1e-6)).clamp(max=1.0))
        scale = lr_scale(self.config, index)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            part.step()
        for p in (*self.parameters, *self._held) if self._in_pieces else self.parameters:
            p.grad = None
        return norm

    def n_pieces(self) -> dict[str, int]:
        """In how many pieces the processes hold each parameter, by `PART.PARAMETER` as in the state."""
        each = [[p for group in part.param_groups for p in group["params"]] for part in self.parts]
        return {f"{part}.{i}": self._pieces[p] for part, params in enumerate(each) for i, p in enumerate(params)}

    def is_finite(self) -> bool:
        """Whether every weight of every process is a number."""
        found = torch.stack(torch._foreach_norm([p.detach() for p in self._held])).isfinite().all()
        return not self._group.largest(not found)[0] if self._in_pieces else bool(found)

    def lr(self, index: int) -> float:
        return self.config.lr * lr_scale(self.config, index)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take over what `check` has seen; learning rates and the like stay those of the config."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict({"state": state["state"], "param_groups": part.state_dict()["param_groups"]})

    def check(self, states: list[Any]) -> None:
        """Raises ValueError unless these are the states of such an optimizer of such parameters."""
        if len(states) != len(self.parts):
            raise ValueError(f"optimizer: {len(states)} parts instead of {len(self.parts)}")
        for part, state in zip(self.parts, states, strict=True):
            try:
                groups = [group["params"] for group in state["param_groups"]]
                kept = {int(index): dict(values) for index, values in state["state"].items()}
            except (KeyError, TypeError, AttributeError):
                raise ValueError("optimizer: no state of an optimizer") from None
            if groups != [group["params"] for group in part.state_dict()["param_groups"]]:
                raise ValueError("optimizer: other parameters")
            params = [p for group in part.param_groups for p in group["params"]]
            names = kept_by(part)
            for index, values in kept.items():
                if not 0 <= index < len(params) or values.keys() != names:
                    raise ValueError(f"optimizer: another method's ({', '.join(map(str, values))})")
                for name, value in values.items():
                    numbers = value if isinstance(value, Tensor) else torch.as_tensor(value)
                    if numbers.shape not in (self._shapes[params[index]], torch.Size()) or (
                        name != "step" and not numbers.ndim
                    ):
                        raise ValueError(f"optimizer: {name} has another shape")


def kept_by(optimizer: torch.optim.Optimizer) -> set[str]:
    """What an optimizer keeps of each parameter it has moved."""
    sample = nn.Parameter(torch.zeros(2, 2))
    sample.grad = torch.zeros(2, 2)
    fresh = type(optimizer)([sample], lr=1e-3)  # type: ignore[call-arg]
    fresh.step()
    return set(fresh.state[sample])


def lr_scale(config: TrainConfig, step: int) -> float:
    """Learning rate of step `step` (from 0) as a share of the peak.

    The warm-up's last step is at the peak. `final_lr` is where the step after the last would be, so that the last one
    still teaches where that is 0.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        peak = max(config.warmup_steps - 1, 0)
        share = min((step - peak) / max(config.steps - peak, 1), 1.0)
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * share))
    decay = config.steps // 5 if config.decay_steps is None else config.decay_steps
    left = min(max(config.steps - step, 0) / (decay + 1), 1.0)  # below the peak in `decay` steps
    return config.final_lr + (1 - config.final_lr) * left


def averaging(model: Model) -> Model:
    """A copy of a model for its running average, in float32 at least."""
    module = copy.deepcopy(model).eval().requires_grad_(False)
    return module.to(at_least_float32(next(module.parameters()).detach()[:0]).dtype)


class Average(Generic[Model]):
    """A copy of a model, `module`, that follows it by a running average.

    With `warmup` the first steps are forgotten faster: the decay of step t is min(decay, (1 + t) / (10 + t)). Without
    it is the same from the start, as in TRM's code; the two differ while (1 + t) / (10 + t) is below it, with 0.999 for
    some 9,000 steps.

    With `start` it is the same as the model before step `start`, from which on steps count.

    Tables that are trained by row, whose rows change too seldom for an average, are copied. The average of a model in
    lower precision is in float32, as it moves by less than a unit in the last place of a weight.

    Where `module` is given, it is the copy: its weights and the model's are in pieces.
    """

    def __init__(self, model: Model, decay: float, *, warmup: bool = True, start: int = 0, module: Model | None = None):
        self.decay, self.warmup, self.start = decay, warmup, start
        self.module: Model = averaging(model) if module is None else module
        pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        tables = {parameter for parameter, rule in rules_of(model).items() if rule.by_row}
        averaged = [pair for pair in pairs if id(pair[1]) not in tables]
        self._average: list[Tensor] = [here(ours) for ours, _ in averaged]
        self._current: list[Tensor] = [here(theirs) for _, theirs in averaged]
        self._copied = [(here(ours), here(theirs)) for ours, theirs in pairs if id(theirs) in tables]
        self._copied += zip(self.module.buffers(), model.buffers(), strict=True)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        since = step - self.start
        weight = 1 - (min(self.decay, (1 + since) / (10 + since)) if self.warmup else self.decay)
        current = [ours.to(mine.dtype) for ours, mine in zip(self._current, self._average, strict=True)]
        if since < 0:
            torch._foreach_copy_(self._average, current)
        else:
            torch._foreach_lerp_(self._average, current, weight)
        for ours, theirs in self._copied:
            ours.copy_(theirs)
