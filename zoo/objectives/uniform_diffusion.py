"""Uniform diffusion: random tokens take the place of an answer's, and the whole answer is corrected step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from zoo.models.modes import evaluation_mode
from zoo.objectives.base import Carry, Encoded, Frame, Update, last_of, register
from zoo.objectives.diffusion import (
    Conditioning,
    Diffusion,
    Estimate,
    Noisy,
    cells_of,
    drawn_losses,
    halves_of,
    hit,
    one_hot_with,
    read_piece,
    shares,
    times_of,
    worth_of,
)
from zoo.objectives.draws import RowDraws
from zoo.objectives.gaussian import Curriculum, signal_of, softened
from zoo.ops.common import widest
from zoo.pieces import Pieces
from zoo.protocol import Context
from zoo.tasks.protocol import IGNORE, Batch, Task

_VALUE, _SAMPLE = 5, 6  # purposes of a row's random numbers, beside those of `zoo.objectives.diffusion`


@register("uniform_diffusion")
class UniformDiffusion(Diffusion):
    """Restore an answer some of whose cells hold random tokens, with a loss that bounds the answer's likelihood.

    Each row draws a time t in (0, 1]. Every cell x of its answer keeps its token with the probability a, and holds a
    token z drawn from all K tokens of the task otherwise, a = 1 - (1 - eps) t (Schiff et al. 2024, arXiv 2412.10193,
    UDLM; Sahoo et al. 2025, arXiv 2506.10892, Duo, whose code has these times). The model predicts the token of every
    cell; no cell is marked as noisy. With its prediction p, u = K a [. = x] + 1 - a and v = K a p + 1 - a,

        loss = mean over cells of  (1 - eps) / (K a) * ( K / v_z - K / u_z - sum_j u_j / u_z log(v_j u_z / (v_z u_j)) )

    which is UDLM's equation 18 and the integrand of Duo's bound. What the bound has beyond times from eps on, and the
    divergence from uniform noise at t = 1, are left out, as in Duo's code. The least loss is that of the p which is the
    probability of a cell's token given the noisy tokens of all other cells, without its own.

    With a `curriculum` the first batches have soft inputs in place of random tokens: see `Curriculum`. Its loss is the
    same, with the signal that belongs to the noise level, and the rate at which that signal falls in place of 1 - eps.

    `Diffusion` says which the cells of the answer are. In a puzzle they are read as tokens of their own, so that a
    guess is not taken for a given. The model needs `causal=False`.
    """

    class Config(Estimate, Conditioning):
        """The options; from `steps` on they belong to the sampler.

        Attributes:
            eps: the least time, and the signal that is left at t = 1.
            antithetic: in training, the i-th of n rows draws its time from the i-th of n equal parts of (0, 1], as in
                Duo's code. In evaluation every row has its own time.
            curriculum: learn the first batches from soft inputs, in place of random tokens (Duo's curriculum).
            time_bins: the time is given to the model as a token before the row, one of this number; 0 gives none.
                Duo's network has the exact time in every layer.
            steps: passes for an answer before the last; by default one for each cell of a row's answer.
            tail: the last pass, from time eps to 0. "greedy": the most probable token of every cell (Duo's
                greedy-tail sampler); "ancestral": sampled as in all other passes.
            temperature: divides the logits in the passes before a greedy last one.
        """

        eps: float = Field(default=1e-3, gt=0, lt=0.5)
        antithetic: bool = True
        curriculum: Curriculum | None = None
        time_bins: int = Field(default=32, ge=0)
        steps: int | None = Field(default=None, ge=1)
        tail: Literal["greedy", "ancestral"] = "greedy"
        temperature: float = Field(default=1.0, gt=0)

        @field_validator("curriculum", mode="before")
        @classmethod
        def _from_mapping(cls, value: Any) -> Any:
            return Curriculum.of(value)

    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        self.n_values = task.vocab_size
        self.marked = not task.is_language
        self.first_bin = self.n_values * (1 + self.marked)
        self.vocab_size = self.first_bin + config.time_bins
        self.length += config.time_bins > 0
        if config.curriculum is not None:
            self.levels = config.curriculum.levels_among(self.n_values)

    def updates(
        self,
        model: nn.Module,
        data: Encoded,
        carry: Carry,
        generator: torch.Generator,
        parts: int = 1,
        rows: slice | None = None,
        pieces: Pieces | None = None,
    ) -> Iterator[Update]:
        temperature = self._temperature(carry)
        noisy = self._noise(data, generator) if temperature is None else self._soft(data, generator, temperature)
        yield from self._learned(model, data, noisy, generator, parts, rows, pieces, int(self.config.time_bins > 0))
        if (curriculum := self.config.curriculum) is not None:
            none = torch.zeros(len(data.tokens), dtype=torch.int64)[slice(None) if rows is None else rows]
            done = carry["batches"] if carry else none
            carry["batches"] = (done + 1).clamp(max=curriculum.batches)

    def carries(self, carry: Carry, model: nn.Module, n: int) -> bool:
        if self.config.curriculum is None or not carry:
            return not carry
        return carry.keys() == {"batches"} and carry["batches"].shape == (n,) and carry["batches"].dtype == torch.int64

    def _temperature(self, carry: Carry) -> float | None:
        """That of the next batch's soft inputs; None where it has tokens."""
        curriculum = self.config.curriculum
        return None if curriculum is None else curriculum.temperature(int(carry["batches"][0]) if carry else 0)

    def passes(self, model: nn.Module, batch: Batch) -> int:
        if self.task.is_language:
            return 4 if self.config.self_conditioning else 2
        data = self.encode(batch)
        return int(self._steps(data).max()) + 1 if len(data.positions) else 0

    @torch.no_grad()
    def solve(self, model: nn.Module, batch: Batch) -> Iterator[Frame]:
        """The answers after every pass. No cell is hidden: each holds a token that may still change."""
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            for answer in self._answers(model, data):
                asked, tokens = batch.targets != IGNORE, self.predictions(batch, answer)
                yield Frame(torch.where(asked, tokens, batch.inputs), torch.zeros_like(asked))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions, and the bound on the answer's negative log likelihood in nats for each of its cells.

        Every row's time and noise are from its own stream. A text is not written anew: each half of its cells, drawn
        at random, gets random tokens and is restored beside the other half.
        """
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            answer = last_of(self._answers(model, data))

            def loss(draws: RowDraws) -> Tensor:
                noisy = self._noise(data, draws, worth_of(batch))
                return self._loss(self._noisy_logits(model, noisy, data.timespans)[0], noisy)

            return self.predictions(batch, answer), drawn_losses(data, self.config.loss_draws, loss)

    # ---- noise and loss

    def _noise(self, data: Encoded, source: torch.Generator | RowDraws, worth: Tensor | None = None) -> Noisy:
        """Rows whose answers are noisy, each at a time of its own; see `shares` for `worth`."""
        c, device = self.config, data.tokens.device
        t = (1 - c.eps) * times_of(source, len(data.tokens), c.antithetic) + c.eps
        kept = 1 - (1 - c.eps) * t
        moved = hit(data, source, 1 - kept)
        if isinstance(source, RowDraws):
            values = self._values(source, data.tokens.shape[1]).to(device).flatten()[data.positions]
        else:
            values = torch.randint(self.n_values, (len(data.positions),), generator=source).to(device)
        tokens = data.tokens.clone()
        tokens.view(-1)[data.positions[moved]] = values[moved]
        share = shares(data, torch.ones_like(kept), worth)[data.rows]
        signal = kept.to(device, torch.float32 if widest(device) is torch.float32 else kept.dtype)
        return Noisy(tokens, data.positions, data.targets, data.rows, share, signal)

    def _soft(self, data: Encoded, generator: torch.Generator, temperature: float) -> Noisy:
        """Rows whose answers are soft inputs of this temperature, each at a noise level of its own."""
        c, device = self.config, data.tokens.device
        least, greatest = self.levels
        t = (1 - c.eps) * times_of(generator, len(data.tokens), c.antithetic).double() + c.eps
        level = least + (greatest - least) * t
        signal, by_level = signal_of(level, self.n_values)
        noise = torch.randn(len(data.positions), self.n_values, generator=generator).to(device)
        level, signal, rate = (x.to(device, widest(device)) for x in (level, signal, (least - greatest) * by_level))
        soft = softened(data.targets, level[data.rows], noise, temperature)
        tokens = data.tokens.clone()
        tokens.view(-1)[data.positions] = soft.found
        share = shares(data, torch.ones_like(t), None)[data.rows]
        return Noisy(tokens, data.positions, data.targets, data.rows, share, signal, rate, soft.weights)

    def _values(self, draws: RowDraws, length: int) -> Tensor:
        """(n, length) tokens, each of the task's as probable."""
        return (draws.uniform(_VALUE, length) * self.n_values).long()

    def _loss(self, logits: Tensor, noisy: Noisy) -> Tensor:
        assert noisy.signal is not None
        found = noisy.tokens.flatten()[noisy.positions]
        nats = bound_of(logits.to(widest(logits.device)), found, noisy.targets, noisy.signal[noisy.rows])
        rate = 1 - self.config.eps if noisy.rate is None else noisy.rate[noisy.rows]
        return (rate * nats * noisy.weight).sum().to(torch.promote_types(logits.dtype, torch.float32))

    def _logits(
        self,
        model: Any,
        noisy: Noisy,
        timespans: Tensor | None,
        pieces: Pieces | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Context]:
        tokens, positions = noisy.tokens, noisy.positions
        length = tokens.shape[1]
        if self.marked:
            tokens = tokens.clone()
            tokens.view(-1)[positions] += self.n_values
        if bins := self.config.time_bins:
            assert noisy.signal is not None
            of_row = ((1 - noisy.signal) * bins).long().clamp(0, bins - 1)
            tokens = torch.cat([self.first_bin + of_row[:, None], tokens], 1)
            positions = positions + positions // length + 1
            timespans = None if timespans is None else F.pad(timespans, (1, 0), value=1.0)
        if pieces is not None:
            tokens, positions, timespans = read_piece(pieces, tokens, positions, timespans)
        context, inputs = Context(timespans=timespans, pieces=pieces), tokens
        if self.config.self_conditioning or noisy.soft is not None:
            known = None if before is None else F.pad(before, (0, 0, tokens.shape[1] - length, 0))
            soft, first, size = None, self.n_values * self.marked, model.config.vocab_size
            if noisy.soft is not None:
                soft = positions, F.pad(noisy.soft, (first, size - first - self.n_values))
            inputs, context.tokens = one_hot_with(tokens, known, size, soft), tokens
        hidden, _ = model.features(inputs, None, context)
        logits = model.logits(hidden.flatten(0, 1).index_select(0, positions))
        return logits[:, : self.n_values], context

    # ---- answers

    def _answers(self, model: Any, data: Encoded) -> Iterator[Tensor]:
        """Tokens (n, T) after every pass."""
        draws = RowDraws.of(data)
        cells, noise = cells_of(data), self._values(draws, data.tokens.shape[1]).to(data.tokens.device)
        if not cells.any():
            yield data.tokens
        elif self.task.is_language:
            answer = data.tokens
            signal = torch.full((len(answer),), 0.5, device=answer.device)
            for half in halves_of(cells, draws):
                noisy = torch.where(half, noise, data.tokens)
                logits = self._all_logits(model, noisy, data, signal)
                if self.config.self_conditioning:
                    logits = self._all_logits(model, noisy, data, signal, self._known(logits, cells))
                answer = torch.where(half, logits.argmax(-1), answer)
                yield answer
        else:
            yield from self._ancestral(model, torch.where(cells, noise, data.tokens), data, cells, draws)

    def _steps(self, data: Encoded) -> Tensor:
        """(n,) passes of each row before the last."""
        cells = torch.bincount(data.rows, minlength=len(data.tokens))
        return cells if self.config.steps is None else torch.full_like(cells, self.config.steps)

    def _ancestral(self, model: Any, tokens: Tensor, data: Encoded, cells: Tensor, draws: RowDraws) -> Iterator[Tensor]:
        """Each pass samples every cell from time t to s; each row has its own number of passes."""
        c, steps, before = self.config, self._steps(data), None
        for i in range(int(steps.max()) + 1):
            # The i-th of `steps` equal steps from 1 to eps; the one after them ends at 0.
            t = 1 - (1 - c.eps) * (i / steps.clamp(min=1)).clamp(max=1)
            s = torch.where(steps > i, 1 - (1 - c.eps) * ((i + 1) / steps.clamp(min=1)), 0.0)
            kept_t, kept_s = 1 - (1 - c.eps) * t, 1 - (1 - c.eps) * s
            logits = self._all_logits(model, tokens, data, kept_t, before)
            before = self._known(logits, cells)
            p = posterior((logits / c.temperature).softmax(-1), tokens, kept_s[:, None, None], kept_t[:, None, None])
            u = draws.at(None, i).uniform(_SAMPLE, tokens.shape[1]).to(p)
            below = p.cumsum(-1)
            new = (below < (u * below[..., -1])[..., None]).sum(-1).clamp(max=self.n_values - 1)
            if c.tail == "greedy":
                new = torch.where((steps == i)[:, None], logits.argmax(-1), new)
            tokens = torch.where(cells & (steps >= i)[:, None], new, tokens)
            yield tokens

    def _known(self, logits: Tensor, cells: Tensor) -> Tensor | None:
        """The predictions of a pass at the cells, for the next one."""
        return logits.softmax(-1) * cells[..., None] if self.config.self_conditioning else None

    def _all_logits(
        self, model: Any, tokens: Tensor, data: Encoded, signal: Tensor, before: Tensor | None = None
    ) -> Tensor:
        """Logits (n, T, vocab of the task), of any value where no answer is."""
        noisy = Noisy(tokens, data.positions, data.targets, data.rows, torch.ones(()), signal)
        found, _ = self._logits(model, noisy, data.timespans, None, before)
        logits = found.new_zeros(tokens.numel(), self.n_values)
        logits[data.positions] = found
        return logits.to(widest(logits.device)).unflatten(0, tokens.shape)


def bound_of(logits: Tensor, found: Tensor, targets: Tensor, signal: Tensor) -> Tensor:
    """The integrand of the bound in nats, (m,), for a signal that decays at the rate 1: see `UniformDiffusion`.

    Args:
        logits: (m, K) predictions of the clean tokens.
        found: (m,) the noisy tokens z.
        targets: (m,) the clean tokens x.
        signal: (m,) the probability a that a token was kept, in (0, 1).
    """
    K, a = logits.shape[-1], signal.to(logits)[:, None]
    noise = 1 - a
    v = K * a * logits.softmax(-1) + noise
    log_v = v.log()
    z, x = found[:, None], targets[:, None]
    v_z, log_v_z, log_v_x = v.gather(1, z), log_v.gather(1, z), log_v.gather(1, x)
    most = K * a + noise  # u of the clean token; that of all others is `noise`, and the sum is K
    u_z = torch.where(z == x, most, noise)
    u_log_u = most * most.log() + (K - 1) * noise * noise.log()
    u_log_v = noise * log_v.sum(-1, keepdim=True) + K * a * log_v_x
    divergence = (K * (log_v_z - u_z.log()) + u_log_u - u_log_v) / u_z
    return ((K / v_z - K / u_z + divergence) / (K * a)).squeeze(1)


def posterior(p: Tensor, found: Tensor, kept_s: Tensor, kept_t: Tensor) -> Tensor:
    """Probabilities (..., K) of the tokens at time s, given those at t > s (Duo, equation 3, with p for the clean one).

    Args:
        p: (..., K) prediction of the clean tokens.
        found: (...) the tokens at t.
        kept_s, kept_t: of a shape with that of p, the probabilities that a token is kept until s and until t.
    """
    K, between = p.shape[-1], kept_t / kept_s
    here = F.one_hot(found, K).to(p)
    p_here = p.gather(-1, found[..., None])
    whole = kept_t * K * p * here + (between - kept_t) * here + (kept_s - kept_t) * p
    return (whole + (1 - between) * (1 - kept_s) / K) / (kept_t * K * p_here + 1 - kept_t)
