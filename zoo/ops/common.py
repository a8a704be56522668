"""What every op shares: checks with one clear message, the choice of a form, and the cut into chunks.

Shape legend: B batch, T time, H heads, G groups (dividing H; R = H / G heads share a group's q and k), K key and
V value width, n chunks of C steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError, unknown
from zoo.ops.derivatives import TRANSFORMED, constant_in_graphs, transformed

P = ParamSpec("P")
Out = TypeVar("Out")

PLAIN = ("reference", "chunked")
"""The forms in plain PyTorch, which every op over chunks has, on every device."""


def state_dtype(*inputs: Tensor) -> torch.dtype:
    """The dtype of an op's state and of its arithmetic: that of its inputs, and float32 at least."""
    return functools.reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)


_log: ContextVar[dict[str, set[str]] | None] = ContextVar("forms", default=None)


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextlib.contextmanager
def logged_forms() -> Iterator[dict[str, set[str]]]:
    """Within it, the forms that every op runs in eager mode gather in the yielded mapping of op to forms."""
    forms: dict[str, set[str]] = {}
    token = _log.set(forms)
    try:
        yield forms
    finally:
        _log.reset(token)


def log_form(op: str, form: str) -> str:
    """Note that `op` runs as `form`, for `logged_forms`; returns `form`."""
    if not torch.compiler.is_compiling() and (forms := _log.get()) is not None:
        forms.setdefault(op, set()).add(form)
    return form


def _decodes() -> bool:
    """Whether a single step may be a decoder's: in eager mode, without gradients, and with nothing that sees operators.

    Then one call of a kernel takes less time than the operators of a step in plain PyTorch.
    """
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack())


def choose_form(
    op: str,
    backend: str,
    n_steps: int,
    few_steps: int,
    offers: Mapping[str, Callable[[], str | None]] = MappingProxyType({}),
    plain: Sequence[str] = PLAIN,
    *,
    decode: str | None = None,
) -> str:
    """The name of the form that runs: the chosen one, or the best available one.

    Args:
        op: name of the op, for messages and the log of forms.
        backend: "auto" or the name of a form.
        n_steps: T.
        few_steps: up to here the step form is the fastest.
        offers: fused forms, the preferred first, each with a function that says why it cannot serve this call, in one
            line, or None where it can.
        plain: forms in plain PyTorch, slowest first.
        decode: which of `offers` is faster than the step form in a decoder's step, None for none.

    Raises:
        UsageError: no such form, or it cannot serve this call: nothing else is run in its place.
    """
    if transformed() and backend not in ("auto", plain[0]):
        raise UsageError(f"{op}: backend='{backend}' does not serve {TRANSFORMED}.")
    if backend == "auto":
        if transformed():
            return log_form(op, plain[0])
        if decode is not None and n_steps == 1 and _decodes() and offers[decode]() is None:
            return log_form(op, decode)
        served = (name for name, why_not in offers.items() if why_not() is None)
        return log_form(op, plain[0] if n_steps <= few_steps else next(served, plain[-1]))
    if backend in offers and (why_not := offers[backend]()) is not None:
        raise UsageError(f"{op}: backend='{backend}' cannot run here: {why_not}.")
    if backend not in (*plain, *offers):
        raise unknown("backend", backend, ["auto", *plain, *offers])
    return log_form(op, backend)


def chunk_length(chunk_size: int | None, default: int, n_steps: int) -> int:
    """Steps per chunk: a power of two (a chunk's decays are built by doubling), no longer than T needs."""
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise UsageError(f"chunk_size={chunk_size!r} is not allowed: it should be a whole number of steps, at least 1.")
    wanted = min(chunk_size or default, n_steps)
    return 1 << (wanted - 1).bit_length()


LEGEND = (
    "q, k (B, T, G, K) with G dividing H; v (B, T, H, V); log_decay (B, T, H) or (B, T, H, K); beta (B, T, H); "
    "state (B, H, K, V); lengths (B,) whole numbers; resets (B, T) bool."
)


