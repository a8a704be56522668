"""Test-time training: an inner model per head, which every step trains by gradient descent and then asks.

Sun et al. 2024 (arXiv 2407.04620), section 2. The state is the weights of the inner model. Steps come in mini-batches:
all gradients of one are taken at the weights before it, so that they can be computed at once (the paper's dual form).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.ops import common
from zoo.ops.common import blank
from zoo.ops.derivatives import traced
from zoo.states import document_positions, next_position

FEW_STEPS = 1  # decoding
GELU = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the cubic term of its tanh form
LEGEND = (
    "q, k, v (B, T, H, K); rate (B, T, H); spread (n); weights (H, K + 1, K), or (H, K + 1, F) and (H, F + 1, K); "
    "norm twice (H, K); lengths (B,) whole numbers; resets (B, T) bool."
)
Layers = tuple[Tensor, ...]


class InnerState(NamedTuple):
    """Zeros at rest.

    Attributes:
        moved: how far the weights of every layer are from the initial ones, (B, H, ...), at the mini-batch's start.
        gradients: sums of rate times gradient over the steps of the mini-batch, of the same shapes.
        position: (B,) int64, steps of the mini-batch so far, less than n.
    """

    moved: Layers
    gradients: Layers
    position: Tensor


@common.without_autocast
def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    spread: Tensor,
    weights: Layers,
    norm: tuple[Tensor, Tensor],
    state: InnerState | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, InnerState]:
    """W_t = W_b - spread_i sum over the mini-batch's steps s <= t of rate_s dl_s/dW at W_b ; o_t = f(q_t; W_t).

    W_b are the weights after the last step of the mini-batch before, i is the place of t in its own, and
    l_s = |k_s + LayerNorm(f(k_s; W)) - v_s|^2 / 2. f is linear, or two layers with a GELU (its tanh form) between.

    Args:
        q, k, v: (B, T, H, K).
        rate: the inner learning rate of every step, (B, T, H).
        spread: (n,), the factor on the sum at every place of a mini-batch of n steps.
        weights: of the inner model at the start of a document, one or two layers (H, in + 1, out), the bias last.
        norm: weight and bias of the inner LayerNorm, (H, K).
        state: None for rest. Not changed.
        lengths: (B,) valid steps of a right-padded batch; later steps leave the state alone and give zeros.
        resets: (B, T) bool; a document, and a mini-batch, starts where it is true.
        eps: added to the variance in the norm.
        backend: "auto", "reference" (one step at a time) or "chunked" (n steps at a time).
    Returns:
        o (B, T, H, K) in q's dtype, the state after the last step.
    """
    if q.ndim != 4 or 0 in q.shape or spread.ndim != 1 or not len(spread) or len(weights) not in (1, 2):
        raise UsageError(f"ttt: q has shape {tuple(q.shape)}. Expected shapes: {LEGEND}")
    B, T, H, K = q.shape
    inner = weights[0].shape[-1] if len(weights) == 2 else K
    shapes = [(H, K + 1, inner), (H, inner + 1, K)][: len(weights)]
    dtype = common.state_dtype(q, k, v, rate)
    named: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "k": (k, (B, T, H, K)),
        "v": (v, (B, T, H, K)),
        "rate": (rate, (B, T, H)),
        "norm's weight": (norm[0], (H, K)),
        "norm's bias": (norm[1], (H, K)),
        **{f"layer {i} of weights": (w, shapes[i]) for i, w in enumerate(weights)},
    }
    for name, (tensor, shape) in named.items():
        common.check("ttt", LEGEND, name, tensor, q, shape)
        common.check_dtypes("ttt", None, dtype, **{name: tensor})
    lengths = common.check_packing("ttt", LEGEND, q, lengths, resets)
    if state is None:
        start = torch.zeros(B, dtype=torch.int64, device=q.device)
        at_rest = tuple(q.new_zeros(B, *shape, dtype=dtype) for shape in shapes)
        state, cut = InnerState(at_rest, at_rest, start), resets is not None
    else:
        for leaf, shape in zip((*state.moved, *state.gradients), 2 * shapes, strict=True):
            common.check("ttt", LEGEND, "state", leaf, q, (B, *shape))
            common.check_dtypes("ttt", leaf, dtype)
        common.check_counts("ttt", LEGEND, state.position, q)
        cut = resets is not None or traced() or bool(state.position.any())  # else all stand where a mini-batch starts
    form = common.choose_form("ttt", backend, T, FEW_STEPS)

    given = [x.to(dtype) for x in (q, k, v, rate)]
    valid = None if lengths is None else common.valid_steps(lengths, T)
    if valid is not None:
        given = [blank(x, ~valid) for x in given]
        resets = None if resets is None else resets & valid
    positions = document_positions(state.position, T, resets)
    places = positions % len(spread)
    inputs, key, value, rates = (x.transpose(1, 2) for x in given)  # (B, H, T, ...)
    steps = Steps(_with_one(inputs), _with_one(key), value - key, rates, places, resets, valid)
    model = Model(
        tuple(w.to(dtype) for w in weights),
        (norm[0].to(dtype)[:, None], norm[1].to(dtype)[:, None]),
        spread.to(dtype),
        eps,
    )
    if form == "reference":
        o, moved, sums = _reference(steps, model, state)
    else:
        o, moved, sums = _chunked(steps, model, state, cut)
    after = next_position(positions, state.position, lengths) % len(spread)
    o = o.transpose(1, 2).to(q.dtype)
    moved, sums = (tuple(map(common.owned, layers)) for layers in (moved, sums))
    return o if valid is None else blank(o, ~valid), InnerState(moved, sums, after)


class Steps(NamedTuple):
    q: Tensor  # (B, H, T, K + 1), with a 1 for the bias
    k: Tensor  # (B, H, T, K + 1)
    target: Tensor  # (B, H, T, K): v - k, what the norm's output should be
    rate: Tensor  # (B, H, T)
    places: Tensor  # (B, T), each step's place in its mini-batch
    resets: Tensor | None  # (B, T)
    valid: Tensor | None  # (B, T)

    def cut(self, at: slice) -> Steps:
        heads = (x[:, :, at] for x in self[:4])
        return Steps(*heads, *(None if x is None else x[:, at] for x in self[4:]))  # type: ignore[arg-type]


class Model(NamedTuple):
    weights: Layers  # (H, in + 1, out)
    norm: tuple[Tensor, Tensor]  # (H, 1, K)
    spread: Tensor  # (n,)
    eps: float


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


def _slopes(steps: Steps, weights: Layers, model: Model) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer its inputs (B, H, T, in + 1) for the keys, and the loss's gradient by its outputs."""
    inputs, outputs = [steps.k], []
    for i, w in enumerate(weights):
        outputs.append(inputs[i] @ w)
        if i + 1 < len(weights):
            inputs.append(_with_one(F.gelu(outputs[i], approximate="tanh")))
    z, (gain, bias) = outputs[-1], model.norm
    centred = z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + model.eps)
    normed = centred * scale
    d = (gain * normed + bias - steps.target) * gain
    d = (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True)) * scale
    slopes = [d]
    if len(weights) == 2:
        slopes.insert(0, (d @ weights[1][..., :-1, :].mT) * _gelu_slope(outputs[0]))
    return inputs, slopes


