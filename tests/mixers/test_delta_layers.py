"""The layers around the delta rule against the papers: recurrences written out, inits, sizes, what they can track."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.protocol import mixers

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}


def moved(name, d_model, **options):
    mixer = zoo.create_mixer(name, d_model, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return mixer


def convolved(mixer, qkv):
    """(T, channels) through the short convolution, one step and tap at a time, without activation."""
    if mixer.conv is None:
        return qkv
    W = mixer.config.conv_size
    padded = F.pad(qkv, (0, 0, W - 1, 0))
    y = [sum(mixer.conv.weight[:, w] * padded[t + w] for w in range(W)) for t in range(len(qkv))]
    return torch.stack(y) + (mixer.conv.bias if mixer.config.conv_bias else 0)


def plain(mixer, x, activation):
    """The layers' equations, one step and one head at a time, for x (T, D)."""
    c, H, K, V, N = mixer.config, mixer.n_heads, mixer.d_key, mixer.d_value, mixer.n_writes
    G = getattr(mixer, "n_key_heads", H)
    w_qkv, w_beta, *weights = mixer.in_proj.weight.split(mixer.parts)
    q, k, v = convolved(mixer, x @ w_qkv.T).split(mixer.qkv_parts, -1)
    q, k, v = ACTIVATIONS[activation](q), ACTIVATIONS[activation](k), F.silu(v)
    beta = torch.sigmoid(x @ w_beta.T) * (2 if c.allow_neg_eigval else 1)
    gate = F.silu(x @ weights[-1].T) if getattr(c, "gate", False) else x.new_ones(len(x), H * V)
    decay = x.new_ones(len(x), H, 1)
    if hasattr(mixer, "A_log"):
        a = x @ weights[0].T
        if mixer.name == "kda":
            a, up = a @ mixer.decay_up.weight.T, mixer.gate_up
            gate = torch.sigmoid(x @ weights[1].T @ up.weight.T + (up.bias if c.gate_bias else 0))
        steps, rates = (a + mixer.dt_bias).view(len(x), H, -1), mixer.A_log.exp()[:, None]
        bound = getattr(c, "lower_bound", None)
        decay = torch.exp(bound * torch.sigmoid(rates * steps) if bound else -rates * torch.log(1 + torch.exp(steps)))

    def unit(m):
        return m / (m.sum() if getattr(c, "qk_norm", "l2") == "sum" else torch.sqrt(m @ m + 1e-6))

    outputs = []
    S = [x.new_zeros(K, V) for _ in range(H)]
    for t in range(len(x)):
        heads = []
        for h in range(H):
            g = h * G // H
            S[h] = decay[t, h][:, None] * S[h]
            for n in range(N):
                k_n, v_n, beta_n = unit(k[t].view(N, G, K)[n, g]), v[t].view(N, H, V)[n, h], beta[t].view(N, H)[n, h]
                S[h] = S[h] + beta_n * torch.outer(k_n, v_n - S[h].T @ k_n)
            o = S[h].T @ unit(q[t].view(G, K)[g]) / math.sqrt(K)
            o = o / torch.sqrt((o**2).mean() + getattr(c, "norm_eps", 1e-5))
            heads.append(o * mixer.norm.weight * gate[t].view(H, V)[h])
        outputs.append(mixer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


NAMES = ("deltanet", "gated_deltanet", "kda", "deltaproduct")
CASES = [(name, options) for name in NAMES for options in mixers[name].law_cases()]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_the_paper_written_out(name, options):
    mixer = moved(name, 16, **options)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = mixer(x)
    activation = options.get("qk_activation", "silu")
    torch.testing.assert_close(y, torch.stack([plain(mixer, row, activation) for row in x]))


@pytest.mark.parametrize(("name", "lowest"), [("gated_deltanet", 0), ("deltaproduct", 0), ("kda", 1)])
def test_gated_inits_are_the_published_ones(name, lowest):
    mixer = zoo.create_mixer(f"{name}(n_heads=512, head_dim=1, expand_v=1.0)", 64)
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert lowest < rates.min() < lowest + 1
    assert 15 < rates.max() <= 16
    assert steps.min() * (1 + 1e-4) >= 1e-3
    assert steps.max() <= 1e-1 * (1 + 1e-4)
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.25


def test_projections_keep_the_variance_and_shrink_with_depth():
    mixer = zoo.create_mixer("deltanet", 256, place=zoo.protocol.Place(n_layers=8))
    assert mixer.in_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert mixer.out_proj.weight.std().item() == pytest.approx(256**-0.5 / 4, rel=0.02)


def test_published_sizes():
    """fla's DeltaNet at 1024 and Gated DeltaNet at 2048 (6 D^2); Qwen3-Next-80B-A3B's layer."""
    with torch.device("meta"):
        layers = [
            zoo.create_mixer("deltanet", 1024),
            zoo.create_mixer("gated_deltanet", 2048),
            zoo.create_mixer("gated_deltanet(n_heads=16, n_v_heads=32, head_dim=128, expand_v=1.0)", 2048),
        ]
    delta, gated, qwen = (sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert (layers[0].n_heads, layers[0].d_key) == (8, 128)
    assert delta == 4 * 1024**2 + 1024 * 8 + 3 * 1024 * 4 + 128
    assert (layers[1].n_heads, layers[1].d_key, layers[1].d_value) == (6, 256, 512)
    assert gated == 6 * 3 * 2048**2 // 4 * 4 // 3 + 2 * 2048 * 6 + 2 * 6 + (2 * 1536 + 3072) * 4 + 512
    in_proj = 2048 * (2 * 2048 + 2 * 4096) + 2048 * 64
    assert qwen == in_proj + (2 * 2048 + 4096) * 4 + 2 * 32 + 128 + 4096 * 2048


def test_published_sizes_of_kimi_linear():
    """KimiLinear-48B-A3B's layer: 2304 wide, 32 heads of 128."""
    with torch.device("meta"):
        layer = zoo.create_mixer("kda(n_heads=32, head_dim=128)", 2304)
        default = zoo.create_mixer("kda", 2048)
    heads = 32 * 128
    projections = 2304 * (4 * heads + 32 + 2 * 128) + 2 * 128 * heads
    assert sum(p.numel() for p in layer.parameters()) == projections + 3 * heads * 4 + 32 + heads + 128
    assert (default.n_heads, default.d_key, default.d_value) == (16, 128, 128)


@pytest.mark.parametrize("options", [{}, {"allow_neg_eigval": True}, {"gate": False, "conv_size": 0, "n_v_heads": 4}])
def test_one_householder_is_gated_deltanet(options):
    single = moved("gated_deltanet", 32, n_heads=2, head_dim=8, **options)
    options = {"allow_neg_eigval": False, **options}
    product = zoo.create_mixer("deltaproduct", 32, n_householders=1, n_heads=2, head_dim=8, **options).double()
    product.load_state_dict(single.state_dict())
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    for actual, expected in zip(product(x)[0], single(x)[0], strict=True):
        torch.testing.assert_close(actual, expected)
    ungated = zoo.create_mixer("deltaproduct", 32, n_householders=1, n_heads=2, forget_gate=False, **options)
    assert not hasattr(ungated, "A_log")


def test_without_forgetting_a_product_of_one_is_deltanet():
    single = moved("deltanet", 32, n_heads=2, gate=True)
    word = "deltaproduct(n_householders=1, n_heads=2, head_dim=16, expand_v=1.0, forget_gate=False"
    product = zoo.create_mixer(f"{word}, allow_neg_eigval=False)", 32).double()
    product.load_state_dict(single.state_dict())
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    torch.testing.assert_close(product(x)[0], single(x)[0])


def test_equal_channel_decays_are_gated_deltanet():
    """KDA with one decay for all channels of a head keeps the memory that Gated DeltaNet keeps."""
    q, k, v = torch.randn(3, 2, 70, 2, 8, dtype=torch.float64).unbind(0)
    beta, g = torch.rand(2, 70, 2, dtype=torch.float64), -torch.rand(2, 70, 2, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    for backend in ("reference", "chunked"):
        per_head = zoo.ops.delta_rule(q, k, v, beta, g, backend=backend)
        per_channel = zoo.ops.delta_rule(q, k, v, beta, g[..., None].expand(-1, -1, -1, 8), backend=backend)
        torch.testing.assert_close(per_channel, per_head)


def blank_slate(word):
    """A layer of width 16 that reads tokens as one-hot vectors, forgets nothing, all projections still zero."""
    mixer = zoo.create_mixer(word, 16).double()
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.fill_(1.0 if "norm" in name else -50.0 if name == "A_log" else 0.0)  # rates of e^-50
    return mixer


PARITY = [
    "deltanet(n_heads=1, conv_size=0, allow_neg_eigval=True)",
    "gated_deltanet(n_heads=1, head_dim=16, expand_v=1.0, conv_size=0, gate=False, allow_neg_eigval=True)",
    "kda(n_heads=1, conv_size=0, allow_neg_eigval=True)",
    "deltaproduct(n_heads=1, head_dim=16, expand_v=1.0, conv_size=0, gate=False, allow_neg_eigval=True)",
]


@pytest.mark.parametrize("word", PARITY)
def test_negative_eigenvalues_track_parity_exactly(word):
    """Token 2 writes a value under a key; every token 1 reflects the memory along that key (beta = 2), so its sign is
    the parity of the ones, 4,000 steps later too. With beta at most 1 no step changes a sign."""
    mixer, start = blank_slate(word), 2
    q, k, v = mixer.in_proj.weight[: sum(mixer.qkv_parts)].split(mixer.qkv_parts)
    with torch.no_grad():
        q[0, :3] = k[0, :3] = 20.0  # silu(20) = 20: the same direction for every token
        v[0, start] = 20.0
        mixer.in_proj.weight[sum(mixer.qkv_parts), :2] = torch.tensor([-800.0, 800.0])  # beta: 0, 2, and 1 at the start
        mixer.out_proj.weight[0, 0] = 1.0
    bits = torch.randint(0, 2, (2, 4000), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.full((2, 1), start), bits], 1)
    y, _ = mixer(F.one_hot(tokens, 16).double())
    odd = (bits.cumsum(1) % 2).bool()
    assert torch.equal(y[:, 1:, 0] < 0, odd)
    assert y[:, :, 0].abs().min() > 0.9 * y[:, :, 0].abs().max() > 0  # nothing fades

    tame = zoo.create_mixer(word.replace("eigval=True", "eigval=False"), 16).double()
    tame.load_state_dict(mixer.state_dict())
    assert (tame(F.one_hot(tokens, 16).double())[0][:, :, 0] > -1e-9).all()


def before_silu(y):
    """x with silu(x) = y, the one nearest to zero, by Newton's method."""
    x = torch.tensor(y, dtype=torch.float64)
    for _ in range(50):
        s = torch.sigmoid(x)
        x = x - (x * s - y) / (s * (1 + x * (1 - s)))
    return x


def test_two_householders_track_the_permutations_of_three():
    """The group S_3: its six elements are products of at most two swaps, and a swap is a reflection along e_a - e_b.

    Tokens 6 and 7 fill three places of the memory with three values; tokens 0 to 5 permute the places. Two heads tell
    what stands in the first place and in the second.
    """
    word = "deltaproduct(n_householders=2, n_heads=2, head_dim=8, expand_v=1.0, conv_size=0, gate=False)"
    mixer, n, large = blank_slate(word), 2, 40.0
    elements = [[], [(0, 1)], [(0, 2)], [(1, 2)], [(0, 1), (1, 2)], [(1, 2), (0, 1)]]
    q, k, v, beta, _ = mixer.in_proj.weight.split([16, 16 * n, 16 * n, 2 * n, 2])
    q, k, v = q.view(2, 8, 16), k.view(n, 2, 8, 16), v.view(n, 2, 8, 16)  # write, head, channel, token
    with torch.no_grad():
        q[0, 0] = q[1, 1] = large
        beta.fill_(-800.0)
        for token, swaps in enumerate(elements):
            for write, (a, b) in enumerate(swaps):
                k[write, :, a, token], k[write, :, b, token] = before_silu(0.2), before_silu(-0.2)
                beta.view(n, 2, 16)[write, :, token] = 800.0
        for write, place, token in [(0, 0, 6), (1, 1, 6), (0, 2, 7)]:
            k[write, :, place, token] = v[write, :, place, token] = large
            beta.view(n, 2, 16)[write, :, token] = 0.0
        mixer.out_proj.weight.copy_(torch.eye(16))
    drawn = torch.randint(0, 6, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    places, expected = [0, 1, 2], []
    for token in drawn:
        for a, b in elements[token]:
            places[a], places[b] = places[b], places[a]
        expected.append(places[:2])
    y, _ = mixer(F.one_hot(torch.tensor([[6, 7, *drawn]]), 16).double())
    assert y[0, 2:].view(-1, 2, 8).argmax(-1).tolist() == expected


def test_a_second_write_replaces_the_first():
    """What sets the delta rule apart: with beta = 1 and the same key, the old value is gone."""
    k = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 2, 1, 8)
    v = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    o, _ = zoo.ops.delta_rule(k, k, v, torch.ones(1, 2, 1, dtype=torch.float64), scale=1.0)
    torch.testing.assert_close(o, v)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("deltanet(n_heads=3)", "expand_k * 64 / 3 heads = 21.3333 is not allowed: it should be a whole number"),
        ('deltanet(qk_norm="sum")', 'qk_norm="sum" needs qk_activation="elu"'),
        ("gated_deltanet(n_heads=4, n_v_heads=6)", "n_v_heads=6 is no multiple of n_heads=4"),
        ("gated_deltanet(head_dim=3, expand_v=1.5)", "expand_v * head_dim = 1.5 * 3 = 4.5 is not allowed"),
        ("kda(n_heads=4, n_v_heads=6)", "n_v_heads=6 is no multiple of n_heads=4"),
        ("deltaproduct(n_householders=0)", "n_householders"),
        ("kda(dt_init_range=[0.1, 0.01])", "dt_init_range=[0.1, 0.01] is not allowed"),
        ("gated_deltanet(A_init_range=[2.0, 1.0])", "A_init_range=[2, 1] is not allowed"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
