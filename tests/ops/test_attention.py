"""Attention against its definition written out with loops, its forms against each other, and its cache."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.core.errors import UsageError
from zoo.ops import attention, rotary_table, rotary_width, rotate
from zoo.ops.kv_cache import KVCache, append, init_cache
from zoo.states import canonical

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMS = ["reference", "chunked", "sdpa", "auto"]
OPTIONS = {
    "causal": {},
    "grouped": {"shape": (4, 2, 6, 6)},
    "one group, values wider": {"shape": (4, 1, 5, 8)},
    "values narrower": {"shape": (2, 2, 8, 3)},
    "window": {"window": 7, "shape": (4, 2, 6, 6)},
    "window of one": {"window": 1},
    "window beyond": {"window": 5000},
    "sinks and softcap": {"sinks": True, "softcap": 1.5, "shape": (4, 2, 6, 6)},
    "sinks": {"sinks": True, "shape": (4, 2, 6, 6), "scale": 0.3},
    "sinks, values wider": {"sinks": True, "shape": (2, 1, 5, 8)},
    "all ways, sinks": {"causal": False, "sinks": True, "shape": (2, 2, 6, 3)},
    "sinks in a window": {"sinks": True, "window": 6},
    "scale": {"scale": 0.3},
    "packed": {"packed": True, "shape": (4, 2, 6, 5)},
    "packed, ragged, window": {"packed": True, "ragged": True, "window": 5},
    "ragged": {"ragged": True},
    "all ways": {"causal": False, "shape": (4, 2, 6, 6)},
    "all ways, window": {"causal": False, "window": 4},
    "all ways, packed, ragged": {"causal": False, "packed": True, "ragged": True, "softcap": 2.0},
    "all ways, packed, window": {"causal": False, "packed": True, "window": 6, "sinks": True},
}


def make(T: int, options: dict, B: int = 3, dtype=torch.float64) -> tuple[list[Tensor], dict]:
    """q, k, v and the keyword arguments that `options` stand for."""
    options = dict(options)
    H, G, K, V = options.pop("shape", (2, 2, 6, 6))
    generator = torch.Generator().manual_seed(T)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    if options.pop("sinks", False):
        options["sinks"] = noise(H).requires_grad_()
    if options.pop("packed", False):
        options["resets"] = torch.rand(B, T, generator=generator) < 0.15
    if options.pop("ragged", False):
        options["lengths"] = torch.tensor([T, 0, (T + 1) // 2])[:B]
    qkv = [noise(B, T, H, K), 2 * noise(B, T, G, K), noise(B, T, G, V)]
    return [x.requires_grad_() for x in qkv], options


def by_loops(
    q, k, v, *, causal=True, window=None, sinks=None, softcap=None, lengths=None, resets=None, scale=None
) -> Tensor:
    """The definition, one query at a time, keys sought out one by one."""
    B, T, H, K = q.shape
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        document = torch.zeros(T, dtype=torch.int64) if resets is None else resets[b].long().cumsum(0)
        for t, h in itertools.product(range(n), range(H)):
            seen = [
                s
                for s in range(n)
                if document[s] == document[t] and (s <= t or not causal) and (window is None or abs(t - s) < window)
            ]
            g = h // (H // k.shape[2])
            logits = k[b, seen, g] @ q[b, t, h] * (K**-0.5 if scale is None else scale)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            weights = logits.exp()
            total = weights.sum() + (0 if sinks is None else sinks[h].exp())
            o[b, t, h] = (weights / total) @ v[b, seen, g]
    return o


def gradients(o: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    return torch.autograd.grad((o * weights).sum(), inputs)


def inputs_of(qkv: list[Tensor], options: dict) -> list[Tensor]:
    return [*qkv, options["sinks"]] if "sinks" in options else qkv


def serves(form: str, options: dict) -> bool:
    return form != "sdpa" or not ({"sinks", "softcap"} & set(options))


def close(actual, expected, tolerance=1e-9):
    """The error is at most `tolerance` of the largest value, or of 1 where that is smaller."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_is_the_definition(name):
    qkv, options = make(19, OPTIONS[name])
    expected = by_loops(*qkv, **options)
    expected_gradients = gradients(expected, inputs_of(qkv, options))
    for form in FORMS:
        if not serves(form, options):
            continue
        for chunk_size in (None, 1, 5) if form == "chunked" else (None,):
            o, state = attention(*qkv, **options, backend=form, chunk_size=chunk_size)
            close(o, expected)
            for actual, wanted in zip(gradients(o, inputs_of(qkv, options)), expected_gradients, strict=True):
                close(actual, wanted)
            assert (state == ()) == (not options.get("causal", True))