def _gelu_slope(x: Tensor) -> Tensor:
    root, cubic = GELU
    tanh = torch.tanh(root * x * (1 + cubic * x * x))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * root * (1 + 3 * cubic * x * x)


def _per_row(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)


def _completed(moved: Layers, sums: Layers, complete: Tensor, spread: Tensor) -> tuple[Layers, Layers]:
    """The weights moved by the sums in the rows whose mini-batch is `complete` (B,), and the sums that go on."""
    done = _per_row(complete)
    moved = tuple(torch.where(done, m - spread[-1] * s, m) for m, s in zip(moved, sums, strict=True))
    return moved, tuple(s.masked_fill(done, 0) for s in sums)


def _reference(steps: Steps, model: Model, state: InnerState) -> tuple[Tensor, Layers, Layers]:
    """The definition, one step at a time."""
    moved, sums, n = state.moved, state.gradients, len(model.spread)
    outputs = []
    for t in range(steps.q.shape[2]):
        now = steps.cut(slice(t, t + 1))
        if now.resets is not None:
            new = _per_row(now.resets)
            moved, sums = (tuple(x.masked_fill(new, 0) for x in layers) for layers in (moved, sums))
        weights = tuple(w + m for w, m in zip(model.weights, moved, strict=True))
        inputs, slopes = _slopes(now, weights, model)
        rate = now.rate[..., None]
        sums = tuple(s + (rate * a).mT * d for s, a, d in zip(sums, inputs, slopes, strict=True))
        share = _per_row(model.spread[now.places])
        x = now.q
        for i, (w, s) in enumerate(zip(weights, sums, strict=True)):
            x = x @ (w - share * s)
            if i + 1 < len(weights):
                x = _with_one(F.gelu(x, approximate="tanh"))
        outputs.append(x)
        complete = now.places[:, 0] == n - 1
        if now.valid is not None:
            complete = complete & now.valid[:, 0]
        moved, sums = _completed(moved, sums, complete, model.spread)
    return torch.cat(outputs, 2), moved, sums


def _chunked(steps: Steps, model: Model, state: InnerState, cut: bool) -> tuple[Tensor, Layers, Layers]:
    """n steps at a time, n the length of a mini-batch.

    Args:
        cut: mini-batches may start within the n steps: at most one where the one before is complete, and any number
            where documents start.
    """
    moved, n = state.moved, len(model.spread)
    sums: Layers | None = state.gradients
    outputs = []
    for first in range(0, steps.q.shape[2], n):
        o, moved, sums = _window(steps.cut(slice(first, first + n)), model, moved, sums, cut)
        outputs.append(o)
    return torch.cat(outputs, 2), moved, tuple(map(torch.zeros_like, moved)) if sums is None else sums


