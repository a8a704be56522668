"""Attention to chosen blocks (`nsa`, `moba`) against the papers written out, and what a step reads."""

import math

import pytest
import torch

import zoo
from zoo.core.errors import UsageError
from zoo.ops import _block_attention, block_attention
from zoo.protocol import Context, mixers

SIZE, BLOCKS, WINDOW = 4, 5, 6  # more blocks than the three that `nsa` always chooses


def softmax_over(q, keys, values):
    return torch.softmax(keys @ q / math.sqrt(len(q)), 0) @ values


def latest_best(scores, n):
    """The n blocks of largest score, of equals the latest."""
    return sorted(sorted(scores, key=lambda b: (scores[b], b), reverse=True)[:n])


def moba(q, k, v, h, g, t):
    own = t // SIZE
    scores = {b: (q[t, h] @ k[b * SIZE : (b + 1) * SIZE, g].mean(0)).item() for b in range(own)}
    chosen = [*latest_best(scores, BLOCKS - 1), own]
    seen = [s for b in chosen for s in range(b * SIZE, min((b + 1) * SIZE, t + 1))]
    return softmax_over(q[t, h], k[seen, g], v[seen, g])


def nsa(q, k, v, h, g, t, gates, heads):
    own, ended = t // SIZE, (t + 1) // SIZE
    means = [torch.stack([x[b * SIZE : (b + 1) * SIZE, g].mean(0) for b in range(ended)]) for x in (k, v) if ended]
    o, weights = torch.zeros_like(v[0, 0]), {}
    if ended:
        o = gates[t, h, 0] * softmax_over(q[t, h], *means)
        each = [torch.softmax(means[0] @ q[t, i] / math.sqrt(q.shape[-1]), 0) for i in heads]
        weights = dict(enumerate(torch.stack(each).mean(0).tolist()))
    always = sorted({b for b in (own, own - 1, 0) if b >= 0}, reverse=True)[:BLOCKS]
    others = {b: w for b, w in weights.items() if b not in always}
    chosen = [*always, *latest_best(others, BLOCKS - len(always))]
    seen = [s for b in chosen for s in range(b * SIZE, min((b + 1) * SIZE, t + 1))]
    o = o + gates[t, h, 1] * softmax_over(q[t, h], k[seen, g], v[seen, g])
    near = list(range(max(0, t - WINDOW + 1), t + 1))
    return o + gates[t, h, 2] * softmax_over(q[t, h], k[near, g], v[near, g])


def drawn(T, H, G, K, dtype=torch.float64, B=2):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, K, generator=rng, dtype=dtype) for heads in (H, G, G))
    return q, k, v, torch.rand(B, T, H, 3, generator=rng, dtype=dtype)


def options_of(gates, size=SIZE, n=BLOCKS):
    more = {} if gates is None else {"gates": gates, "window": WINDOW}
    return {"block_size": size, "n_blocks": n, **more}


