"""Generation: prompts continued token by token, greedily or by sampling, with a state that is read once per token."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.core.errors import UsageError
from zoo.models.modes import evaluation_mode
from zoo.protocol import Context, first_parameter_like, select

if TYPE_CHECKING:
    from zoo.models.token import TokenModel

PREFILL_CHUNK = 2048
ROOM = 1024  # new tokens that caches have room for at first, where stop tokens may make it far fewer than asked for
DRAWS = 64  # of a row's generator at a time

Generators = torch.Generator | Sequence[torch.Generator]


class NewTokens(NamedTuple):
    """One step of a stream.

    Attributes:
        rows: (n,) int64, the numbers of the prompts that have not ended, in ascending order.
        tokens: (n,) int64, the new token of each of them.
    """

    rows: Tensor
    tokens: Tensor


def generate(
    model: TokenModel,
    prompts: Tensor | Sequence[Any],
    max_new_tokens: int,
    *,
    timespans: Tensor | Sequence[Any] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Sequence[int] = (),
    generator: Generators | None = None,
    prefill_chunk: int | None = PREFILL_CHUNK,
) -> Tensor | list[Tensor]:
    """Prompts continued token by token, in evaluation mode.

    Args:
        prompts: (B, T) token ids, or a list of 1-D prompts of any lengths from 1, each continued as if alone.
        max_new_tokens: the most tokens to add to a prompt.
        timespans: of the prompts' tokens, in the same form, 1 by default; new tokens come at steps of 1.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and sampled.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the fewest most probable tokens that hold this much of the probability that top_k leaves.
        min_p: sample from tokens at least this times as probable as the most probable one.
        stop: token ids that end a row; its result ends with the first of them.
        generator: source of the samples. Row i draws from a stream of its own, seeded by the i-th number of the
            generator, so that its samples do not depend on what the other rows hold, nor on how many follow it.
            A list of generators, one a row, makes each row's samples those of its prompt run alone with its generator.
        prefill_chunk: tokens of the prompts read at a time, None for all at once; the memory needed is that of the
            state, the prompts and one chunk. Outputs agree up to rounding.

    Returns:
        (B, T + max_new_tokens) for prompts (B, T) where there are no stop tokens, otherwise a list of 1-D tensors:
        prompts with their continuations, int64, on the model's device.

    Raises:
        UsageError: a model that is not causal, an empty prompt, an unknown token, timespans of other lengths, a number
            out of its range, more tokens than the model has positions, or logits that are not finite.
    """
    choice = _choice(temperature, top_k, top_p, min_p)
    request = _request(model, prompts, timespans, max_new_tokens, stop, prefill_chunk)
    steps = list(_steps(model, request, choice, generator))
    pieces = _by_row(steps, request.tokens)
    if isinstance(prompts, Tensor) and request.stop is None:
        return torch.cat([request.tokens, torch.stack(pieces)], 1)
    rows = zip(request.tokens, request.lengths, pieces, strict=True)
    return [torch.cat([row[:length], new]) for row, length, new in rows]


def stream(
    model: TokenModel,
    prompts: Tensor | Sequence[Any],
    max_new_tokens: int,
    *,
    timespans: Tensor | Sequence[Any] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Sequence[int] = (),
    generator: Generators | None = None,
    prefill_chunk: int | None = PREFILL_CHUNK,
) -> Iterator[NewTokens]:
    """As `generate`, but an iterator: each step's tokens as soon as they are chosen.

    A row's stop token is its last. Wrong input is refused at once, not when the first token is asked for. The model is
    in evaluation mode from the first token until the iterator ends or is closed; of several at once, until the last of
    them does, and then every module has its own mode back.
    """
    choice = _choice(temperature, top_k, top_p, min_p)
    request = _request(model, prompts, timespans, max_new_tokens, stop, prefill_chunk)
    steps = _steps(model, request, choice, generator)
    return (NewTokens(rows.clone(), tokens.clone()) for rows, tokens in steps)  # fit for training, and the caller's own


# ---- what is asked for


@dataclass(eq=False)
class _Request:
    tokens: Tensor  # (B, T), padded with zeros
    lengths: list[int]
    timespans: Tensor | None  # (B, T)
    n: int
    stop: Tensor | None  # (m,)
    chunk: int


def _request(
    model: TokenModel,
    prompts: Tensor | Sequence[Any],
    timespans: Tensor | Sequence[Any] | None,
    n: int,
    stop: int | Sequence[int],
    chunk: int | None,
) -> _Request:
    if not model.causal:
        raise UsageError("generate reads left to right and needs a model with causal=True.")
    n = _whole("max_new_tokens", n, 0)
    chunk = None if chunk is None else _whole("prefill_chunk", chunk, 1)
    vocab_size, max_len = model.config.vocab_size, model.config.max_len
    device, dtype = first_parameter_like(model, None, None)
    tokens, lengths = _padded(prompts, device)
    low, high = (int(bound) for bound in tokens.aminmax())
    ends = _ends(stop)
    for wrong in [low, high, *ends]:
        if not 0 <= wrong < vocab_size:
            raise UsageError(f"Token {wrong} is not one of the vocab_size={vocab_size} ids, which start at 0.")
    longest = max(lengths)
    if max_len is not None and model.positions is not None and longest + n - 1 > max_len:  # the last is not read
        raise UsageError(f"{longest} prompt tokens and {n} new ones are more than max_len={max_len}.")
    spans = None
    if timespans is not None:
        given = [torch.as_tensor(s, dtype=dtype, device=device) for s in timespans]
        if [s.shape for s in given] != [(length,) for length in lengths]:
            raise UsageError("timespans should be one for every token of every prompt.")
        spans = pad_sequence(given, batch_first=True, padding_value=1.0)
    return _Request(tokens, lengths, spans, n, torch.tensor(ends, device=device) if ends else None, chunk or longest)


def _padded(prompts: Tensor | Sequence[Any], device: torch.device) -> tuple[Tensor, list[int]]:
    """Prompts as (B, T) int64, with their lengths."""
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise UsageError(f"Prompts are (B, T), or a list of 1-D prompts; these have shape {tuple(prompts.shape)}.")
    try:
        given = [prompts] if isinstance(prompts, Tensor) else [torch.as_tensor(p) for p in prompts]
    except (TypeError, ValueError) as error:
        raise UsageError(f"Prompts are token ids, whole numbers, not {prompts!r:.60}.") from error
    for p in given:
        if p.numel() and (p.is_floating_point() or p.is_complex() or p.dtype == torch.bool):
            raise UsageError(f"Prompts are token ids, whole numbers, not {str(p.dtype).removeprefix('torch.')}.")
    if isinstance(prompts, Tensor):
        tokens = prompts.to(device, torch.int64)
        lengths = [tokens.shape[1]] * len(tokens)
    else:
        if any(p.ndim != 1 for p in given):
            raise UsageError("Prompts are (B, T), or a list of 1-D prompts: a single one is written [prompt].")
        lengths = [len(p) for p in given]
    if min(lengths, default=0) < 1:
        raise UsageError("generate needs at least one prompt, each of at least one token.")
    if not isinstance(prompts, Tensor):
        tokens = pad_sequence([p.to(device, torch.int64) for p in given], batch_first=True)
    return tokens, lengths


def _ends(stop: int | Sequence[int]) -> list[int]:
    single = _integer(stop)
    try:
        given: list[int | None] = [_integer(s) for s in stop] if single is None else [single]  # type: ignore[union-attr]
    except TypeError:  # not to be iterated over
        given = [None]
    ends = [end for end in given if end is not None]
    if len(ends) < len(given):
        raise UsageError(f"stop={stop!r:.60} is not allowed: it should be a token id, or a list of them.")
    return ends


def _integer(value: Any) -> int | None:
    """A single whole number of any type, numpy's and torch's included, as Python's; None for all else, bools too."""
    of_bools = isinstance(value, bool) or getattr(value, "dtype", None) in (bool, torch.bool)
    if of_bools or getattr(value, "ndim", None):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _whole(name: str, value: Any, least: int) -> int:
    number = _integer(value)
    if number is None or number < least:
        raise UsageError(f"{name}={value!r:.60} is not allowed: it should be a whole number from {least}.")
    return number


