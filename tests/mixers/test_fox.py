"""Forgetting attention against the paper written out, and what its gates can do that positions cannot."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.core.errors import UsageError
from zoo.ops import attention
from zoo.protocol import mixers


def rms(x, weight, eps):
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def plain(mixer, x):
    """The layer's equations for x (T, D), one head and one query at a time."""
    c, H, G, K = mixer.config, mixer.n_heads, mixer.n_kv_heads, mixer.head_dim
    q, k, v, forget, share, gate = (x @ mixer.in_proj.weight.T).split(mixer.parts, -1)
    if c.bias:
        q, k, v = (y + b for y, b in zip((q, k, v), mixer.qkv_bias.split(mixer.parts[:3]), strict=True))
    q, k, v = q.view(-1, H, K), k.reshape(-1, G, K), v.reshape(-1, G, K)
    shares = list(torch.sigmoid(share).split(G, -1))
    for on, name in ((c.k_shift, "k"), (c.v_shift, "v")):
        if on:
            a, now = shares.pop(0)[..., None], k if name == "k" else v
            mixed = (1 - a) * now + a * torch.cat([torch.zeros_like(now[:1]), now[:-1]])
            k, v = (mixed, v) if name == "k" else (k, mixed)
    if c.qk_norm:
        q, k = rms(q, mixer.q_norm, c.norm_eps), rms(k, mixer.k_norm, c.norm_eps)
    f, heads = torch.sigmoid(forget + mixer.forget_bias), []
    for h in range(H):
        g, rows = h * G // H, []
        for t in range(len(x)):
            first = max(0, t - c.window + 1) if c.window else 0
            logits = [q[t, h] @ k[s, g] / math.sqrt(K) + f[s + 1 : t + 1, h].log().sum() for s in range(first, t + 1)]
            rows.append(torch.stack(logits).softmax(-1) @ v[first : t + 1, g])
        o = torch.stack(rows)
        heads.append(rms(o, mixer.out_norm[h], c.norm_eps) if c.out_norm else o)
    o = torch.cat(heads, -1)
    return mixer.out_proj(o * torch.sigmoid(gate) if c.gate else o)


@torch.no_grad()
@pytest.mark.parametrize("options", [{**case, "rope": False} for case in mixers["fox"].law_cases()], ids=str)
def test_equals_the_paper_written_out(options):
    options = {name: value for name, value in options.items() if not name.startswith("rope_")}
    mixer = zoo.create_mixer("fox", 16, **options).double()
    for p in mixer.parameters():
        p += 0.1 * torch.randn_like(p)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], torch.stack([plain(mixer, row) for row in x]))


@torch.no_grad()
@pytest.mark.parametrize("rope", [False, True])
def test_without_forgetting_it_is_mha(rope):
    fox, mha = (zoo.create_mixer(f"{word}(n_heads=2, rope={rope})", 16).double() for word in ("fox", "mha"))
    fox.forget_bias.fill_(1e9)
    mha.in_proj.weight.copy_(fox.in_proj.weight[:48])
    mha.out_proj.weight.copy_(fox.out_proj.weight)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(fox(x)[0], mha(x)[0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_decays_of_long_sequences_keep_their_digits(backend):
    """After decays that sum to -30,000, float32 is as near to float64 as after none, in one pass and by steps."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1500, 2, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    g = torch.where(torch.rand(1, 1500, 2, generator=rng) < 0.5, -40.0, -0.01).double()
    expected, _ = attention(q, k, v, log_decay=g, backend="reference")
    q, k, v, g = q.float(), k.float(), v.float(), g.float()
    o, state = attention(q[:, :-1], k[:, :-1], v[:, :-1], log_decay=g[:, :-1], backend=backend)
    last, _ = attention(q[:, -1:], k[:, -1:], v[:, -1:], state, log_decay=g[:, -1:], backend=backend)
    assert (torch.cat([o, last], 1) - expected).abs().max() < 3e-6


def test_no_bias_of_all_queries_and_keys_is_stored():
    """What the backward pass keeps of T = 2,000 is less than one row of (T, T) numbers a hundred times over."""
    sizes = []
    x = torch.randn(1, 2000, 2, 4, requires_grad=True)
    g = F.logsigmoid(torch.randn(1, 2000, 2)).requires_grad_()

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o, _ = attention(x, x, x, log_decay=g)
    assert o.requires_grad
    assert max(sizes) <= 2000 * 2 * 4


@torch.no_grad()
def test_gates_count_without_positions():
    """A gate of 1 / 2 at ones: the weight of the first token is 2^-n after n ones, wherever they stand. Attention with
    rotary positions, or with none, knows no such number."""
    mixer = zoo.create_mixer("fox(n_heads=1)", 16).double()
    for p in mixer.parameters():
        p.fill_(0.0)
    q, _, v, f, *_ = mixer.in_proj.weight.split(mixer.parts)
    mixer.forget_bias.fill_(40.0)
    f[0, 1] = -40.0  # sigmoid(0) at token 1, 1 at the others
    v[0, 2] = 1.0
    mixer.out_proj.weight[0, 0] = 1.0
    bits = torch.randint(0, 2, (1, 30), generator=torch.Generator().manual_seed(0))
    y = mixer(F.one_hot(torch.cat([torch.full((1, 1), 2), bits], 1), 16).double())[0][0, :, 0]
    n = F.pad(bits.cumsum(1), (1, 0))[0].double()  # each token's weight is 2^(ones up to it - ones in all)
    expected = torch.stack([2 ** -n[t] / (2 ** (n[: t + 1] - n[t])).sum() for t in range(31)])
    torch.testing.assert_close(y, expected)
    assert torch.count_nonzero(q) == 0


def test_published_size():
    """The authors' 125M layers: 768 wide, 12 heads; plain, and Pro."""
    with torch.device("meta"):
        plain_layer = zoo.create_mixer("fox(n_heads=12)", 768)
        pro = zoo.create_mixer(
            "fox(n_heads=12, qk_norm=True, gate=True, out_norm=True, k_shift=True, v_shift=True)", 768
        )
    D, H = 768, 12
    assert sum(p.numel() for p in plain_layer.parameters()) == 4 * D * D + D * H + H
    assert sum(p.numel() for p in pro.parameters()) == 5 * D * D + 3 * D * H + H + 3 * D


def test_refusals():
    q = torch.randn(2, 3, 2, 4)
    g = -torch.rand(2, 3, 2)
    _, state = attention(q, q, q, log_decay=g)
    for options, message in (
        ({"log_decay": g[..., :1]}, "log_decay has shape"),
        ({"log_decay": g, "causal": False}, "causal=False, expected"),
        ({"log_decay": g, "backend": "sdpa"}, "does not know log_decay"),
        ({"state": state}, "a DecayingCache is the state"),
    ):
        with pytest.raises(UsageError, match=message):
            attention(q, q, q, **options)
    with pytest.raises(UsageError, match="n_heads=3 is not divisible by n_kv_heads=2"):
        zoo.create_mixer("fox(n_heads=3, n_kv_heads=2)", 48)
    with pytest.raises(UsageError, match="rope_base belongs to rope"):
        zoo.create_mixer("fox(rope_base=500.0)", 16)