@pytest.mark.parametrize("gated", [False, True], ids=["moba", "nsa"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_the_paper_written_out(gated, backend):
    H, G, T = 4, 2, 37
    q, k, v, gates = drawn(T, H, G, 5)
    o, _ = block_attention(
        q, k, v, **options_of(gates if gated else None), backend=backend, chunk_size=None if gated else 7
    )
    for row in range(2):
        for t in range(T):
            for h in range(H):
                g = h * G // H
                heads = range(g * H // G, (g + 1) * H // G)
                plain = (
                    nsa(q[row], k[row], v[row], h, g, t, gates[row], heads)
                    if gated
                    else moba(q[row], k[row], v[row], h, g, t)
                )
                torch.testing.assert_close(o[row, t, h], plain)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True], ids=["moba", "nsa"])
@pytest.mark.parametrize("packed", [False, True])
def test_long_pieces_that_copy_their_blocks_equal_all_scores(gated, packed, monkeypatch):
    """From rest and from a state whose rows are of unequal length; the documents' blocks start anywhere."""
    monkeypatch.setattr(_block_attention, "_rows_from", lambda *_: 4)
    q, k, v, gates = drawn(150, 4, 2, 5)
    resets = torch.zeros(2, 150, dtype=torch.bool)
    resets[0, [3, 50, 51]] = resets[1, 97] = packed
    found = []
    for backend in ("reference", "chunked"):
        state, pieces = None, []
        for cut, lengths in ((slice(0, 60), torch.tensor([60, 47])), (slice(60, 150), None)):
            part = options_of(gates[:, cut] if gated else None, n=4)
            o, state = block_attention(
                *(x[:, cut] for x in (q, k, v)),
                state,
                **part,
                lengths=lengths,
                resets=resets[:, cut],
                backend=backend,
                chunk_size=None if backend == "reference" else 11,
            )
            pieces.append(o)
        found.append((torch.cat(pieces, 1), *zoo.canonical(state)))
    with zoo.ops.common.logged_forms() as forms:
        block_attention(q, k, v, **options_of(gates if gated else None, n=4), backend="chunked")
    assert forms["block_attention"] == {"rows"}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gated", [False, True], ids=["moba", "nsa"])
def test_training_on_copies_gives_the_same_gradients(gated):
    drawn_ones, found = drawn(560, 4, 2, 5, B=1), []
    resets = torch.isin(torch.arange(560), torch.tensor([0, 77, 78])).view(1, 560)
    for backend in ("reference", "chunked"):
        q, k, v, gates = (x.clone().requires_grad_() for x in drawn_ones)
        with zoo.ops.common.logged_forms() as forms:
            o, _ = block_attention(q, k, v, **options_of(gates if gated else None, n=4), resets=resets, backend=backend)
        assert forms["block_attention"] == {"rows" if backend == "chunked" else backend}
        (o * torch.linspace(-1, 1, 5)).sum().backward()
        found.append([o, *(x.grad for x in (q, k, v, gates) if x.grad is not None)])
    assert len(found[0]) == (5 if gated else 4)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize(
    "word", ["nsa(n_heads=2, block_size=4, n_blocks=3, window=6)", "moba(n_heads=2, block_size=4)"]
)
def test_a_step_reads_the_chosen_blocks_only(word):
    """Rows of blocks that no head chose may hold anything: most of them can be replaced by NaN."""
    mixer = zoo.create_mixer(word, 32).double()
    x = torch.randn(1, 65, 32, dtype=torch.float64)
    _, state = mixer(x[:, :64])
    y, _ = mixer.step(x[:, 64], zoo.fork(state))
    unread = 0
    for block in range(16):
        other = zoo.fork(state)
        other.k[:, 4 * block : 4 * block + 4] = torch.nan
        other.v[:, 4 * block : 4 * block + 4] = torch.nan
        unread += int(torch.equal(mixer.step(x[:, 64], other)[0], y))
    read = 16 - unread
    assert 2 <= read <= 2 * 4  # two heads, of up to four blocks each


def test_of_equal_blocks_the_latest_is_chosen():
    """All keys alike: the query's own block, and the latest before."""
    q, k = torch.ones(1, 40, 1, 2), torch.ones(1, 40, 1, 2)
    v = torch.arange(40.0).div(4, rounding_mode="floor").view(1, 40, 1, 1).expand(-1, -1, -1, 2).contiguous()
    for state_of in (0, 39):
        o, state = None, None
        if state_of:
            _, state = block_attention(q[:, :39], k[:, :39], v[:, :39], block_size=4, n_blocks=3)
        rest = slice(state_of, 40)
        o, _ = block_attention(q[:, rest], k[:, rest], v[:, rest], state, block_size=4, n_blocks=3)
        assert o[0, -1, 0, 0].item() == pytest.approx((7 + 8 + 9) / 3)


def test_the_memory_of_training_is_linear():
    """What the backward pass keeps of T = 3,000 is no (T, T) and no (T, blocks) for any head."""
    sizes = []
    x, gates = torch.randn(1, 3000, 2, 4, requires_grad=True), torch.rand(1, 3000, 2, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        o, _ = block_attention(x, x, x, block_size=16, n_blocks=4, gates=gates, window=32)
    assert o.requires_grad
    assert max(sizes) <= 3008 * 2 * 8


@torch.no_grad()
def test_blocks_enough_for_all_give_full_attention():
    moba, mha = (zoo.create_mixer(f"{word}(n_heads=2)", 32).double() for word in ("moba", "mha"))
    moba.load_state_dict(mha.state_dict())
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    context = Context(resets=torch.rand(2, 60) < 0.05)
    torch.testing.assert_close(moba(x, None, context)[0], mha(x, None, context)[0])


def test_published_size():
    """flash-linear-attention's layers at their default sizes: 2048 wide; 64 heads with 4 keys, and 32 heads."""
    with torch.device("meta"):
        sparse = zoo.create_mixer(
            "nsa(n_heads=64, n_kv_heads=4, head_dim=64, block_size=64, n_blocks=16, window=512)", 2048
        )
        mixture = zoo.create_mixer("moba(n_heads=32, block_size=256, out_norm=True)", 2048)
    assert sum(p.numel() for p in sparse.parameters()) == 2048 * 64 * (64 + 4 + 4 + 64 + 3)
    assert sum(p.numel() for p in mixture.parameters()) == 4 * 2048**2 + 64


@pytest.mark.parametrize("name", ["nsa", "moba"])
def test_refusals(name):
    q, k, v, gates = drawn(5, 2, 1, 4)
    for options, message in (
        ({"block_size": 0, "n_blocks": 1}, "block_size=0 is not allowed"),
        ({"block_size": 4, "n_blocks": 1, "window": 3}, "window=3 belongs to gates"),
        ({"block_size": 4, "n_blocks": 1, "gates": gates}, "gates has shape"),
        ({"block_size": 4, "n_blocks": 1, "backend": "sdpa"}, "sdpa"),
    ):
        with pytest.raises(UsageError, match=message):
            block_attention(q, k, v, **options)
    with pytest.raises(UsageError, match="n_heads=3 is not divisible by n_kv_heads=2"):
        zoo.create_mixer(f"{name}(n_heads=3, n_kv_heads=2)", 48)
    with pytest.raises(UsageError, match="norm_eps belongs to qk_norm"):
        zoo.create_mixer(f"{name}(norm_eps=1e-3)", 32)
    assert {"block_size", "n_blocks"} <= set(mixers[name].Config.model_fields)
