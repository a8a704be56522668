"""Deep supervision: a recursive model is trained at every supervision step, and learns when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.needs import Need, Needs
from zoo.core.options import Options, tuples
from zoo.models.config import ModelConfig
from zoo.models.looped import LoopedModel, LoopedState, require_loop, thinker
from zoo.models.recursive import RecursiveState
from zoo.objectives.base import (
    Carry,
    Encoded,
    Update,
    answered,
    answered_length,
    at_least_float32,
    register,
    row_parts,
    scored,
    with_losses,
)
from zoo.objectives.paths import Vote
from zoo.objectives.supervision import Stage, depth_at, drawn_noise, noised, step_weights, winner
from zoo.objectives.thinking import State, Thinking
from zoo.protocol import Context
from zoo.tasks.protocol import IGNORE, Batch, Task


@register("deep_supervision")
class DeepSupervision(Thinking):
    """Train a recursive model at every supervision step, as HRM and TRM (arXiv 2506.21734, arXiv 2510.04871, figure 3).

    A batch has one place for each row. A place has a puzzle and the state of the model for it. One update is one
    supervision step of all places:

        loss = mean over rows of  mean over cells of -log p(cell)  +  halting_weight * BCE(halt, the answer is right)

    Whether an answer is right is decided by the task (`Task.is_right`), which may know many right answers. -log p(cell)
    is always that of the target.

    If the halting head of a place says "right", or the place has used `max_steps` steps, the place takes its row of the
    next batch; the other rows of that batch are not used. With the probability `exploration` a puzzle stays for at
    least a random number of steps from 2 to `max_steps`.

    A token model with a loop learns so too: `zoo.models.looped.LoopedModel` says what its supervision step is. If it is
    causal, it learns `next_token` tasks as they are read, each scored position from the steps before it.

    A `fill_in` task is answered in place. A task whose answers are a text within the row (`Task.continues`) is answered
    where the text is. For other tasks the row is read with blanks appended for its scored cells.
    """

    class Config(Options):
        """The options.

        Attributes:
            loss: "stablemax" has s(x) = x + 1 or 1 / (1 - x) in place of exp (Prieto et al. 2025, arXiv 2501.04697).
            label_smoothing: weight of the uniform distribution in the targets; in training only.
            halting: "halt" stops when the halting head predicts that the answer is right (TRM); "q" also learns the
                value of continuing, by Q-learning with one more pass (HRM).
            halting_weight: weight of the halting head's loss.
            exploration: share of puzzles that stay for more supervision steps.
            random_start: training too starts from random y and z, so that the answer is reached from any start (EqR,
                Huang et al. 2026, arXiv 2605.21488).
            training_noise: deviation of normal noise on y and z in training (EqR: 0.01), where `noise_at` says.
            noise_at: where noise is added, in training and evaluation. "step": to y and z before every supervision step
                (PTRM); "application": to the new y or z after each application of the network (EqR).
            damping: share of the old y or z that stays at each application of the network, in training and evaluation
                (EqR: 0.05): z <- damping z + (1 - damping) f(z + y + x), and so for y.
            candidates: number of z's that think about each puzzle side by side, from as many starts. Only the one whose
                answer has the least loss is learned from, and its y is handed on to all: winner takes all (Dillon
                2026, arXiv 2601.19085).
            decay: factor on the loss of the answer from one supervision step of a puzzle to the next; the weights of
                `max_steps` steps have the mean 1 (CGAR, Qasim and Zhang 2025, arXiv 2511.08653; published: 0.7).
            curriculum: stages of a shallower start, each (batches, cycles, updates); after the last one the recursion
                has its own depth (CGAR; published: 30 % of the training with 1 cycle of 2 updates, 30 % with 2 of 4,
                the rest with 3 of 6).
            steps: largest number of supervision steps of a puzzle in training, by default the `max_steps` of a
                recursive model, and 4 of a token model with a loop.
            eval_steps: supervision steps in evaluation, by default those of training.
            starts: number of paths of thinking in evaluation; `vote` chooses one of the answers. They start at random,
                or where `candidates` start; with `noise`, and unless `random_start`, all start at the model's own y
                and z.
            noise: deviation of normal noise on y and z in evaluation, where `noise_at` says (PTRM, Sghaier et al. 2026,
                arXiv 2605.19943).
            noise_schedule: "constant", or "linear": the deviation of `noise` falls evenly from the first supervision
                step of evaluation to 0 at the last.
            votes: number of forms of a puzzle that are solved: the puzzle itself and its images under symmetries of the
                task. Their answers are mapped back; each form has `starts` paths.
            vote: which answer is chosen. "halt": the one of which the halting head is surest (PTRM). "first": the first
                of which it says "right"; a path ends there, so this takes fewer steps, also of a single path (Dillon
                2026). "settled": the one whose logits changed least in the last three steps (EqR). "majority": the one
                that most paths have.
        """

        loss: Literal["stablemax", "softmax"] = "stablemax"
        label_smoothing: float = Field(default=0.0, ge=0, lt=1)
        halting: Literal["halt", "q"] = "halt"
        halting_weight: float = Field(default=0.5, ge=0)
        exploration: float = Field(default=0.1, ge=0, le=1)
        random_start: bool = False
        training_noise: float = Field(default=0.0, ge=0)
        noise_at: Literal["step", "application"] = "step"
        damping: float = Field(default=0.0, ge=0, lt=1)
        candidates: int = Field(default=1, ge=1, le=1024)
        decay: float = Field(default=1.0, gt=0)
        curriculum: tuple[Stage, ...] = ()
        steps: int | None = Field(default=None, ge=1)
        eval_steps: int | None = Field(default=None, ge=1)
        starts: int = Field(default=1, ge=1)
        noise: float = Field(default=0.0, ge=0)
        noise_schedule: Literal["constant", "linear"] = "constant"
        votes: int = Field(default=1, ge=1)
        vote: Vote = "halt"

        @field_validator("curriculum", mode="before")
        @classmethod
        def _from_lists(cls, value: Any) -> Any:
            return tuples(value)

    recursive = True
    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if causal and task.layout == "fill_in":
            raise UsageError("deep_supervision answers all cells at once: set model.causal=false.")
        if task.layout not in ("next_token", "fill_in") or (task.is_language and not causal):
            told = "is a text" if task.is_language else f"has the layout {task.layout}"
            raise UsageError(f"The objective deep_supervision asks for questions with an answer; {task.name} {told}.")
        if task.irregular_times:
            told = f"{task.name}'s steps are at irregular times, which a recursive model does not read"
            raise UsageError(f"{told}: use another objective.")
        if config.vote in ("settled", "majority") and config.starts * config.votes == 1:
            raise UsageError(
                f"deep_supervision: vote={config.vote!r} chooses among several starts: set objective.starts."
            )
        if config.votes > 1 and not (task.layout == "fill_in" and task.n_symmetries > 1):
            raise UsageError(f"deep_supervision: votes={config.votes} needs symmetries, and {task.name} has none.")
        if config.votes > task.n_symmetries:
            told = f"{task.name} has {task.n_symmetries} symmetries, the one that changes nothing among them"
            raise UsageError(f"deep_supervision: votes={config.votes} is too large: {told}.")
        if config.vote == "settled" and config.eval_steps == 1:
            raise UsageError('deep_supervision: vote="settled" compares steps: it needs eval_steps above 1.')
        if config.candidates > 1 and config.training_noise and config.noise_at == "application":
            told = "compares candidates without noise at their applications"
            raise UsageError(f'deep_supervision: candidates={config.candidates} {told}: set noise_at="step".')
        self.in_place = causal or task.layout == "fill_in"
        self.blank = task.vocab_size
        self.vocab_size = task.vocab_size + (not self.in_place)
        self.length = task.seq_len if self.in_place else answered_length(task, self.name)

    def needs(self, draft: ModelConfig) -> Needs:
        found = super().needs(draft)
        if draft.recursion is not None:
            return found
        loop, c = require_loop(draft), self.config
        alone = {"random_start": c.random_start, "candidates": c.candidates > 1, "curriculum": bool(c.curriculum)}
        alone |= {"damping": c.damping > 0, "noise_at": c.noise_at == "application"}
        alone["starts"] = c.starts > 1 and not c.noise
        for option, is_set in alone.items():
            if is_set:
                fix = "set objective.noise" if option == "starts" else "leave it out"
                told = f"is for a recursive model, and loop({loop.count}, ...) starts from its own input: {fix}"
                raise UsageError(f"deep_supervision: {option} {told}.")
        halting = Need(True, "deep_supervision of a loop learns when an answer is right, by a halting head")
        return found._replace(recursion=None, halting=halting)

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
        model = thinker(model)
        targets = torch.full_like(data.tokens, IGNORE)
        targets.view(-1)[data.positions] = data.targets
        new = {"tokens": data.tokens, "targets": targets, **self._fresh(model, data.tokens.shape, generator)}
        if data.puzzles is not None:
            new["puzzles"] = data.puzzles
        own = slice(None) if rows is None else rows
        new = {name: tensor[own] for name, tensor in new.items()}
        n = len(new["tokens"])
        if not carry:
            carry["halted"] = torch.ones(n, dtype=torch.bool, device=data.tokens.device)
            carry["steps"] = torch.zeros(n, dtype=torch.int64, device=data.tokens.device)
            carry.update(new)
            if self.config.curriculum:
                carry["batches"] = torch.zeros_like(carry["steps"])
        halted = carry["halted"]
        for name, tensor in new.items():
            carry[name] = torch.where(halted.view(-1, *[1] * (tensor.ndim - 1)), tensor, carry[name].to(tensor.dtype))
        steps = torch.where(halted, 0, carry["steps"]) + 1
        n_all, seed = len(data.tokens), None
        if self.config.training_noise and self.config.noise_at == "application":
            seed = int(torch.randint(2**62, (), generator=generator))
        elif self.config.training_noise:
            for name in ("answer", "latents"):
                carry[name] = noised(carry[name], self.config.training_noise, generator, n_all, own)
        depth = depth_at(self.config.curriculum, int(carry["batches"][0])) if self.config.curriculum else None
        how = self._how() if depth is None else {"depth": depth, **self._how()}

        split = row_parts(n, parts)
        stops, states = [], []
        for here in split:
            adding = None
            if seed is not None:
                adding = drawn_noise(self.config.training_noise, seed, n_all, torch.arange(n_all)[own][here])
            state, stop, update = self._learn(model, {k: v[here] for k, v in carry.items()}, steps[here], how, adding)
            share = (here.stop - here.start) / len(data.tokens)
            yield replace(update, loss=update.loss * share, share=share, last=here is split[-1])
            stops.append(stop)
            states.append(state)

        n = len(data.tokens)
        explore = torch.rand(n, generator=generator) < self.config.exploration
        most = self._max_steps(model)
        least = explore * torch.randint(2, max(most, 2) + 1, (n,), generator=generator)
        carry["halted"] = (steps >= most) | (torch.cat(stops) & (steps >= least[own].to(steps.device)))
        carry["steps"] = steps
        carry.update(zip(states[0]._fields, map(torch.cat, zip(*states, strict=True)), strict=True))
        if self.config.curriculum:
            carry["batches"] = carry["batches"] + 1

    def _fresh(self, model: Any, shape: torch.Size, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The y and z that new puzzles start from: z is (n, K, ...) where K candidates are."""
        drawn = generator if self.config.random_start else None
        if self.config.candidates == 1:
            return model.init_state(*shape, generator=drawn)._asdict()
        starts = [model.init_state(*shape, generator=drawn, start=k) for k in range(self.config.candidates)]
        return {"answer": starts[0].answer, "latents": torch.stack([start.latents for start in starts], 1)}

    def _learn(
        self,
        model: Any,
        carry: Carry,
        steps: Tensor,
        how: dict[str, Any],
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[State, Tensor, Update]:
        """One supervision step of some places: their next state, which of them may stop, and the mean of their losses.

        Args:
            model: in training mode.
            carry: of these places.
            steps: (n,) supervision steps of each, this one included.
            how: further arguments of `RecursiveModel.think`.
            noise: see there.
        """
        tokens, targets, puzzles = carry["tokens"], carry["targets"], carry.get("puzzles")
        context = Context()
        rows, cells = (targets != IGNORE).nonzero(as_tuple=True)
        expected = targets[rows, cells]
        kind = LoopedState if isinstance(model, LoopedModel) else RecursiveState
        state, others = kind(*(carry[name] for name in kind._fields)), None
        if self.config.candidates > 1:
            state, others = winner(model, carry, self._nats, how)
        noisy = how if noise is None else {**how, "noise": noise}
        thought = model.think(tokens, state, context, puzzles=puzzles, **noisy)
        logits = model.logits(thought.hidden[rows, cells])
        n_cells = torch.bincount(rows, minlength=len(tokens)).clamp(min=1)
        nats = self._nats(logits, expected, self.config.label_smoothing)
        if self.config.decay != 1:
            nats = nats * step_weights(self.config.decay, self._max_steps(model)).to(nats)[steps - 1][rows]
        answers = (nats / n_cells[rows]).sum() / len(tokens)
        said = tokens.clone()
        said[rows, cells] = logits.detach().argmax(-1)
        batch = self._batch(tokens, targets)
        right = self.task.is_right(batch, said[:, -batch.inputs.shape[1] :]).to(tokens.device)
        halting = F.binary_cross_entropy_with_logits(thought.halt, right.to(thought.halt))
        last = steps >= self._max_steps(model)
        stop = self._stops(thought)
        if self.config.halting == "q":
            with torch.no_grad():
                later = model.think(tokens, thought.state, puzzles=puzzles, **how)
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
        after = thought.state if others is None else RecursiveState(thought.state.answer, others)
        return after, stop.detach(), Update(loss, logits, expected, rows, metrics, right=right)

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
        """As for other objectives; backward through the last cycle, or the last update of latent and answer, only.

        Those of the recursion's own depth, to which a `curriculum` comes at last.
        """
        if model.config.recursion is None:
            further = model.flops_per_token(self.length) if self.config.halting == "q" else 0
            return super().training_flops(model, recompute=recompute) + further
        r, forward = model.recursion, model.flops_per_token(self.length)
        learning = 2 if r.gradient == "step" else r.updates + 1
        backward = (3 if recompute else 2) * forward * learning // (r.cycles * (r.updates + 1))
        candidates = self.config.candidates if self.config.candidates > 1 else 0
        return forward * ((2 if self.config.halting == "q" else 1) + candidates) + backward

    def carries(self, carry: Carry, model: Any, n: int) -> bool:
        if not carry:
            return True
        model = thinker(model)
        fresh = self._fresh(model, carry["tokens"].shape) if "tokens" in carry and carry["tokens"].ndim == 2 else {}
        names = {"halted", "steps", "tokens", "targets", *fresh} | {"puzzles"} & carry.keys()
        names |= {"batches"} if self.config.curriculum else set()
        if carry.keys() != names or carry["tokens"].ndim != 2 or len(carry["tokens"]) != n:
            return False
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("halted", "steps", "puzzles", "batches"), (n,))
        shapes |= dict.fromkeys(("tokens", "targets"), carry["tokens"].shape)
        shapes |= {name: leaf.shape for name, leaf in fresh.items()}
        flags = {"halted"} | {name for name, leaf in fresh.items() if leaf.dtype == torch.bool}
        tokens, targets = carry["tokens"], carry["targets"]
        return (
            all(carry[name].shape == shapes[name] for name in names)
            and all(carry[name].dtype == torch.bool for name in flags)
            and all(carry[name].dtype == torch.int64 for name in names - flags - {"answer", "latents"})
            and 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size
            and bool(((targets == IGNORE) | ((targets >= 0) & (targets < self.vocab_size))).all())
        )

    def _nats(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """-log p of each target, (m,), the targets mixed with the uniform distribution."""
        logits = at_least_float32(logits)
        if self.config.loss == "stablemax":  # log s(x) = sign(x) log(1 + |x|), so that softmax of it is stablemax of x
            logits = logits.sign() * logits.abs().log1p()
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