@pytest.mark.parametrize("T", [1, 63, 64, 100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["grouped", "sinks", "window", "sinks and softcap", "packed, ragged, window", "all ways, window"]
)
def test_forms_agree_at_length(name, T):
    qkv, options = make(T, OPTIONS[name])
    expected, _ = attention(*qkv, **options, backend="reference")
    expected_gradients = gradients(expected, inputs_of(qkv, options))
    for form, dtype in itertools.product(FORMS[1:], (torch.float64, torch.float32)):
        if not serves(form, options):
            continue
        cast = [x.detach().to(dtype).requires_grad_() for x in qkv]
        given = {**options}
        if "sinks" in given:
            given["sinks"] = given["sinks"].detach().to(dtype).requires_grad_()
        o, _ = attention(*cast, **given, backend=form)
        assert o.dtype == dtype
        tolerance = 1e-9 if dtype == torch.float64 else 2e-5
        close(o.double(), expected, tolerance)
        for actual, wanted in zip(gradients(o, inputs_of(cast, given)), expected_gradients, strict=True):
            close(actual.double(), wanted, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    qkv, options = make(64, OPTIONS["grouped"])
    qkv = [x.detach().bfloat16() for x in qkv]
    expected, _ = attention(*(x.double() for x in qkv), **options, backend="reference")
    o, state = attention(*qkv, **options, backend=form)
    assert o.dtype == state.k.dtype == torch.bfloat16
    close(o.double(), expected, 2e-2)


# ---- no matrix of T x T


class Largest(TorchDispatchMode):
    """Records the ops that run and the largest tensor any of them gives."""

    def __init__(self):
        super().__init__()
        self.numel, self.ops = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.add(func.overloadpacket.__name__)
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize(
    "options", [{"window": 64}, {"sinks": True}, {"softcap": 5.0}, {"packed": True}, {"causal": False, "ragged": True}]
)
def test_memory_is_linear(options):
    T = 3000
    qkv, options = make(T, {**options, "shape": (2, 1, 4, 4)}, B=1)
    with Largest() as seen:
        o, _ = attention(*qkv, **options)
        gradients(o, qkv)
    assert seen.numel <= 2 * T * 128


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (2, 2, 8, 3), (2, 1, 3, 8), (2, 2, 7, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_is_one_kernel(shape, causal):
    qkv, options = make(64, {"shape": shape, "causal": causal})
    with Largest() as seen:
        attention(*qkv, **options)
    assert "_scaled_dot_product_flash_attention_for_cpu" in seen.ops


# ---- the cache

STATEFUL = ["grouped", "one group, values wider", "window", "window of one", "window beyond", "sinks in a window"]
PACKED = ["packed", "packed, ragged, window", "ragged"]


def run(qkv, cuts, state=None, **options):
    """q, k, v cut into pieces of `cuts` steps, each from the state of the one before."""
    outputs, a = [], 0
    lengths, resets = options.pop("lengths", None), options.pop("resets", None)
    for n in cuts:
        o, state = attention(
            *(x[:, a : a + n] for x in qkv),
            state,
            lengths=None if lengths is None else (lengths - a).clamp(0, n),
            resets=None if resets is None else resets[:, a : a + n],
            **options,
        )
        outputs.append(o)
        a += n
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STATEFUL + PACKED)
def test_any_cut(name, form):
    T = 23
    qkv, options = make(T, OPTIONS[name])
    if not serves(form, options):
        pytest.skip("sdpa knows no sinks")
    (_, _, G, K), V = qkv[1].shape, qkv[2].shape[-1]
    expected, last = run(qkv, [T], **options)
    wanted = gradients(expected, inputs_of(qkv, options))
    for cuts in ([1] * T, [5, 1, 9, 8], [22, 1], [1, 22]):
        o, state = run(qkv, cuts, **options, backend=form)
        close(o, expected)
        for a, b in zip(gradients(o, inputs_of(qkv, options)), wanted, strict=True):
            close(a, b)
        rooms = list(itertools.product((None, T, 1), (True, False)))
        for capacity, grad in rooms if cuts == [5, 1, 9, 8] else rooms[-1:]:
            empty = init_cache(3, G, K, V, capacity=capacity, window=options.get("window"), dtype=torch.float64)
            with torch.set_grad_enabled(grad):
                o, state = run(qkv, cuts, empty, **options, backend=form)
            close(o, expected)
            assert torch.equal(state.length, last.length)
            for a, b in zip(canonical(state), canonical(last), strict=True):
                close(a, b)


def test_canonical_keeps_what_is_seen_in_order_of_time():
    k = torch.arange(1.0, 9)[None, :, None, None].expand(2, 8, 1, 1).clone()
    _, ring = attention(k, k, k, window=5, lengths=torch.tensor([8, 3]))
    assert ring.k[:, :, 0, 0].tolist() == [[6, 7, 8, 4, 5], [1, 2, 3, 0, 0]]  # position p in row p % 5
    assert ring.length.tolist() == [8, 3]
    assert canonical(ring).k[:, :, 0, 0].tolist() == [[4, 5, 6, 7, 8], [1, 2, 3, 0, 0]]
    _, short = attention(k[1:, :3], k[1:, :3], k[1:, :3], init_cache(1, 1, 1, 1, window=5), window=5)
    assert canonical(short).k.shape[1] == 3


def test_a_reset_starts_again_at_row_zero():
    k = torch.arange(1.0, 9)[None, :, None, None]
    cache = append(init_cache(1, 1, 1, 1, capacity=8), k, k)
    resets = torch.tensor([[False, True, False, True, False]])
    cache = append(cache, 10 * k[:, :5], 10 * k[:, :5], resets=resets)
    assert cache.length.tolist() == [2]
    assert cache.k.flatten().tolist() == [40, 50, 0, 0, 0, 0, 0, 0]


def test_an_earlier_document_is_never_seen():
    qkv, _ = make(9, {})
    loud = [x * 1e6 for x in make(30, {})[0]]
    for window in (None, 4):
        _, state = attention(*loud, window=window)
        resets = torch.zeros(3, 9, dtype=torch.bool)
        resets[:, 0] = True
        expected, last = attention(*qkv, window=window)
        for cuts in ([9], [1] * 9):
            o, after = run(qkv, cuts, state, window=window, resets=resets)
            close(o, expected)
            for a, b in zip(canonical(after), canonical(last), strict=True):
                close(a, b)


@torch.no_grad()
def test_steps_are_written_in_place_and_the_cache_doubles():
    (q, k, v), _ = make(300, {}, B=1)
    cache, rows = init_cache(1, 2, 6, 6, dtype=torch.float64), set()
    for t in range(300):
        before = cache
        o, cache = attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache)
        rows.add(cache.k.shape[1])
        assert (cache.k.data_ptr() == before.k.data_ptr()) == (t != 256)
    assert rows == {256, 512}
    assert not cache.k[:, 300:].any()
    close(o, attention(q, k, v)[0][:, -1:])


@torch.no_grad()
def test_a_ring_stops_growing():
    (q, k, v), _ = make(100, {}, B=1)
    cache = init_cache(1, 2, 6, 6, capacity=2, window=20, dtype=torch.float64)
    sizes = []
    for t in range(100):
        _, cache = attention(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], cache, window=20)
        sizes.append(cache.k.shape[1])
    assert sorted(set(sizes)) == [2, 4, 8, 16, 20]
    assert init_cache(1, 2, 6, 6, window=20).k.shape[1] == 20