# ---- from state to state


@torch.inference_mode()
def _steps(model: TokenModel, request: _Request, choice: Choice, generator: Generators | None) -> Iterator[NewTokens]:
    """The new tokens, step by step; a row that has ended leaves the batch."""
    rows = torch.arange(len(request.tokens), device=request.tokens.device)
    streams = None if choice.greedy else _Streams(generator, len(rows), rows.device)
    if not request.n:
        return
    with evaluation_mode(model):
        logits, state = _prefill(model, request)
        for t in range(request.n):
            try:
                tokens = choice.take(logits, None if streams is None else streams.draw())
            except NotFinite as error:
                raise NotFinite(error.row, f" for new token {t} of prompt {int(rows[error.row])}") from None
            yield NewTokens(rows, tokens)
            if t + 1 == request.n:
                return
            if request.stop is not None and (ends := torch.isin(tokens, request.stop)).any():
                left = (~ends).nonzero().squeeze(1)
                if not len(left):
                    return
                rows, tokens, state = rows[left], tokens[left], select(state, left)
                if streams is not None:
                    streams.keep(left)
            logits, state = model.step(tokens, state)


def _prefill(model: TokenModel, request: _Request) -> tuple[Tensor, Any]:
    """The logits (B, vocab_size) after the last token of each prompt, and the state there."""
    tokens, chunk = request.tokens, request.chunk
    lengths = torch.tensor(request.lengths, device=tokens.device)
    shortest, longest = min(request.lengths), tokens.shape[1]
    room = request.n if request.stop is None else min(request.n, ROOM)
    state: Any = model.init_state(len(tokens), capacity=longest + room)
    last: Tensor | None = None
    for a in range(0, longest, chunk):
        b = min(a + chunk, longest)
        context = Context(lengths=(lengths - a).clamp(0, b - a) if b > shortest else None)
        if request.timespans is not None:
            context.timespans = request.timespans[:, a:b]
        hidden, state = model.features(tokens[:, a:b], state, context)
        if b < shortest:
            continue
        end = lengths - 1 - a
        found = hidden[torch.arange(len(tokens), device=tokens.device), end.clamp(0, b - a - 1)]
        last = found if last is None else torch.where((end >= 0)[:, None], found, last)
    assert last is not None
    return model.logits(last), state