def check(op: str, legend: str, name: str, tensor: Tensor | None, like: Tensor, *shapes: tuple[int, ...]) -> None:
    """`tensor` (None passes) has one of `shapes` and lies on the device of `like`, else a `UsageError`."""
    if tensor is None:
        return
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(s) for s in shapes)
        raise UsageError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {wanted}. Shapes: {legend}")
    if tensor.device != like.device:
        raise UsageError(f"{op}: {name} is on {tensor.device}, the other inputs are on {like.device}.")


def check_dtypes(op: str, state: Tensor | None, dtype: torch.dtype, **inputs: Tensor | None) -> None:
    """Inputs are real floating point, and the state has the dtype that the op returns it in."""
    for name, tensor in inputs.items():
        if tensor is not None and not tensor.is_floating_point():
            raise UsageError(f"{op}: {name} is {tensor.dtype}, expected a floating-point tensor.")
    _check_state_dtype(op, state, dtype)


def check_numbers(op: str, state: Tensor | None, dtype: torch.dtype, **inputs: Tensor) -> None:
    """Inputs are real floating point or complex, and the state has the dtype that the op returns it in."""
    for name, tensor in inputs.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise UsageError(f"{op}: {name} is {tensor.dtype}, expected a floating-point or complex tensor.")
    _check_state_dtype(op, state, dtype)


def _check_state_dtype(op: str, state: Tensor | None, dtype: torch.dtype) -> None:
    if state is not None and state.dtype != dtype:
        why = "complex as the inputs" if dtype.is_complex else "float32, or float64 for float64 inputs"
        raise UsageError(f"{op}: state is {state.dtype}, expected {dtype}: {why}.")


def check_packing(op: str, legend: str, x: Tensor, lengths: Tensor | None, resets: Tensor | None) -> Tensor | None:
    """`lengths` (B,) counts the steps of x (B, T, ...), `resets` (B, T) is a mask.

    Returns:
        The lengths as int64 from 0 to T, so that no form and no kernel reaches beyond its memory.
    """
    check(op, legend, "lengths", lengths, x, tuple(x.shape[:1]))
    check(op, legend, "resets", resets, x, tuple(x.shape[:2]))
    if lengths is not None and (lengths.is_floating_point() or lengths.dtype == torch.bool):
        raise UsageError(f"{op}: lengths is {lengths.dtype}, expected the whole number of valid steps of each row.")
    if resets is not None and resets.dtype != torch.bool:
        raise UsageError(f"{op}: resets is {resets.dtype}, expected bool, true where a document starts.")
    return None if lengths is None else lengths.long().clamp(0, x.shape[1])


def check_counts(op: str, legend: str, counts: Tensor, like: Tensor) -> None:
    """The `length` of a state is (B,) int64."""
    check(op, legend, "state.length", counts, like, tuple(like.shape[:1]))
    if counts.dtype != torch.int64:
        raise UsageError(f"{op}: state.length is {counts.dtype}, expected torch.int64.")


class Heads(NamedTuple):
    """The inputs of a recurrence over heads, checked, in its arithmetic's dtype, heads cut into (G, R)."""

    q: Tensor  # (B, T, G, K)
    k: Tensor  # (B, T, G, K)
    v: Tensor  # (B, T, G, R, V)
    g: Tensor | None  # (B, T, G, R, K), or (B, T, G, R, 1) for one decay a head
    beta: Tensor | None  # (B, T, G, R, 1)
    state: Tensor  # (B, G, R, K, V)
    resets: Tensor | None  # (B, T)


