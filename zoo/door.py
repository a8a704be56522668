"""The door of every mixer and model: what does not fit is refused there, in one line that says what was expected.

Shapes and types are looked at in every call in eager mode. Values are looked at on a CPU alone, one reduction each, as
a GPU would have to be waited for; there, and in graphs that are traced, lengths are clamped to what there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.core.errors import UsageError

BOUNDLESS = 1 << 20
"""Rows that no state of a bounded number of rows has room for."""
WHOLE = frozenset(
    (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)


# ---- states


class Leaf(NamedTuple):
    """A tensor of a state: its sizes after the batch, None where they may grow, up to `most` where that is not None."""

    sizes: tuple[int | None, ...]
    most: tuple[int | None, ...]
    dtype: torch.dtype | None  # None: any floating-point one; float32: that, or float64 for inputs in float64


class Node(NamedTuple):
    """A tuple, or a NamedTuple, of nodes and leaves."""

    kind: Any  # the type
    parts: tuple[Any, ...]


class Nothing(NamedTuple):
    """What holds no tensor: `()`, or tuples of it."""

    value: tuple[Any, ...]


def form_of(init_state: Callable[..., Any]) -> Node | Leaf | Nothing:
    """What states have in common with those that `init_state` makes."""

    def made(capacity: int) -> Any:
        return init_state(2, capacity=capacity, device="meta", dtype=torch.bfloat16)

    return _form(made(1), made(BOUNDLESS))


def _form(small: Any, large: Any) -> Node | Leaf | Nothing:
    if not tree_leaves(small):
        return Nothing(small)
    if isinstance(small, Tensor):
        sizes = tuple(a if a == b else None for a, b in zip(small.shape[1:], large.shape[1:], strict=True))
        most = tuple(None if b >= BOUNDLESS else b for b in large.shape[1:])
        return Leaf(sizes, most, None if small.dtype == torch.bfloat16 else small.dtype)
    return Node(type(small), tuple(_form(*parts) for parts in zip(small, large, strict=True)))


def fits(form: Any, state: Any, batch_size: int, dtype: torch.dtype) -> bool:
    """Whether a state has the form, for a batch of `batch_size` and inputs in `dtype`. Every step of a decoder asks."""
    if type(form) is Node:
        if type(state) is not form.kind or len(state) != len(form.parts):
            return False
        for part, value in zip(form.parts, state):  # noqa: B905, SIM110  # equally many; written out for its speed
            if not fits(part, value, batch_size, dtype):
                return False
        return True
    if type(form) is Nothing:
        return isinstance(state, tuple) and state == form.value
    if not isinstance(state, Tensor):
        return False
    if state.shape != (batch_size, *form.sizes) and not _has_grown(state.shape, form, batch_size):
        return False
    given = state.dtype
    return given is form.dtype is dtype or _is_of(given, form.dtype, dtype)


def _has_grown(shape: torch.Size, form: Leaf, batch_size: int) -> bool:
    if len(shape) != len(form.sizes) + 1 or shape[0] != batch_size:
        return False
    for size, wanted, most in zip(shape[1:], form.sizes, form.most, strict=True):
        if size != wanted if wanted is not None else most is not None and size > most:
            return False
    return True


def _is_of(given: torch.dtype, wanted: torch.dtype | None, inputs: torch.dtype) -> bool:
    if wanted is None:
        return given.is_floating_point
    if wanted is not torch.float32 or (given is wanted and inputs is not torch.float64):
        return given is wanted
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")  # it may lower what is made of x
    return given is torch.promote_types(wanted, inputs) or (autocast and given.is_floating_point)


def misfit(who: str, form: Any, state: Any, batch_size: int, dtype: torch.dtype) -> UsageError:
    """The error for a state that does not fit, about the first part that does not."""
    if type(form) is Nothing:
        return UsageError(f"{who} takes no state, or (); the one given is {_described(state)}.")
    where = "state"
    while type(form) is Node and type(state) is form.kind and len(state) == len(form.parts):
        parts = zip(form.parts, state, strict=True)
        i = next(i for i, (part, value) in enumerate(parts) if not fits(part, value, batch_size, dtype))
        names = getattr(form.kind, "_fields", None)
        where += f"[{i}]" if names is None else f".{names[i]}"
        form, state = form.parts[i], state[i]
    given, wanted = _clipped(_described(state)), _clipped(_wanted(form, batch_size, dtype))
    return UsageError(f"{who}: {where} is {given}, expected {wanted}, as from init_state({batch_size}).")


def _clipped(text: str, most: int = 140) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _wanted(form: Any, batch_size: int, dtype: torch.dtype) -> str:
    if isinstance(form, Nothing):
        return str(form.value)
    if isinstance(form, Node):
        return _named(form.kind, [_wanted(part, batch_size, dtype) for part in form.parts])
    sizes = [batch_size, *("n" if size is None else size for size in form.sizes)]
    kind = "floating point" if form.dtype is None else _name(form.dtype)
    if form.dtype is torch.float32:
        kind = _name(torch.promote_types(form.dtype, dtype))
    bounds = [f", n <= {most}" for size, most in zip(form.sizes, form.most, strict=True) if size is None and most]
    return f"({', '.join(map(str, sizes))}{',' * (len(sizes) == 1)}) {kind}{''.join(bounds[:1])}"


def _described(state: Any) -> str:
    if isinstance(state, Tensor):
        return f"{tuple(state.shape)} {_name(state.dtype)}"
    if isinstance(state, tuple):
        return _named(type(state), [_described(part) for part in state])
    return f"{type(state).__name__} {state!r:.40}"


def _named(kind: type, parts: list[str]) -> str:
    names = getattr(kind, "_fields", None)
    if names is not None:
        return f"{kind.__name__}({', '.join(f'{n} {p}' for n, p in zip(names, parts, strict=True))})"
    return f"({', '.join(parts)})" if len(parts) <= 3 else f"({parts[0]}, ... {len(parts)} parts)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- what comes with a pass


def check_features(who: str, x: Any, width: int) -> None:
    """x is (B, T, width), floating point, B and T at least 1."""
    if not (isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] == width and x.is_floating_point() and x.numel()):
        wanted = f"(B, T, {width}) floating point, B and T at least 1"
        raise UsageError(f"{who}: x is {_described(x)}, expected {wanted}.")


def check_values(who: str, values: Any, width: int) -> None:
    """Inputs of a model of real vectors are (B, T, width), floating point, B and T at least 1."""
    fits = isinstance(values, Tensor) and values.ndim == 3 and values.shape[2] == width
    if not (fits and values.is_floating_point() and values.numel()):
        wanted = f"(B, T, {width}) floating point, B and T at least 1 (inputs={width})"
        raise UsageError(f"{who}: inputs are {_described(values)}, expected {wanted}.")


def zeroed_padding(who: str, values: Tensor, lengths: Tensor | None) -> Tensor:
    """Real vectors (B, T, D), finite but in the padding, which is set to 0 so that nothing of it is read."""
    if lengths is not None:
        padding = torch.arange(values.shape[1], device=values.device) >= lengths[:, None]
        values = values.masked_fill(padding[..., None], 0.0)
    if (bounds := _bounds(values)) is not None and not (bounds[0] > -math.inf and bounds[1] < math.inf):
        raise UsageError(f"{who}: inputs should be finite numbers; these go {_range(values)}.")
    return values


def read_ids(who: str, what: str, ids: Any, form: str, n: int, why: str) -> Tensor:
    """Whole numbers of any type as int64, each from 0 and below `n`.

    Args:
        who: for the message.
        what: what they are, in the plural.
        ids: what was given.
        form: the names of the axes, "BT" for (B, T); all sizes are at least 1.
        n: how many there are.
        why: the option that says so, for the message.
    """
    if not (_is_whole(ids) and ids.ndim == len(form) and ids.numel()):
        axes = f"({', '.join(form)}{',' * (len(form) == 1)})"
        raise UsageError(f"{who}: {what} are {_described(ids)}, expected {axes} whole numbers, at least one.")
    ids = ids if ids.dtype is torch.int64 else ids.long()
    if torch.compiler.is_compiling():
        return ids.clamp(0, n - 1)
    if (bounds := _bounds(ids)) is not None and not (bounds[0] >= 0 and bounds[1] < n):
        wrong = bounds[0] if bounds[0] < 0 else bounds[1]
        raise UsageError(f"{who}: {wrong} is not among the {what}, which are from 0 to {n - 1} ({why}={n}).")
    return ids


def read_weights(who: str, weights: Tensor, n: int) -> Tensor:
    """Real weights (B, T, n) of tokens.

    Args:
        who: for the message.
        weights: what was given, (B, T, any).
        n: how many tokens there are.
    """
    if weights.shape[-1] != n or not weights.numel():
        raise UsageError(f"{who}: weights of tokens are {tuple(weights.shape)}, expected (B, T, {n}) (vocab_size={n}).")
    return weights


def read_lengths(
    who: str, lengths: Any, batch_size: int, n_steps: int, device: torch.device, name: str = "lengths"
) -> Tensor:
    """Lengths (B,) of any whole-number type as int64 from 0 to T; `name` is that of the field that holds them."""
    if not (_is_whole(lengths) and lengths.shape == (batch_size,) and lengths.device == device):
        what = "valid steps" if name == "lengths" else "prompt's steps"
        wanted = f"({batch_size},) whole numbers on {device}, the {what} of each row"
        raise UsageError(f"{who}: {name} {'are' if name == 'lengths' else 'is'} {_placed(lengths)}, expected {wanted}.")
    lengths = lengths.long()
    if (bounds := _bounds(lengths)) is None:
        return lengths.clamp(0, n_steps)
    if bounds[0] < 0 or bounds[1] > n_steps:
        wrong = bounds[0] if bounds[0] < 0 else bounds[1]
        given = f"a {name.removesuffix('s')} of {wrong} is not allowed"
        raise UsageError(f"{who}: {given}: it should be from 0 to the {n_steps} steps given.")
    return lengths


def check_resets(who: str, resets: Any, batch_size: int, n_steps: int, device: torch.device) -> None:
    """Resets are (B, T) bool."""
    fits = isinstance(resets, Tensor) and resets.dtype == torch.bool and resets.device == device
    if not fits or resets.shape != (batch_size, n_steps):
        wanted = f"({batch_size}, {n_steps}) bool on {device}, true where a document starts"
        raise UsageError(f"{who}: resets are {_placed(resets)}, expected {wanted}.")


def read_places(who: str, tokens: Any, batch_size: int, n_steps: int, device: torch.device) -> Tensor:
    """Tokens (B, T) of any whole-number type as int64; any values, negative ones where a place has no token."""
    if not (_is_whole(tokens) and tokens.shape == (batch_size, n_steps) and tokens.device == device):
        wanted = f"({batch_size}, {n_steps}) whole numbers on {device}"
        raise UsageError(f"{who}: tokens are {_placed(tokens)}, expected {wanted}.")
    return tokens.long()


def read_timespans(
    who: str, timespans: Any, lengths: Tensor | None, batch_size: int, n_steps: int, device: torch.device
) -> Tensor:
    """Timespans (B, T), floating point, finite and not negative but in the padding."""
    fits = isinstance(timespans, Tensor) and not timespans.is_complex() and timespans.dtype != torch.bool
    if not fits or timespans.shape != (batch_size, n_steps) or timespans.device != device:
        wanted = f"({batch_size}, {n_steps}) real numbers on {device}, the time since the step before"
        raise UsageError(f"{who}: timespans are {_placed(timespans)}, expected {wanted}.")
    timespans = timespans if timespans.is_floating_point() else timespans.to(torch.get_default_dtype())
    if _are_spans(timespans):
        return timespans
    if lengths is None or not _are_spans(timespans[torch.arange(n_steps, device=device) < lengths[:, None]]):
        raise UsageError(f"{who}: timespans should be finite numbers from 0; these go {_range(timespans)}.")
    return timespans


def _are_spans(timespans: Tensor) -> bool:
    bounds = _bounds(timespans) if timespans.numel() else None
    return bounds is None or (bounds[0] >= 0 and bounds[1] < math.inf)


def _range(values: Tensor) -> str:
    low, high = (bound.item() for bound in values.detach().aminmax())
    return "to NaN" if math.isnan(low) else f"from {low:g} to {high:g}"


def _is_whole(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in WHOLE


def _placed(value: Any) -> str:
    return f"{_described(value)} on {value.device}" if isinstance(value, Tensor) else _described(value)


def _bounds(tensor: Tensor) -> tuple[Any, Any] | None:
    """The least and the greatest value, where they are at hand: on a CPU, and not while a graph is traced."""
    if not tensor.is_cpu or torch.compiler.is_compiling():
        return None
    try:
        if tensor.numel() == 1:  # as in single steps
            return (tensor.item(),) * 2
        low, high = tensor.detach().aminmax()
        return low.item(), high.item()
    except RuntimeError:  # stand-ins (vmap, fake tensors, make_fx) hold no values to look at
        return None