def _window(
    steps: Steps, model: Model, moved: Layers, sums: Layers | None, cut: bool
) -> tuple[Tensor, Layers, Layers | None]:
    """At most n steps. Each belongs to the mini-batch that goes on, to the next one, or to one of a new document.

    `sums` is None where it is known to be zero, as after a whole mini-batch of all rows.
    """
    n, C = len(model.spread), steps.q.shape[2]
    whole = not cut and steps.valid is None and n == C
    known = tuple(map(torch.zeros_like, moved)) if sums is None and not whole else sums or ()
    weights = tuple(w + m for w, m in zip(model.weights, moved, strict=True))
    inputs, slopes = _slopes(steps, weights, model)
    together = torch.ones(C, C, dtype=torch.bool, device=steps.q.device).tril()[None]  # of one mini-batch, s <= t
    bases: list[tuple[Layers, Tensor | None]] = [(weights, None)]
    if cut:
        batch = (steps.places == 0).cumsum(1)
        together = together & (batch[:, :, None] == batch[:, None, :])
        goes_on = batch == batch[:, :1]
        fresh = None if steps.resets is None else steps.resets.cumsum(1) > 0
        if fresh is not None:
            goes_on = goes_on & ~fresh
            bases.append((model.weights, fresh))
            inputs, slopes = _chosen(fresh, _slopes(steps, model.weights, model), (inputs, slopes))
        follows = ~goes_on if fresh is None else ~(goes_on | fresh)
        follows = follows if steps.valid is None else follows & steps.valid
        ended = _per_row(follows.any(1))
        before = _sums(steps.rate * goes_on[:, None], inputs, slopes)
        next_moved = tuple(
            torch.where(ended, m - model.spread[-1] * (s + more), m)
            for m, s, more in zip(moved, known, before, strict=True)
        )
        next_weights = tuple(w + m for w, m in zip(model.weights, next_moved, strict=True))
        bases.append((next_weights, follows))
        inputs, slopes = _chosen(follows, _slopes(steps, next_weights, model), (inputs, slopes))

    share = model.spread[steps.places][:, None, :, None]
    carried = share * goes_on[:, None, :, None] if cut else share
    reach = together[:, None] * steps.rate[:, :, None]
    x = steps.q
    for i, (a, d) in enumerate(zip(inputs, slopes, strict=True)):
        o = x @ bases[0][0][i]
        for other, where in bases[1:]:
            o = torch.where(where[:, None, :, None], x @ other[i], o)  # type: ignore[index]
        o = o - share * ((x @ a.mT * reach) @ d)
        x = o if sums is None else o - carried * (x @ sums[i])
        if i + 1 < len(inputs):
            x = _with_one(F.gelu(x, approximate="tanh"))

    if not cut and steps.valid is None and n == C:
        more = _sums(steps.rate, inputs, slopes)
        total = more if sums is None else tuple(s + m for s, m in zip(sums, more, strict=True))
        return x, tuple(m - model.spread[-1] * s for m, s in zip(moved, total, strict=True)), None

    # the mini-batch of the last valid step
    if steps.valid is None:
        last = torch.full_like(steps.places[:, :1], C - 1)
        some = None
    else:
        count = steps.valid.sum(1, keepdim=True)
        last, some = (count - 1).clamp(min=0), count[:, 0] > 0
    complete = steps.places.gather(1, last)[:, 0] == n - 1
    complete = complete if some is None else complete & some
    if cut:
        rest = (batch == batch.gather(1, last))[:, None]
        stays = _per_row(goes_on.gather(1, last))
        moved = tuple(torch.where(stays, m, new) for m, new in zip(moved, next_moved, strict=True))
        if fresh is not None:
            new = _per_row(fresh.gather(1, last))
            moved = tuple(m.masked_fill(new, 0) for m in moved)
        known = tuple(s.masked_fill(~stays, 0) for s in known)
    more = _sums(steps.rate * rest if cut else steps.rate, inputs, slopes)
    known = tuple(s + m for s, m in zip(known, more, strict=True))
    return x, *_completed(moved, known, complete, model.spread)


def _sums(rate: Tensor, inputs: list[Tensor], slopes: list[Tensor]) -> Layers:
    """Rate (B, H, C) times gradient, summed over steps, of every layer."""
    return tuple((rate[..., None] * a).mT @ d for a, d in zip(inputs, slopes, strict=True))


def _chosen(where: Tensor, new: tuple[list[Tensor], list[Tensor]], old: tuple[list[Tensor], list[Tensor]]):
    """Those of `new` at the steps (B, C) where the mask is true."""
    mask = where[:, None, :, None]
    return tuple(
        [a if a is b else torch.where(mask, a, b) for a, b in zip(*pair, strict=True)]
        for pair in zip(new, old, strict=True)
    )