def _by_row(steps: list[NewTokens], tokens: Tensor) -> list[Tensor]:
    """Each row's new tokens."""
    if not steps:
        return [tokens.new_empty(0)] * len(tokens)
    rows = torch.cat([step.rows for step in steps])
    counts = torch.bincount(rows, minlength=len(tokens)).tolist()
    return list(torch.cat([step.tokens for step in steps])[rows.argsort(stable=True)].split(counts))


# ---- choosing a token


class NotFinite(UsageError):
    """A row of logits that is not finite."""

    def __init__(self, row: int, which: str = ""):
        super().__init__(f"The model's logits{which} are not finite: there is nothing to choose from.")
        self.row = row


def _require_finite(values: Tensor) -> None:
    finite = values.isfinite()
    if not finite.all():
        raise NotFinite(int((~finite).nonzero()[0]))


class Choice(NamedTuple):
    """How tokens are chosen; see `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def take(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """logits (B, vocab_size) and, to sample, numbers (B,) uniform in [0, 1) to tokens (B,).

        Raises:
            NotFinite: a row's logits, of which there is none to choose.
        """
        if uniform is None:
            best, tokens = logits.max(-1)  # not a number where any logit is not
            _require_finite(best)
            return tokens
        p, ids = self.distribution(logits)
        total = p.cumsum(-1)
        _require_finite(total[:, -1])
        below = (uniform * total[:, -1]).clamp(max=torch.nextafter(total[:, -1], total.new_zeros(())))
        index = torch.searchsorted(total, below[:, None], right=True)
        return (index if ids is None else ids.gather(1, index)).squeeze(1)

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is sampled from: float64 weights (B, n), and the tokens (B, n) they belong to, None for all in order."""
        ids = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k)
        elif self.top_p is not None:
            logits, ids = logits.sort(descending=True, stable=True)
        logits = logits.double()
        p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / self.temperature, -1)
        if self.top_p is not None and self.top_p < 1:
            kept = p.cumsum(-1) - p < self.top_p
            p = p * kept
        if self.min_p is not None:
            p = p * (p >= self.min_p * p.amax(-1, keepdim=True))
        return p, ids


def _choice(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Choice:
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, value in {**given, "temperature": temperature}.items():
        if value is None and name != "temperature":
            continue
        if isinstance(value, bool) or not (isinstance(value, Real) or _integer(value) is not None):
            raise UsageError(f"{name}={value!r:.60} is not allowed: it should be a number.")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature} is not allowed: it should be 0 (greedy) or above.")
    top_k = None if top_k is None else _whole("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} is not allowed: it should be above 0 and at most 1.")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UsageError(f"min_p={min_p} is not allowed: it should be from 0 to 1.")
    if temperature == 0 and (named := [f"{k}={v}" for k, v in given.items() if v is not None]):
        raise UsageError(f"{', '.join(named)} chooses among samples: give a temperature above 0 with it.")
    return Choice(temperature, top_k, top_p, min_p)


class _Streams:
    """A stream of uniform numbers for every row, drawn in blocks from generators of their own."""

    def __init__(self, generator: Generators | None, n_rows: int, device: torch.device):
        if generator is None or isinstance(generator, torch.Generator):
            seeds = _seeds(generator, n_rows)
        else:
            if len(generator) != n_rows:
                raise UsageError(f"{len(generator)} generators for {n_rows} prompts: give one, or one for each.")
            seeds = [seed for g in generator for seed in _seeds(g, 1)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device
        self.block = torch.empty(n_rows, 0, dtype=torch.float64, device=device)
        self.used = 0

    def draw(self) -> Tensor:
        """The next number of every row, (B,) float64 in [0, 1)."""
        if self.used == self.block.shape[1]:
            drawn = [torch.rand(DRAWS, generator=g, dtype=torch.float64) for g in self.generators]
            self.block, self.used = torch.stack(drawn).to(self.device), 0
        self.used += 1
        return self.block[:, self.used - 1]

    def keep(self, rows: Tensor) -> None:
        """Only the streams of `rows` from here on."""
        self.block = self.block[rows]
        self.generators = [self.generators[i] for i in rows.tolist()]


def _seeds(generator: torch.Generator | None, n: int) -> list[int]:
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (n,), generator=generator, device=device).tolist()