@pytest.mark.parametrize("window", [None, 8])
def test_inputs_are_never_written(window):
    """Not even through the cache that a first pass returns and a later step consumes."""
    (q, k, v), _ = make(8, {})
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            held = [x.detach().clone() for x in (q, k, v)]
            _, state = attention(*held, window=window)
            with torch.no_grad():
                for _ in range(3):
                    _, state = attention(q[:, :1], k[:, :1], v[:, :1], state, window=window)
            assert all(torch.equal(a, b) for a, b in zip(held, (q, k, v), strict=True))


def test_with_gradients_the_state_stays_as_it_is():
    qkv, _ = make(12, {})
    _, state = attention(*(x[:, :8] for x in qkv), window=6)
    kept = [x.detach().clone() for x in state]
    attention(*(x[:, 8:] for x in qkv), state, window=6)
    with torch.no_grad():
        attention(*(x[:, 8:9] for x in qkv), state, window=6)  # these keys belong to a graph
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_the_cache_keeps_its_dtype():
    qkv, _ = make(10, {})
    qkv = [x.detach().float() for x in qkv]
    expected, _ = attention(*qkv)
    for cuts in ([10], [1] * 10, [4, 6]):
        o, state = run(qkv, cuts, init_cache(3, 2, 6, 6, dtype=torch.bfloat16))
        assert o.dtype == torch.float32
        assert state.k.dtype == state.v.dtype == torch.bfloat16
        close(o, expected, 2e-2)
        if cuts == [10]:
            whole = o
        close(o, whole, 2e-5)  # keys are rounded at once, so that no cut shows


def test_padding_may_hold_anything():
    for causal in (True, False):
        qkv, options = make(12, {"ragged": True, "causal": causal})
        expected, _ = attention(*qkv, **options)
        padding = torch.arange(12) >= options["lengths"][:, None]
        spoiled = [x.detach().masked_fill(padding[..., None, None], math.nan) for x in qkv]
        for form in FORMS:
            o, state = attention(*spoiled, **options, backend=form)
            close(o, expected)
            assert not o[padding].any()
            assert causal is False or state.k.isfinite().all()


