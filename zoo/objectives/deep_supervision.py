"""Deep supervision: a recursive model is trained at every supervision step, and learns when to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.models.modes import evaluation_mode
from zoo.models.recursive import RecursiveState, Thought
from zoo.objectives.base import (
    Carry,
    Encoded,
    Frame,
    Objective,
    Update,
    answered,
    answered_length,
    at_least_float32,
    register,
    row_parts,
    scored,
    with_losses,
)
from zoo.objectives.draws import RowDraws
from zoo.protocol import Context
from zoo.tasks.protocol import IGNORE, Batch, Task

WINDOW = 3  # steps over which `vote="settled"` looks, as EqR's authors have it


@register("deep_supervision")
class DeepSupervision(Objective):
    """Train a recursive model at every supervision step, as HRM and TRM (arXiv 2506.21734, arXiv 2510.04871, figure 3).

    A batch has one place for each row. A place has a puzzle and the state of the model for it. One update is one
    supervision step of all places:

        loss = mean over rows of  mean over cells of -log p(cell)  +  halting_weight * BCE(halt, the answer is right)

    Whether an answer is right is decided by the task (`Task.is_right`), which may know many right answers. -log p(cell)
    is always that of the target.

    If the halting head of a place says "right", or the place has used `max_steps` steps, the place takes its row of the
    next batch; the other rows of that batch are not used. With the probability `exploration` a puzzle stays for at
    least a random number of steps from 2 to `max_steps`.

    A `fill_in` task is answered in place. A task whose answers are a text within the row (`Task.continues`) is answered
    where the text is. For other tasks the row is read with blanks appended for its scored cells.
    """

    class Config(Options):
        """The options.

        Attributes:
            loss: "stablemax" has s(x) = x + 1 or 1 / (1 - x) in place of exp (Prieto et al. 2025, arXiv 2501.04697).
            halting: "halt" stops when the halting head predicts that the answer is right (TRM); "q" also learns the
                value of continuing, by Q-learning with one more pass (HRM).
            halting_weight: weight of the halting head's loss.
            exploration: share of puzzles that stay for more supervision steps.
            random_start: training too starts from random y and z, so that the answer is reached from any start (EqR,
                Huang et al. 2026, arXiv 2605.21488).
            eval_steps: supervision steps in evaluation, by default the model's `max_steps`.
            starts: number of random starts in evaluation; `vote` chooses one of the answers.
            vote: which answer is chosen. "halt": the one in which the halting head has the most confidence (PTRM,
                Sghaier et al. 2026, arXiv 2605.19943). "settled": the one whose logits changed least in the last three
                steps (EqR).
        """

        loss: Literal["stablemax", "softmax"] = "stablemax"
        halting: Literal["halt", "q"] = "halt"
        halting_weight: float = Field(default=0.5, ge=0)
        exploration: float = Field(default=0.1, ge=0, le=1)
        random_start: bool = False
        eval_steps: int | None = Field(default=None, ge=1)
        starts: int = Field(default=1, ge=1)
        vote: Literal["halt", "settled"] = "halt"

    recursive = True
    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if causal:
            raise UsageError("deep_supervision answers all cells at once: set model.causal=false.")
        if task.layout not in ("next_token", "fill_in") or task.is_language:
            told = "is a text" if task.is_language else f"has the layout {task.layout}"
            raise UsageError(f"The objective deep_supervision asks for questions with an answer; {task.name} {told}.")
        if task.irregular_times:
            told = f"{task.name}'s steps are at irregular times, which a recursive model does not read"
            raise UsageError(f"{told}: use another objective.")
        if config.vote != "halt" and config.starts == 1:
            raise UsageError(
                f"deep_supervision: vote={config.vote!r} chooses among several starts: set objective.starts."
            )
        if config.vote == "settled" and config.eval_steps == 1:
            raise UsageError('deep_supervision: vote="settled" compares steps: it needs eval_steps above 1.')
        self.in_place = task.layout == "fill_in"
        self.blank = task.vocab_size
        self.vocab_size = task.vocab_size + (not self.in_place)
        self.length = task.seq_len if self.in_place else answered_length(task, self.name)

    def encode(self, batch: Batch) -> Encoded:
        if self.in_place:
            tokens, positions = batch.inputs, scored(batch.targets)
        else:
            told, cells, _ = answered(self.task, batch)
            tokens, positions = told.masked_fill(cells, self.blank), cells.flatten().nonzero().squeeze(1)
        told = batch.targets[batch.targets != IGNORE]
        return Encoded(tokens, positions, told, puzzles=batch.puzzles, streams=batch.streams)

    def updates(
        self,
        model: Any,
        data: Encoded,
        carry: Carry,
        generator: torch.Generator,
        parts: int = 1,
        rows: slice | None = None,
    ) -> Iterator[Update]:
        targets = torch.full_like(data.tokens, IGNORE)
        targets.view(-1)[data.positions] = data.targets
        fresh = model.init_state(*data.tokens.shape, generator=generator if self.config.random_start else None)
        new = {"tokens": data.tokens, "targets": targets, "answer": fresh.answer, "latents": fresh.latents}
        if data.puzzles is not None:
            new["puzzles"] = data.puzzles
        own = slice(None) if rows is None else rows
        new = {name: tensor[own] for name, tensor in new.items()}
        n = len(new["tokens"])
        if not carry:
            carry["halted"] = torch.ones(n, dtype=torch.bool, device=data.tokens.device)
            carry["steps"] = torch.zeros(n, dtype=torch.int64, device=data.tokens.device)
            carry.update(new)
        halted = carry["halted"]
        for name, tensor in new.items():
            carry[name] = torch.where(halted.view(-1, *[1] * (tensor.ndim - 1)), tensor, carry[name].to(tensor.dtype))
        steps = torch.where(halted, 0, carry["steps"]) + 1

        split = row_parts(n, parts)
        stops, states = [], []
        for here in split:
            thought, stop, update = self._learn(model, {k: v[here] for k, v in carry.items()}, steps[here])
            share = (here.stop - here.start) / len(data.tokens)
            yield replace(update, loss=update.loss * share, share=share, last=here is split[-1])
            stops.append(stop)
            states.append(thought)

        n = len(data.tokens)
        explore = torch.rand(n, generator=generator) < self.config.exploration
        most = model.recursion.max_steps
        least = explore * torch.randint(2, max(most, 2) + 1, (n,), generator=generator)
        carry["halted"] = (steps >= most) | (torch.cat(stops) & (steps >= least[own].to(steps.device)))
        carry["steps"] = steps
        carry["answer"], carry["latents"] = (torch.cat(each) for each in zip(*states, strict=True))

    def _learn(self, model: Any, carry: Carry, steps: Tensor) -> tuple[RecursiveState, Tensor, Update]:
        """One supervision step of some places: their next state, which of them may stop, and the mean of their losses.

        Args:
            model: in training mode.
            carry: of these places.
            steps: (n,) supervision steps of each, this one included.
        """
        tokens, targets, puzzles = carry["tokens"], carry["targets"], carry.get("puzzles")
        state, context = RecursiveState(carry["answer"], carry["latents"]), Context()
        thought = model.think(tokens, state, context, puzzles=puzzles)
        rows, cells = (targets != IGNORE).nonzero(as_tuple=True)
        expected = targets[rows, cells]
        logits = model.logits(thought.hidden[rows, cells])
        n_cells = torch.bincount(rows, minlength=len(tokens)).clamp(min=1)
        answers = (self._nats(logits, expected) / n_cells[rows]).sum() / len(tokens)
        said = tokens.clone()
        said[rows, cells] = logits.detach().argmax(-1)
        batch = self._batch(tokens, targets)
        right = self.task.is_right(batch, said[:, -batch.inputs.shape[1] :]).to(tokens.device)
        halting = F.binary_cross_entropy_with_logits(thought.halt, right.to(thought.halt))
        last = steps >= model.recursion.max_steps
        stop = thought.halt > 0
        if self.config.halting == "q":
            stop = thought.halt > thought.go_on
            with torch.no_grad():
                later = model.think(tokens, thought.state, puzzles=puzzles)
                value = torch.where(last, later.halt, torch.maximum(later.halt, later.go_on)).sigmoid()
            halting = halting + F.binary_cross_entropy_with_logits(thought.go_on, value)
        loss = with_losses(answers + halting * self.config.halting_weight, context)
        metrics = {
            **context.metrics,
            "answer_loss": answers.detach(),
            "halting_loss": halting.detach(),
            "halting_accuracy": ((thought.halt >= 0) == right).float().mean(),
            "steps": steps.float().mean(),
        }
        return thought.state, stop.detach(), Update(loss, logits, expected, rows, metrics, right=right)

    def _batch(self, tokens: Tensor, targets: Tensor) -> Batch:
        """The task's rows that tokens and targets (n, T) were encoded from."""
        if self.in_place:
            return Batch(tokens, targets)
        length = self.task.seq_len
        inputs = tokens[:, :length]
        if self.task.continues:  # the answer is part of the row
            inputs = torch.where(targets[:, :length] != IGNORE, targets[:, :length], inputs)
        return Batch(inputs, targets[:, -length:])

    def training_flops(self, model: Any, *, recompute: bool = False) -> int:
        """As for other objectives; backward through the last cycle, or the last update of latent and answer, only."""
        r, forward = model.recursion, model.flops_per_token(self.length)
        learning = 2 if r.gradient == "step" else r.updates + 1
        backward = (3 if recompute else 2) * forward * learning // (r.cycles * (r.updates + 1))
        return forward * (2 if self.config.halting == "q" else 1) + backward

    def carries(self, carry: Carry, model: Any, n: int) -> bool:
        if not carry:
            return True
        names = {"halted", "steps", "tokens", "targets", "answer", "latents"} | {"puzzles"} & carry.keys()
        if carry.keys() != names or carry["tokens"].ndim != 2 or len(carry["tokens"]) != n:
            return False
        fresh = model.init_state(*carry["tokens"].shape)
        shapes = {"halted": (n,), "steps": (n,), "puzzles": (n,), "targets": carry["tokens"].shape}
        shapes |= {"tokens": carry["tokens"].shape, "answer": fresh.answer.shape, "latents": fresh.latents.shape}
        tokens, targets = carry["tokens"], carry["targets"]
        return (
            all(carry[name].shape == shapes[name] for name in names)
            and carry["halted"].dtype == torch.bool
            and all(carry[name].dtype == torch.int64 for name in names - {"halted", "answer", "latents"})
            and 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size
            and bool(((targets == IGNORE) | ((targets >= 0) & (targets < self.vocab_size))).all())
        )

    def _nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        """-log p of each target, (m,)."""
        logits = at_least_float32(logits)
        if self.config.loss == "stablemax":  # log s(x) = sign(x) log(1 + |x|), so that softmax of it is stablemax of x
            logits = logits.sign() * logits.abs().log1p()
        return F.cross_entropy(logits, targets, reduction="none")

    def passes(self, model: Any, batch: Batch) -> int:
        return (self.config.eval_steps or model.recursion.max_steps) * self.config.starts

    @torch.no_grad()
    def solve(self, model: Any, batch: Batch) -> Iterator[Frame]:
        """The answers after every supervision step, with their halting values, for the start that `vote` prefers."""
        kept: tuple[Tensor, Tensor, Tensor] | None = None
        with evaluation_mode(model):
            for thoughts in self.attempts(model, self.encode(batch).to(model.answer_init.device)):
                recent: deque[Thought] = deque(maxlen=WINDOW + 1)
                steps = []
                for thought in thoughts:
                    recent.append(thought)
                    steps.append((self.answer(model.logits(thought.hidden), batch), thought.halt))
                answers, halts = (torch.stack(each) for each in zip(*steps, strict=True))
                worth = self.worth(model, recent)
                if kept is not None:
                    better = worth > kept[2]
                    answers = torch.where(better[:, None], answers, kept[0])
                    halts, worth = torch.where(better, halts, kept[1]), torch.maximum(worth, kept[2])
                kept = answers, halts, worth
        assert kept is not None  # there is at least one start
        for answer, halt in zip(*(each.cpu() for each in kept[:2]), strict=True):
            yield Frame(answer, torch.zeros_like(answer, dtype=torch.bool), halt.sigmoid())

    @torch.no_grad()
    def evaluate(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Answers after the last supervision step, and their mean loss by cell."""
        data = self.encode(batch).to(model.answer_init.device)
        kept: tuple[Tensor, Tensor] | None = None
        with evaluation_mode(model):
            for thoughts in self.attempts(model, data):
                recent = deque(thoughts, maxlen=WINDOW + 1)
                hidden, worth = recent[-1].hidden, self.worth(model, recent)
                if kept is not None:
                    hidden = torch.where((worth > kept[1])[:, None, None], hidden, kept[0])
                    worth = torch.maximum(worth, kept[1])
                kept = hidden, worth
            assert kept is not None  # there is at least one start
            logits = model.logits(kept[0])
            loss = self._nats(logits.flatten(0, 1)[data.positions], data.targets).mean()
            return self.answer(logits, batch).cpu(), loss

    def answer(self, logits: Tensor, batch: Batch) -> Tensor:
        """Token ids (n, L) in the task's coordinates."""
        answer = logits[:, -batch.inputs.shape[1] :, : self.task.vocab_size].argmax(-1)
        return torch.where((batch.targets != IGNORE).to(answer.device), answer, batch.inputs.to(answer.device))

    def worth(self, model: Any, recent: Sequence[Thought]) -> Tensor:
        """The score by which `vote` compares the answers of the latest steps, (n,)."""
        if self.config.vote == "halt":
            return recent[-1].halt
        logits = torch.stack([at_least_float32(model.logits(thought.hidden)) for thought in recent])
        return -logits.diff(dim=0).norm(dim=-1).mean((0, 2))

    def attempts(self, model: Any, data: Encoded) -> Iterator[Iterator[Thought]]:
        """The thoughts from each start; the random starts of a row do not depend on the batch."""
        is_random = self.config.starts > 1 or self.config.random_start
        draws = RowDraws.of(data) if is_random else None
        for attempt in range(self.config.starts):
            start = model.init_state(*data.tokens.shape)
            if draws is not None:
                drawn = (draws.at(None, attempt).normal(i, *leaf.shape[1:]) for i, leaf in enumerate(start))
                start = RecursiveState(*(new.to(leaf) for new, leaf in zip(drawn, start, strict=True)))
            yield self.thoughts(model, data.tokens, start, puzzles=data.puzzles)

    def thoughts(
        self, model: Any, tokens: Tensor, state: RecursiveState | None = None, *, puzzles: Tensor | None = None
    ) -> Iterator[Thought]:
        """`model.think` step after step, each from the state of the last."""
        for _ in range(self.config.eval_steps or model.recursion.max_steps):
            thought = model.think(tokens, state, puzzles=puzzles)
            state = thought.state
            yield thought
