"""Generation: prompts continued token by token, greedily or by sampling, with a state that is read once per token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zoo.core.errors import UsageError
from zoo.models.compiled_step import capacity_of, compiled_step, refuse_uncompilable
from zoo.models.modes import evaluation_mode
from zoo.models.sampling import Choice, Generators, NotFinite, Streams, integer, read_choice, whole
from zoo.models.uninitialised import require_numbers
from zoo.protocol import Context, Mixer, State
from zoo.states import select

PREFILL_CHUNK = 2048
ROOM = 1024  # new tokens that caches have room for at first, where stop tokens may make it far fewer than asked for

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Continues(Protocol):
    """What generation needs of a model."""

    causal: bool
    config: Any
    """`vocab_size` and `max_len`."""
    positions: Any
    """Not None where there are no more than `max_len`."""

    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def mixers(self) -> list[Mixer]: ...
    def init_state(self, batch_size: int, *, capacity: int | None = None) -> State: ...
    def features(self, tokens: Tensor, state: State, context: Context | None) -> tuple[Tensor, State]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]: ...


class NewTokens(NamedTuple):
    """One step of a stream.

    Attributes:
        rows: (n,) int64, the numbers of the prompts that have not ended, in ascending order.
        tokens: (n,) int64, the new token of each of them.
    """

    rows: Tensor
    tokens: Tensor


def _begin(
    model: Continues,
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
    prefix: bool | int = False,
    compile: bool = False,
) -> tuple[_Request, Iterator[NewTokens]]:
    """A request of `generate` or `stream`, checked, and the steps that are its answer."""
    choice = read_choice(temperature, top_k, top_p, min_p)
    request = _request(model, prompts, timespans, max_new_tokens, stop, prefill_chunk, prefix, compile)
    return request, _steps(model, request, choice, generator)


def _taking(other: Callable[Given, Any]) -> Callable[[Callable[..., Result]], Callable[Given, Result]]:
    """Decorator of a function that takes what `other` takes: its signature says so."""

    def signed(function: Callable[..., Result]) -> Callable[Given, Result]:
        parameters = list(inspect.signature(other).parameters.values())
        function.__signature__ = inspect.signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return signed


@_taking(_begin)
def generate(*given: Any, **options: Any) -> Tensor | list[Tensor]:
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
        prefix: True reads each prompt in both directions, as a prefix-LM does; a number P reads the first P tokens of
            each in both directions (`Context.prefix`). New tokens are read from left to right. Attention words can
            (mha, mqa, gqa, swa). A prefix is not cut: the first chunk has all of it.
        compile: steps run as one graph of `torch.compile`, which is made at the first step (10 s to a minute, less
            where an earlier process made it) and serves later calls with as many rows and a cache of the same
            capacity: the next power of two of all tokens, 256 at least. Rows that have ended are computed on.

    Returns:
        (B, T + max_new_tokens) for prompts (B, T) where there are no stop tokens, otherwise a list of 1-D tensors:
        prompts with their continuations, int64, on the model's device.

    Raises:
        UsageError: a model that is not causal, a prefix for a word that reads left to right only, an empty prompt, an
            unknown token, timespans of other lengths, a number out of its range, more tokens than the model has
            positions, logits that are not finite, or with `compile` a word or a machine that cannot compile.
    """
    request, steps = _begin(*given, **options)
    pieces = _by_row(list(steps), request.tokens)
    if request.together and request.stop is None:
        return torch.cat([request.tokens, torch.stack(pieces)], 1)
    rows = zip(request.tokens, request.lengths, pieces, strict=True)
    return [torch.cat([row[:length], new]) for row, length, new in rows]


@_taking(_begin)
def stream(*given: Any, **options: Any) -> Iterator[NewTokens]:
    """As `generate`, but an iterator: each step's tokens as soon as they are chosen.

    A row's stop token is its last. Wrong input is refused at once, not at the first token. The model is
    in evaluation mode from the first token until the iterator ends or is closed; of several at once, until the last of
    them does, and then every module has its own mode back.
    """
    _, steps = _begin(*given, **options)
    return (NewTokens(rows.clone(), tokens.clone()) for rows, tokens in steps)  # fit for training, and the caller's own


# ---- what is asked for


@dataclass(eq=False)
class _Request:
    tokens: Tensor  # (B, T), padded with zeros
    together: bool  # given as one tensor
    lengths: list[int]
    timespans: Tensor | None  # (B, T)
    n: int
    stop: Tensor | None  # (m,)
    chunk: int
    prefix: list[int] | None
    compile: bool