@pytest.mark.parametrize("form", ["auto", pytest.param("chunked", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(form):
    options = {"window": 9, "backend": form, "chunk_size": 8}
    if form == "auto":
        options["resets"] = torch.arange(20).eq(7).expand(3, 20)
    qkv, _ = make(20, {})
    _, state = attention(*(x.detach() for x in qkv), window=9)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for past in (None, state):
        expected, after = attention(*qkv, past, **options)
        o, compiled_after = compiled(*qkv, past, **options)
        close(o, expected)
        for a, b in zip(canonical(compiled_after), canonical(after), strict=True):
            close(a, b)
        for a, b in zip(gradients(o, qkv), gradients(expected, qkv), strict=True):
            close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 3, 4)}, "do not go together"),
        ({"v": torch.zeros(2, 6, 2, 4)}, "v has shape"),
        ({"v": torch.zeros(2, 5, 2, 4).double()}, "one floating-point dtype"),
        ({"sinks": torch.zeros(2)}, "sinks has shape"),
        ({"window": 0}, "window=0"),
        ({"chunk_size": 2.5}, "chunk_size=2.5"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"backend": "flash"}, "Unknown backend 'flash'"),
        ({"backend": "sdpa", "softcap": 1.0}, "does not know softcap"),
        ({"backend": "sdpa", "sinks": torch.zeros(4)}, "does not know sinks"),
        ({"lengths": torch.ones(2)}, "lengths is torch.float32"),
        ({"resets": torch.ones(2, 5)}, "resets is torch.float32"),
        ({"state": init_cache(2, 2, 4, 4), "causal": False}, "takes no state"),
        ({"state": init_cache(2, 2, 4, 4), "window": 20}, "another window"),
        ({"state": init_cache(3, 2, 4, 4)}, "state.k has shape"),
    ],
)
def test_wrong_use(change, message):
    given = {"q": torch.zeros(2, 5, 4, 4), "k": torch.zeros(2, 5, 2, 4), "v": torch.zeros(2, 5, 2, 4), **change}
    with pytest.raises(UsageError, match=message):
        attention(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("state", None), **given)


def test_state_is_a_tree_of_tensors():
    leaves = torch.utils._pytree.tree_leaves(init_cache(2, 1, 4, 3, capacity=7))
    assert [tuple(x.shape) for x in leaves] == [(2, 7, 1, 4), (2, 7, 1, 3), (2,)]
    assert KVCache._fields == ("k", "v", "length")


# ---- rotary positions


def angles(T: int, width: int, start: int = 0) -> tuple[Tensor, Tensor]:
    return rotary_table(torch.arange(start, start + T)[None], width, base=100.0)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [2, 6, 8])
def test_rotation_is_the_paper_s(interleaved, width):
    x = torch.randn(2, 5, 3, 9, dtype=torch.float64)
    y = rotate(x, *angles(5, width), interleaved=interleaved)
    for t, i in itertools.product(range(5), range(width // 2)):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        angle = t * 100.0 ** (-2 * i / width)
        close(y[:, t, :, a], x[:, t, :, a] * math.cos(angle) - x[:, t, :, b] * math.sin(angle))
        close(y[:, t, :, b], x[:, t, :, b] * math.cos(angle) + x[:, t, :, a] * math.sin(angle))
    assert torch.equal(y[..., width:], x[..., width:])


@pytest.mark.parametrize("interleaved", [True, False])
def test_only_distances_show(interleaved):
    q, k = torch.randn(2, 1, 7, 2, 6, dtype=torch.float64)
    near, far = (
        torch.einsum("bthk,bshk->bhts", *(rotate(x, *angles(7, 6, start), interleaved=interleaved) for x in (q, k)))
        for start in (0, 10**6)
    )
    close(far, near)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_of_views_and_dtypes(interleaved):
    fused = torch.randn(2, 5, 41)
    for offset, width in itertools.product((0, 1, 4), (4, 6)):
        x = fused[..., offset : offset + 28].unflatten(-1, (4, 7))
        expected = rotate(x.double().contiguous(), *angles(5, width), interleaved=interleaved)
        close(rotate(x, *angles(5, width), interleaved=interleaved).double(), expected, 2e-6)
        low = rotate(x.bfloat16(), *angles(5, width), interleaved=interleaved)
        assert low.dtype == torch.bfloat16
        close(low.double(), expected, 2e-2)
    assert rotate(fused[:, :, None, :1], *angles(5, 0)).shape == (2, 5, 1, 1)


def test_rotated_width_is_even():
    assert [rotary_width(n) for n in (1, 2, 7, 8)] == [0, 2, 6, 8]
    assert [rotary_width(64, f) for f in (0.25, 0.5, 0.3)] == [16, 32, 18]
