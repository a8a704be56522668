"""Masked diffusion: random tokens are masked and predicted from both sides; answers are unmasked step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.needs import Need, Needs
from zoo.models.config import ModelConfig
from zoo.models.modes import evaluation_mode
from zoo.objectives.base import Carry, Encoded, Frame, Update, at_least_float32, last_of, register
from zoo.objectives.diffusion import (
    Conditioning,
    Diffusion,
    Estimate,
    Noisy,
    cells_of,
    drawn_losses,
    guessed_halves,
    hit,
    one_hot_with,
    read_piece,
    shares,
    times_of,
    unmasked_frames,
    weighted_nats,
    worth_of,
)
from zoo.objectives.draws import RowDraws
from zoo.objectives.order_training import NOT_LEARNED, OrderTeacher, OrderTraining, Read, policy_of
from zoo.objectives.unmasking import Unmasking, drawn, plan, remasked_step, step_of
from zoo.ops.common import widest
from zoo.pieces import Pieces
from zoo.protocol import Context
from zoo.tasks.protocol import Batch, Task


@register("masked_diffusion")
class MaskedDiffusion(Diffusion):
    """Predict randomly masked cells from all others, with a loss that bounds the likelihood of the answer.

    Each row draws a time t in (0, 1]. Every cell of its answer is masked with the probability p, and the masked cells
    are predicted from all others (the absorbing-state diffusion of Austin et al. 2021, arXiv 2107.03006):

        loss = mean over rows of  sum over masked cells of w * -log p_model(cell) / (number of cells of the answer)

        "llada"   p = (1 - eps) t + eps,  w = 1 / p      (Nie et al. 2025, arXiv 2502.09992, algorithms 1 and 2)
        "mdlm"    p = (1 - eps) t,        w = 1 / t      (Sahoo et al. 2024, arXiv 2406.07524: log-linear noise)

    The mask token is never predicted, and an unmasked cell stays unmasked (MDLM's SUBS). Known cells are never masked.

    `Diffusion` says which the cells of the answer are. The model needs `causal=False` and one token more than the task.
    """

    class Config(Unmasking, Estimate, Conditioning):
        """The options; those of `Unmasking` belong to the sampler.

        Attributes:
            weighting: weights of the masked cells in the loss.
            eps: the least probability of a mask (llada), or the least time (mdlm).
            antithetic: in training, the i-th of n rows draws its time from the i-th of n equal parts of (0, 1] (MDLM's
                code; its paper spreads them evenly from one draw), not from the whole interval (LLaDA). In evaluation
                every row has its own time.
            random_length: share of batches of a text that are cut to a random length (LLaDA: 0.01).
            prompt_dropout: share of rows whose prompt is masked too, which `guidance` needs.
            unmasking_order: train nothing but the order of unmasking of a model that is trained already: the policy
                `model.unmasking_policy`, by rewards. {} takes the defaults; the order is then "learned".
        """

        weighting: Literal["llada", "mdlm"] = "llada"
        eps: float = Field(default=1e-3, gt=0, lt=1)
        antithetic: bool = True
        random_length: float = Field(default=0.0, ge=0, le=1)
        prompt_dropout: float = Field(default=0.0, ge=0, lt=1)
        unmasking_order: OrderTraining | None = None

        @model_validator(mode="before")
        @classmethod
        def _with_its_order(cls, data: dict[str, Any]) -> dict[str, Any]:
            if data.get("unmasking_order") is None:
                return data
            return {"order": "learned", **data, "unmasking_order": OrderTraining.of(data["unmasking_order"])}

    reads_shifted = True
    config: Config

    def __init__(self, config: Config, task: Task, *, causal: bool):
        super().__init__(config, task, causal=causal)
        if config.guidance and not config.prompt_dropout and not task.is_language:
            raise UsageError("masked_diffusion: guidance needs a model trained with prompt_dropout above 0.")
        self.mask_token = task.vocab_size
        self.vocab_size = task.vocab_size + 1
        if config.unmasking_order is not None:
            if task.is_language:
                raise UsageError(f"unmasking_order learns from right answers, and {task.name} is a text without any.")
            if config.self_conditioning:
                raise UsageError("unmasking_order trains on a model without self_conditioning: leave one of them out.")
            self.trains = "unmasking_policy."

    def needs(self, draft: ModelConfig) -> Needs:
        found = super().needs(draft)
        if self.trains:
            return found._replace(unmasking_policy=Need(True, "unmasking_order trains the model's policy of unmasking"))
        if self.config.order == "learned" and draft.unmasking_policy is None:
            raise UsageError(f'order="learned" is not allowed: {NOT_LEARNED}.')
        return found

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
        c = self.config
        if c.unmasking_order is not None:
            teacher = OrderTeacher(
                self.task, policy_of(model), model, self._reader(model), self.mask_token, c.unmasking_order
            )
            yield from teacher.updates(data, self.rows_of(data), generator, parts)
            return
        if self.task.is_language and c.random_length and torch.rand((), generator=generator) < c.random_length:
            data = _cut(data, int(torch.randint(1, data.tokens.shape[1] + 1, (), generator=generator)))
        noisy = self._noise(data, generator)
        if c.prompt_dropout:
            dropped = (torch.rand(len(data.tokens), generator=generator) < c.prompt_dropout).to(data.tokens.device)
            prompt = torch.ones_like(data.tokens, dtype=torch.bool)
            prompt.view(-1)[data.positions] = False
            noisy = noisy._replace(tokens=noisy.tokens.masked_fill(prompt & dropped[:, None], self.mask_token))
        yield from self._learned(model, data, noisy, generator, parts, rows, pieces)

    def takes_pieces(self) -> bool:
        c = self.config  # a text of random length may have fewer steps than pieces
        return super().takes_pieces() and not (c.random_length or self.trains)

    def training_flops(self, model: Any, *, recompute: bool = False) -> int:
        if (how := self.config.unmasking_order) is None:
            return super().training_flops(model, recompute=recompute)
        data = self.encode(self.task.sample(16, split="train", seed=0))
        passes = -(-len(data.positions) // len(data.tokens))
        reads = model.unmasking_policy.backbone.flops_per_token(self.length)
        return how.group * passes * (model.flops_per_token(self.length) + 4 * reads)

    def passes(self, model: nn.Module, batch: Batch) -> int:
        if self.task.is_language:
            return 4 if self.config.self_conditioning else 2
        data, how = self.encode(batch), self.config
        schedule = plan(torch.bincount(data.rows, minlength=len(data.tokens)), how)
        return schedule.passes(how) * (2 if how.guidance else 1)

    @torch.no_grad()
    def solve(self, model: nn.Module, batch: Batch) -> Iterator[Frame]:
        """The answers after every pass that unmasked something."""
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            yield from unmasked_frames(self._answers(model, data), batch, self.mask_token)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions, and the bound on the answer's negative log likelihood in nats for each of its cells.

        Every row's time and masks are from its own stream. A text is not written anew: each half of its cells, drawn at
        random, is guessed from the other half.
        """
        with evaluation_mode(model):
            data = self.encode(batch).to(next(model.parameters()).device)
            answer = last_of(self._answers(model, data))

            def loss(draws: RowDraws) -> Tensor:
                noisy = self._noise(data, draws, worth_of(batch))
                return self._loss(self._noisy_logits(model, noisy, data.timespans)[0], noisy)

            return self.predictions(batch, answer), drawn_losses(data, self.config.loss_draws, loss)

    def _answers(self, model: Any, data: Encoded) -> Iterator[Tensor]:
        """Tokens (n, T) after every pass, masked where they are still to be found."""
        draws = RowDraws.of(data)
        cells = cells_of(data)
        if self.task.is_language:

            def predict(tokens: Tensor, positions: Tensor) -> Tensor:
                empty = positions[:0]
                return self._noisy_logits(model, Noisy(tokens, positions, empty, empty, empty), data.timespans)[0]

            yield from guessed_halves(predict, data, cells, draws, self.mask_token)
            return
        tokens = data.tokens.masked_fill(cells, self.mask_token)
        if not cells.any():
            yield tokens
        yield from self.unmask(model, tokens, cells, data.timespans, draws)

    # ---- noise

    def _noise(self, data: Encoded, source: torch.Generator | RowDraws, worth: Tensor | None = None) -> Noisy:
        """Rows with cells of their answers masked, each row at a time of its own.

        Args:
            source: of the times and masks: one for the batch, or one a row.
            worth: (n,) of each row in the loss, on the CPU; by default the same for all that have an answer.
        """
        c = self.config
        t = times_of(source, len(data.tokens), c.antithetic)
        if c.weighting == "llada":
            p = (1 - c.eps) * t + c.eps
            weight = 1 / p
        else:
            t = (1 - c.eps) * t + c.eps
            p, weight = (1 - c.eps) * t, 1 / t
        masked = hit(data, source, p)
        tokens = data.tokens.clone()
        tokens.view(-1)[data.positions[masked]] = self.mask_token
        rows = data.rows[masked]
        share = shares(data, weight, worth)[rows]
        return Noisy(tokens, data.positions[masked], data.targets[masked], rows, share)

    def _loss(self, logits: Tensor, noisy: Noisy) -> Tensor:
        return weighted_nats(logits, noisy)

    def _logits(
        self,
        model: Any,
        noisy: Noisy,
        timespans: Tensor | None,
        pieces: Pieces | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Context]:
        hidden, context = self._features(model, noisy.tokens, noisy.positions, timespans, pieces, before)
        return model.logits(hidden)[:, : self.mask_token], context

    def _features(
        self,
        model: Any,
        tokens: Tensor,
        positions: Tensor,
        timespans: Tensor | None,
        pieces: Pieces | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Context]:
        """What `_logits` gives to the head, (m, D), of the cells at `positions` of the flattened tokens (n, T).

        That of a model with `shifted_logits` is from the step before, but at a row's first step (Dream).
        """
        if pieces is not None:
            tokens, positions, timespans = read_piece(pieces, tokens, positions, timespans)
        context = Context(timespans=timespans, pieces=pieces)
        inputs = tokens
        if self.config.self_conditioning:
            inputs = one_hot_with(tokens, before, model.config.vocab_size)
            context.tokens = tokens
        hidden, _ = model.features(inputs, None, context)
        if model.config.shifted_logits and pieces is not None:
            before = pieces.shift(hidden[:, -1:], hidden[:, :1])
            hidden = torch.cat([before, hidden[:, :-1]], 1)
        elif model.config.shifted_logits:
            positions = positions - (positions % tokens.shape[1] > 0).to(positions.dtype)
        return hidden.flatten(0, 1).index_select(0, positions), context

    # ---- unmasking

    @torch.no_grad()
    def unmask(
        self,
        model: Any,
        tokens: Tensor,
        cells: Tensor,
        timespans: Tensor | None = None,
        generator: torch.Generator | RowDraws | None = None,
        how: Unmasking | None = None,
    ) -> Iterator[Tensor]:
        """Answers step by step; each row is computed as if it were alone.

        Rows have blocks and steps of their own, by the number of their cells; a pass of the model serves a step of all.

        Args:
            model: in evaluation mode.
            tokens: (n, T), the mask token at the cells to be filled in.
            cells: (n, T) bool, those cells.
            timespans: (n, T), where the task has irregular times.
            generator: the source of random orders and samples, a stream a row: given, or named by the i-th number of a
                generator on the CPU.
            how: by default as the objective's options say.

        Yields:
            (n, T) tokens after every pass that changed any, with `remasking` after every pass; the last holds no mask.
        """
        how = self.config if how is None else how
        policy = policy_of(model) if how.order == "learned" else None
        draws = generator if isinstance(generator, RowDraws) else RowDraws.drawn(len(tokens), generator)
        schedule = plan(cells.sum(1), how)
        if how.remasking is not None:
            yield from self._remask(model, tokens, cells, timespans, draws, how, schedule.steps)
            return
        block_of = (cells.cumsum(1) - 1) // schedule.size[:, None]
        block, step = torch.full_like(schedule.size, -1), torch.zeros_like(schedule.size)
        cached: tuple[Tensor, Tensor] | None = None  # logits and features of these very tokens
        before: Tensor | None = None
        while (masked := cells & (tokens == self.mask_token)).any():
            now = block_of.masked_fill(~masked, tokens.shape[1]).amin(1)  # the first block with a masked cell
            block, step = now, torch.where(now == block, step + 1, 0)
            inside = cells & (block_of == block[:, None])
            own = draws.at(None, block * schedule.steps + step)
            if how.order == "random" and not drawn(masked & inside, step, schedule.steps, own).any():
                continue
            if cached is None:
                cached = self._guided(model, tokens, cells, timespans, how, before)
            count, mask, (logits, hidden) = inside.sum(1), self.mask_token, cached
            score = None
            if policy is not None:
                score = policy(policy.see(tokens, hidden, logits, masked & inside), timespans)
            new = step_of(tokens, inside, count, logits, step, schedule.steps, how, own, mask, score)
            if not torch.equal(new, tokens):
                before = self._known(before, logits, new, (new != tokens).any(1))
                tokens, cached = new, None
                yield tokens

    def _known(self, before: Tensor | None, logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor | None:
        """The predictions of a pass at the cells that are still masked in its rows (n,), for the next pass.

        Other rows keep those that they had, so that a pass of the others changes nothing for them.
        """
        if not self.config.self_conditioning:
            return None
        p = logits.softmax(-1) * (tokens == self.mask_token)[..., None]
        return torch.where(rows[:, None, None], p, torch.zeros_like(p) if before is None else before)

    def _remask(
        self,
        model: Any,
        tokens: Tensor,
        cells: Tensor,
        timespans: Tensor | None,
        draws: RowDraws,
        how: Unmasking,
        steps: Tensor,
    ) -> Iterator[Tensor]:
        """As `unmask`, with cells that are masked again; every row takes all of its steps."""
        steps = steps.masked_fill(~cells.any(1), 1)
        before: Tensor | None = None
        sure = torch.full(tokens.shape, math.inf, dtype=widest(tokens.device), device=tokens.device)
        for step in range(int(steps[cells.any(1)].max()) if cells.any() else 0):
            logits, _ = self._guided(model, tokens, cells, timespans, how, before)
            own = draws.at(None, step)
            tokens, sure = remasked_step(tokens, cells, logits, sure, step, steps, how, own, self.mask_token)
            before = self._known(before, logits, tokens, steps > step)
            yield tokens

    def _reader(self, model: Any) -> Read:
        def read(tokens: Tensor, timespans: Tensor | None) -> tuple[Tensor, Tensor]:
            return self._guided(model, tokens, torch.zeros_like(tokens), timespans, Unmasking())

        return read

    def _guided(
        self,
        model: Any,
        tokens: Tensor,
        cells: Tensor,
        timespans: Tensor | None,
        how: Unmasking,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (n, T, vocab of the task), with guidance if it is set, and the features (n, T, D) of the same pass."""
        everywhere = torch.arange(tokens.numel(), device=tokens.device)

        def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
            hidden, _ = self._features(model, tokens, everywhere, timespans, None, before)
            return model.logits(hidden)[:, : self.mask_token], hidden

        logits, hidden = read(tokens)
        if how.guidance:
            free, _ = read(tokens.masked_fill(~cells, self.mask_token))
            logits = free + (how.guidance + 1) * (logits - free)
        return at_least_float32(logits).unflatten(0, tokens.shape), hidden.unflatten(0, tokens.shape)


def _cut(data: Encoded, length: int) -> Encoded:
    """The first `length` steps of every row."""
    width = data.tokens.shape[1]
    kept = data.positions % width < length
    positions = data.positions[kept]
    timespans = None if data.timespans is None else data.timespans[:, :length]
    return Encoded(
        data.tokens[:, :length], positions // width * length + positions % width, data.targets[kept], timespans
    )