def _request(
    model: Continues,
    prompts: Tensor | Sequence[Any],
    timespans: Tensor | Sequence[Any] | None,
    n: int,
    stop: int | Sequence[int],
    chunk: int | None,
    prefix: bool | int,
    compile: bool,
) -> _Request:
    if not model.causal:
        raise UsageError("generate reads left to right and needs a model with causal=True.")
    if not model.config.vocab_size:
        raise UsageError("generate writes tokens, and this model reads real vectors: call it, or its step.")
    require_numbers(model, "generate")
    if not isinstance(compile, bool):
        raise UsageError(f"compile={compile!r:.60} is not allowed: it should be True or False.")
    if compile:
        refuse_uncompilable(cast(nn.Module, model))
    n = whole("max_new_tokens", n, 0)
    chunk = None if chunk is None else whole("prefill_chunk", chunk, 1)
    vocab_size, max_len = model.config.vocab_size, model.config.max_len
    weight = next(p for p in model.parameters() if p.is_floating_point())
    device, dtype = weight.device, weight.dtype
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
    stops = torch.tensor(ends, device=device) if ends else None
    both = _prefixes(model, prefix, lengths)
    return _Request(tokens, isinstance(prompts, Tensor), lengths, spans, n, stops, chunk or longest, both, compile)


def _prefixes(model: Continues, prefix: bool | int, lengths: list[int]) -> list[int] | None:
    """How many first tokens of each prompt are read in both directions, if any."""
    if prefix is False or prefix is True:
        found = lengths if prefix else None
    else:
        n = whole("prefix", prefix, 0)
        if n > min(lengths):
            raise UsageError(f"prefix={n} is not allowed: the shortest prompt has {min(lengths)} tokens.")
        found = [n] * len(lengths)
    if found is not None:
        for mixer in model.mixers():
            if mixer.kind == "sequence" and mixer.causal and not mixer.traits.reads_prefix:
                told = f"{mixer.name} reads left to right only: leave prefix out"
                raise UsageError(f"prefix={prefix} reads prompts in both directions, and {told}.")
    return found


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
    single = integer(stop)
    try:
        given: list[int | None] = [integer(s) for s in stop] if single is None else [single]  # type: ignore[union-attr]
    except TypeError:  # not to be iterated over
        given = [None]
    ends = [end for end in given if end is not None]
    if len(ends) < len(given):
        raise UsageError(f"stop={stop!r:.60} is not allowed: it should be a token id, or a list of them.")
    return ends


# ---- from state to state


@torch.inference_mode()
def _steps(model: Continues, request: _Request, choice: Choice, generator: Generators | None) -> Iterator[NewTokens]:
    """The new tokens, step by step; a row that has ended leaves the batch."""
    rows = torch.arange(len(request.tokens), device=request.tokens.device)
    streams = None if choice.greedy else Streams(generator, len(rows), rows.device)
    if not request.n:
        return
    with evaluation_mode(model):
        logits, state = _prefill(model, request)
        step: Callable[[Tensor, Any], tuple[Tensor, Any]] = model.step
        running = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for t in range(request.n):
            try:
                tokens = choice.take(logits, None if streams is None else streams.draw())
            except NotFinite as error:
                raise NotFinite(error.row, f" for new token {t} of prompt {int(rows[error.row])}") from None
            yield NewTokens(rows[running], tokens[running]) if request.compile else NewTokens(rows, tokens)
            if t + 1 == request.n:
                return
            if request.compile:  # a graph serves one number of rows
                if request.stop is not None:
                    running = running & ~torch.isin(tokens, request.stop)
                    if not running.any():
                        return
                if t == 0:  # after the first token, which waits for no compiler
                    step = compiled_step(model, tokens, state)
                logits, state = step(tokens.clone(), state)
                continue
            if request.stop is not None and (ends := torch.isin(tokens, request.stop)).any():
                left = (~ends).nonzero().squeeze(1)
                if not len(left):
                    return
                rows, tokens, state = rows[left], tokens[left], select(state, left)
                if streams is not None:
                    streams.keep(left)
            logits, state = step(tokens, state)


def _prefill(model: Continues, request: _Request) -> tuple[Tensor, Any]:
    """The logits (B, vocab_size) after the last token of each prompt, and the state there."""
    tokens, chunk = request.tokens, request.chunk
    lengths = torch.tensor(request.lengths, device=tokens.device)
    shortest, longest = min(request.lengths), tokens.shape[1]
    room = request.n if request.stop is None else min(request.n, ROOM)
    capacity = capacity_of(longest + request.n) if request.compile else longest + room
    state: Any = model.init_state(len(tokens), capacity=capacity)
    last: Tensor | None = None
    first = min(max([chunk, *(request.prefix or [])]), longest)
    for a in (0, *range(first, longest, chunk)):
        b = min(a + chunk, longest) if a else first
        context = Context(lengths=(lengths - a).clamp(0, b - a) if b > shortest else None)
        if request.timespans is not None:
            context.timespans = request.timespans[:, a:b]
        if request.prefix is not None and a == 0:
            context.prefix = torch.tensor(request.prefix, device=tokens.device)
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
