"""How a recursive model answers: by one path of supervision steps, or by several of which one is taken."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.models.looped import LoopedState, thinker
from zoo.models.modes import evaluation_mode
from zoo.models.recursive import RecursiveState, Thought
from zoo.objectives.base import Encoded, Frame, Objective, at_least_float32
from zoo.objectives.draws import RowDraws
from zoo.objectives.paths import Attempt, Path, chosen, taken
from zoo.tasks.protocol import IGNORE, Batch

State = RecursiveState | LoopedState
STEPS = 4  # supervision steps of a token model with a loop, by default
WINDOW = 3  # steps over which `vote="settled"` looks, as EqR's authors have it


class Thinking(Objective):
    """The answers of a recursive model, by the options `eval_steps`, `starts`, `noise`, `votes` and `vote` of
    `deep_supervision`."""

    config: Any

    @abstractmethod
    def _nats(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The loss (m,) of logits (m, V) for targets (m,)."""

    def passes(self, model: Any, batch: Batch) -> int:
        return self._n_steps(model) * self.config.starts * self.config.votes

    @torch.no_grad()
    def solve(self, model: Any, batch: Batch) -> Iterator[Frame]:
        """The answers after every supervision step, with their halting values, of the path that `vote` prefers."""
        found = self.paths(model, batch, every_step=True)
        yield from _frames(*(taken(found, self.config.vote, what) for what in ("answers", "halts")))

    @torch.no_grad()
    def solutions(self, model: Any, batch: Batch) -> list[tuple[str, list[Frame]]]:
        """All paths of a batch's only row, the one that is taken first."""
        found = self.paths(model, batch, every_step=True)
        best = int(chosen(found, self.config.vote)[0])
        order = [best, *(k for k in range(len(found)) if k != best)]
        names = [f"path {k + 1}{', taken' if k == best else ''}" if len(found) > 1 else "" for k in order]
        return [(name, list(_frames(found[k].answers, found[k].halts))) for name, k in zip(names, order, strict=True)]

    @torch.no_grad()
    def evaluate(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Answers after the last supervision step, and their mean loss by cell."""
        data = self.encode(batch).to(next(model.parameters()).device)
        logits = taken(self.paths(model, batch), self.config.vote, "logits")
        loss = self._nats(logits.flatten(0, 1)[data.positions], data.targets).mean()
        return self.answer(logits, batch).cpu(), loss

    def answer(self, logits: Tensor, batch: Batch) -> Tensor:
        """Token ids (n, L) in the task's coordinates."""
        answer = logits[:, -batch.inputs.shape[1] :, : self.task.vocab_size].argmax(-1)
        return torch.where((batch.targets != IGNORE).to(answer.device), answer, batch.inputs.to(answer.device))

    # ---- paths

    @torch.no_grad()
    def paths(self, model: Any, batch: Batch, *, every_step: bool = False) -> list[Path]:
        """Where all paths of thinking lead: `starts` of the puzzles, then as many of each of their symmetric forms.

        Under `vote="first"` a row's path ends when its halting head says "right", or when it cannot be the first.

        Args:
            model: in any mode.
            batch: of the task.
            every_step: keep the answers after every step too.
        """
        model = thinker(model)
        data = self.encode(batch).to(next(model.parameters()).device)
        most = torch.full_like(data.tokens[:, 0], self._n_steps(model) + 1) if self.config.vote == "first" else None
        found: list[Path] = []
        with evaluation_mode(model):
            for attempt in self.attempts():
                walked = self.walk(model, data, attempt, most)
                found.append(self._path(model, walked, attempt, batch, every_step))
                most = None if most is None else torch.minimum(most, found[-1].steps)
        return found

    def attempts(self) -> Iterator[Attempt]:
        """Every start of the puzzles, then of each of their symmetric forms."""
        for form in range(self.config.votes):
            for start in range(self.config.starts):
                number = form * self.config.starts + start
                yield Attempt(number, start, self.task.symmetry(form) if form else None)

    def walk(
        self, model: Any, data: Encoded, attempt: Attempt, most: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Thought]]:
        """The rows (m,) that are thought about in each supervision step, and the thought about them.

        The random numbers of a row do not depend on the batch.

        Args:
            model: in evaluation mode.
            data: of all rows.
            attempt: which path.
            most: (n,) steps by which a row has to halt, so that it ends when it has, or cannot; by default all rows
                take all steps.
        """
        model = thinker(model)
        tokens = data.tokens if attempt.symmetry is None else attempt.symmetry.turn(data.tokens)
        draws = RowDraws.of(data).at(None, attempt.number) if self._is_random() or self.config.noise else None
        state = self._start(model, tokens, attempt, draws)
        rows, puzzles = torch.arange(len(tokens), device=tokens.device), data.puzzles
        n_steps = self._n_steps(model)
        for step in range(1, n_steps + 1):
            how = self._how()
            if self.config.noise and draws is not None:
                own = draws.at(None if len(rows) == len(data.tokens) else rows, step)
                deviation = self.config.noise
                if self.config.noise_schedule == "linear":
                    deviation *= (n_steps - step) / max(n_steps - 1, 1)
                adding = _adding(own, deviation)
                if self.config.noise_at == "application":
                    how["noise"] = adding
                else:
                    state = state._replace(answer=adding(state.answer), latents=adding(state.latents))
            thought = model.think(tokens, state, puzzles=puzzles, **how)
            yield rows, thought
            state = thought.state
            if most is not None:
                stay = ~self._stops(thought) & (step < most[rows])
                if not stay.any():
                    return
                rows, tokens, puzzles = rows[stay], tokens[stay], None if puzzles is None else puzzles[stay]
                state = type(state)(*(leaf[stay] for leaf in state))

    def _how(self) -> dict[str, Any]:
        """Further arguments of `RecursiveModel.think` in every supervision step."""
        return {"damping": self.config.damping} if self.config.damping else {}

    def _is_random(self) -> bool:
        """Whether paths start at random: where training does, or where nothing else would tell them apart."""
        c = self.config
        return c.random_start or (c.starts > 1 and not c.noise and c.candidates == 1)

    def _start(self, model: Any, tokens: Tensor, attempt: Attempt, draws: RowDraws | None) -> State:
        start = model.init_state(*tokens.shape, start=attempt.start if self.config.candidates > 1 else 0)
        if draws is None or not self._is_random():
            return start
        return RecursiveState(*(draws.normal(i, *leaf.shape[1:]).to(leaf) for i, leaf in enumerate(start)))

    def _path(
        self, model: Any, walked: Iterator[tuple[Tensor, Thought]], attempt: Attempt, batch: Batch, every_step: bool
    ) -> Path:
        """The end of a path, rows that ended early as they were then."""

        def read(hidden: Tensor) -> Tensor:
            logits = model.logits(hidden)
            turned = attempt.symmetry
            return logits if turned is None else turned.turn_back(logits[..., : self.task.vocab_size])

        recent: deque[Thought] = deque(maxlen=WINDOW + 1 if self.config.vote == "settled" else 1)
        trail: list[tuple[Tensor, Tensor]] = []
        for step, (rows, thought) in enumerate(walked, 1):
            recent.append(thought)
            if step == 1:
                hidden, sure = thought.hidden, thought.halt
                steps = torch.full_like(rows, self._n_steps(model) + 1)
            elif len(rows) == len(steps):
                hidden, sure = thought.hidden, thought.halt
            else:
                hidden, sure = hidden.index_copy(0, rows, thought.hidden), sure.index_copy(0, rows, thought.halt)
            halted = rows[self._stops(thought)]
            steps[halted] = steps[halted].clamp(max=step)
            if every_step:
                trail.append((self.answer(read(hidden), batch), sure))
        logits = read(hidden)
        moved = self.moved(model, recent) if self.config.vote == "settled" else None
        answers, halts = (torch.stack(each) for each in zip(*trail, strict=True)) if trail else (None, None)
        return Path(logits, self.answer(logits, batch), sure, steps, moved, answers, halts)

    def moved(self, model: Any, recent: Sequence[Thought]) -> Tensor:
        """(n,) the mean change of the logits over the latest steps."""
        logits = torch.stack([at_least_float32(model.logits(thought.hidden)) for thought in recent])
        return logits.diff(dim=0).norm(dim=-1).mean((0, 2))

    def _n_steps(self, model: Any) -> int:
        return self.config.eval_steps or self._max_steps(model)

    def _max_steps(self, model: Any) -> int:
        """The largest number of supervision steps of a puzzle in training."""
        recursion = model.config.recursion
        return self.config.steps or (STEPS if recursion is None else recursion.max_steps)

    def _stops(self, thought: Thought) -> Tensor:
        """(n,) bool: whether the halting head says that the answer is right."""
        return thought.halt > (thought.go_on if self.config.halting == "q" else 0)


def _frames(answers: Tensor | None, halts: Tensor | None) -> Iterator[Frame]:
    """Frames of the answers (S, n, L) after every step, and of the logits (S, n) of the halting head."""
    assert answers is not None
    assert halts is not None
    for answer, halt in zip(answers.cpu(), halts.cpu(), strict=True):
        yield Frame(answer, torch.zeros_like(answer, dtype=torch.bool), halt.sigmoid())


def _adding(draws: RowDraws, noise: float) -> Callable[[Tensor], Tensor]:
    """Adds normal noise of this deviation to y or z, another at each call."""
    calls = itertools.count()
    return lambda h: h + noise * draws.normal(next(calls), *h.shape[1:]).to(h)


__all__ = ["WINDOW", "Thinking"]