def prepare_heads(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    beta: Tensor | None = None,
) -> Heads:
    """Check the arguments of an op over heads and bring them into one form, padded steps blanked out.

    A blank step (k, g, beta and its reset all zero) leaves the state as it is; q is zero there, so its output is too.
    """
    if q.ndim != 4 or v.ndim != 4 or 0 in q.shape or 0 in v.shape or v.shape[2] % q.shape[2]:
        raise UsageError(f"{op}: q {tuple(q.shape)} and v {tuple(v.shape)} do not go together. Shapes: {LEGEND}")
    (B, T, H, V), (G, K) = v.shape, q.shape[2:]
    check(op, LEGEND, "q", q, v, (B, T, G, K))
    check(op, LEGEND, "k", k, v, (B, T, G, K))
    check(op, LEGEND, "log_decay", log_decay, v, (B, T, H), (B, T, H, K))
    check(op, LEGEND, "beta", beta, v, (B, T, H))
    check(op, LEGEND, "state", state, v, (B, H, K, V))
    lengths = check_packing(op, LEGEND, v, lengths, resets)
    dtype = state_dtype(q, k, v)
    check_dtypes(op, state, dtype, q=q, k=k, v=v, log_decay=log_decay, beta=beta)

    if state is None:
        state = v.new_zeros(B, H, K, V, dtype=dtype)
    padding = None if lengths is None else ~valid_steps(lengths, T)
    if resets is not None and padding is not None:
        resets = resets & ~padding

    def cleaned(x: Tensor) -> Tensor:
        return x.to(dtype) if padding is None else blank(x.to(dtype), padding)

    def per_head(x: Tensor) -> Tensor:
        return cleaned(x).reshape(B, T, G, H // G, -1)

    g = None if log_decay is None else per_head(log_decay)
    beta = None if beta is None else per_head(beta)
    return Heads(cleaned(q), cleaned(k), per_head(v), g, beta, state.unflatten(1, (G, H // G)), resets)


def valid_steps(lengths: Tensor, n_steps: int) -> Tensor:
    """(B,) -> (B, T) bool, true at the steps of each row that are not padding."""
    return torch.arange(n_steps, device=lengths.device) < lengths[:, None]


def blank(x: Tensor, where: Tensor) -> Tensor:
    """x (B, T, ...) with zeros where the mask (B, T) is true, whatever x holds there; the same for (B, ...), (B,)."""
    return x.masked_fill(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), 0)


def owned(x: Tensor) -> Tensor:
    """A copy of x laid out as any fresh tensor, for states.

    A view of a longer tensor would keep all of that, and other strides, be it those of an axis of one, would have a
    compiled decoder compiled anew.
    """
    return x.clone(memory_format=torch.contiguous_format)


def to_chunks(x: Tensor, chunk: int, value: float = 0.0) -> Tensor:
    """(B, T, heads..., D) -> (n, B, heads..., C, D), the last chunk filled up with `value`.

    Chunks come first so that the loop over them reads and writes whole blocks of memory.
    """
    if missing := -x.shape[1] % chunk:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing), value=value)
    x = x.unflatten(1, (-1, chunk))
    return x.movedim(1, 0).movedim(2, -2).contiguous()


def from_chunks(x: Tensor, n_steps: int) -> Tensor:
    """(n, B, heads..., C, D) -> (B, T, heads..., D): undoes `to_chunks`."""
    return x.movedim(-2, 2).movedim(0, 1).flatten(1, 2)[:, :n_steps]


def chunk_decays(heads: Heads, chunk: int) -> Tensor | None:
    """exp(g), zero where a document starts, as (n, B, G, R, C, K or 1); None where nothing is ever forgotten."""
    g, resets = heads.g, heads.resets
    if g is None and resets is None:
        return None
    a = heads.v.new_ones(*heads.v.shape[:2], 1, 1, 1) if g is None else g.exp()
    return to_chunks(a if resets is None else blank(a, resets), chunk, value=1.0)


@constant_in_graphs  # torch 2.11 does not trace the question
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(function: Callable[P, Out]) -> Callable[P, Out]:
    """Run with autocast off, so that only inputs that come in low precision are multiplied in low precision."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Out:
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if device is None or not _has_autocast(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
