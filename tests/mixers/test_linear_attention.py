"""Linear attention, retention and GLA against the papers: sums and recurrences written out, inits, sizes, limits."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.mixers.linear_attention import taylor_features, taylor_width
from zoo.protocol import Context, Place, mixers

FEATURES = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x, "silu": F.silu}


def moved(name, d_model, **options):
    mixer = zoo.create_mixer(name, d_model, **options).double()
    for p in mixer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return mixer


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rms(o, weight, eps):
    return o / torch.sqrt((o**2).mean(-1, keepdim=True) + eps) * weight


def heads(x, n):
    """(T, n d) -> (n, T, d)."""
    return x.unflatten(-1, (n, -1)).transpose(0, 1)


def kernel(mixer, q, k):
    """Similarity of every q with every k by its formula, not by features: (T, T)."""
    if mixer.config.feature_map == "taylor":
        s = q @ k.T / math.sqrt(q.shape[-1])
        return 1 + s + s**2 / 2
    if mixer.config.feature_map == "rebased":
        q, k = (F.layer_norm(x, x.shape[-1:], mixer.affine.weight, mixer.affine.bias) for x in (q, k))
        return (q @ k.T) ** 2 / q.shape[-1]
    phi = FEATURES[mixer.config.feature_map]
    return phi(q) @ phi(k).T * mixer.scale


def test_taylor_features_are_the_second_order_kernel():
    q, k = noise(5, 7), noise(6, 7)
    s = q @ k.T / math.sqrt(7)
    assert taylor_features(q).shape == (5, taylor_width(7)) == (5, 1 + 7 + 28)
    torch.testing.assert_close(taylor_features(q) @ taylor_features(k).T, 1 + s + s**2 / 2)
    small = (1e-3 * q @ k.T / math.sqrt(7)).exp()
    torch.testing.assert_close(taylor_features(1e-3 * q) @ taylor_features(k).T, small, atol=1e-7, rtol=0)
    assert taylor_features(noise(2, 1)).shape == (2, 3)


@pytest.mark.parametrize("options", mixers["linear_attention"].law_cases(), ids=str)
def test_linear_attention_is_attention_with_its_kernel(options):
    mixer = moved("linear_attention", 16, **options, place=Place(2, 5))
    c, H, G, steps = mixer.config, mixer.n_heads, mixer.n_kv_heads, torch.arange(13)
    x = noise(13, 16)
    q, k, v, gate = (x @ w.T for w in mixer.in_proj.weight.split(mixer.parts))
    v = F.silu(v) if c.value_silu else v
    q, k, v = heads(q, H), heads(k, G), heads(v, G)
    outputs = []
    for h in range(H):
        g = h * G // H
        slope = 2 ** (-8 * (h + 1) / H) * (1 - 2 / (4 + 1e-5) + 1e-5) if c.decay == "lightning" else 0.0
        weights = (kernel(mixer, q[h], k[g]) * torch.exp(-slope * (steps[:, None] - steps).double())).tril()
        o = weights @ v[g]
        if mixer.normalize:
            o = o / (weights.sum(-1, keepdim=True) + (1e-5 if c.feature_map == "rebased" else 1e-6))
        outputs.append(rms(o, mixer.norm.weight, c.norm_eps) if mixer.norm and c.norm_heads else o)
    o = torch.cat(outputs, -1)
    o = o if c.norm_heads else rms(o, mixer.norm.weight, c.norm_eps)
    expected = mixer.out_proj(o * torch.sigmoid(gate) if c.gate else o)
    torch.testing.assert_close(mixer(x[None])[0][0], expected)
    assert c.value_dim is None or mixer.d_value == c.value_dim


def test_squares_are_never_negative_and_need_no_norm():
    """ReBased as published: normalised, and so means of values, even though keys of both signs count alike."""
    mixer = moved("linear_attention", 32, feature_map="rebased", n_heads=2)
    assert (mixer.normalize, mixer.norm, mixer.d_key) == (True, None, 16 * 17 // 2)
    x = noise(13, 32)
    q, k, v, _ = (x @ w.T for w in mixer.in_proj.weight.split(mixer.parts))
    outputs = []
    for h in range(2):
        weights = kernel(mixer, heads(q, 2)[h], heads(k, 2)[h]).tril()
        outputs.append(weights @ heads(v, 2)[h] / (weights.sum(-1, keepdim=True) + 1e-5))
    torch.testing.assert_close(mixer(x[None])[0][0], mixer.out_proj(torch.cat(outputs, -1)))


@pytest.mark.parametrize("feature_map", ["identity", "silu"])
def test_maps_of_both_signs_have_no_normaliser(feature_map):
    assert not zoo.create_mixer("linear_attention", 32, feature_map=feature_map).normalize
    with pytest.raises(zoo.UsageError, match=f'not "{feature_map}"'):
        zoo.create_mixer("linear_attention", 32, feature_map=feature_map, normalize=True)


def test_minimax_size():
    """MiniMax-Text-01: 6144 wide, 64 heads of 128; q, k, v, gate and output."""
    word = """linear_attention(n_heads=64, feature_dim=128, value_dim=128, feature_map="silu", value_silu=True,
              decay="lightning", norm_heads=False, norm_eps=1e-6, gate=True)"""
    with torch.device("meta"):
        mixer = zoo.create_mixer(word, 6144, place=Place(0, 80))
    assert sum(p.numel() for p in mixer.parameters()) == 5 * 6144 * 8192 + 8192
    slopes = -zoo.create_mixer(word, 64, place=Place(79, 80)).log_decay(torch.device("cpu"), torch.float64)
    torch.testing.assert_close(slopes, 2 ** (-torch.arange(1, 65).double() / 8) * 1e-5, rtol=0.02, atol=0)


def test_normalised_outputs_are_means_of_values():
    """Equal values give that value, whatever the keys."""
    mixer = zoo.create_mixer("linear_attention(n_heads=2)", 16).double()
    v = mixer.in_proj.weight.split(mixer.parts)[2]
    with torch.no_grad():
        v.zero_()
        v[:, 0] = 1.0
        mixer.out_proj.weight.copy_(torch.eye(16))
    x = noise(1, 50, 16)
    x[:, :, 0] = 3.0
    torch.testing.assert_close(mixer(x)[0], torch.full_like(x, 3.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", mixers["retention"].law_cases(), ids=str)
def test_retention_is_its_parallel_form(options):
    """(Q K^T * D) V of the paper's equation 5, in complex numbers: q_n e^(i n theta), D_nm = gamma^(n - m)."""
    mixer = moved("retention", 32, **options)
    c, H, K = mixer.config, mixer.n_heads, mixer.d_key
    T, x = 21, noise(21, 32)
    q, k, v, gate = (x @ w.T for w in mixer.in_proj.weight.split(mixer.parts))
    theta = c.rope_base ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    turn = torch.polar(torch.ones(T, K // 2, dtype=torch.float64), torch.arange(T)[:, None] * theta)
    distance = torch.arange(T)[:, None] - torch.arange(T)

    def complex_pairs(m):
        pairs = m.unflatten(-1, (-1, 2)) if c.rope_interleaved else m.unflatten(-1, (2, -1)).transpose(-1, -2)
        return torch.view_as_complex(pairs.contiguous())

    outputs = []
    for h in range(H):
        q_h, k_h = complex_pairs(heads(q, H)[h]) * turn, complex_pairs(heads(k, H)[h]) * turn
        gamma = 1 - 2.0 ** (-5 - h)
        weights = (q_h @ k_h.conj().T).real / math.sqrt(K) * gamma ** distance.clamp(min=0)
        o = weights.tril() @ heads(v, H)[h]
        centred = o - o.mean(-1, keepdim=True) if c.head_norm == "group" else o
        outputs.append(rms(centred, mixer.norm_weight, c.norm_eps))
    o = torch.cat(outputs, -1) * (F.silu(gate) if c.gate else 1)
    torch.testing.assert_close(mixer(x[None])[0][0], mixer.out_proj(o))


def test_retention_depends_on_distance_alone():
    """The same document after 10,000 other steps and a reset, and continued from a state at a far position."""
    mixer = moved("retention", 32)
    x, past = noise(1, 30, 32), noise(1, 40, 32)
    resets = torch.zeros(1, 70, dtype=torch.bool)
    resets[0, 40] = True
    alone, state = mixer(x)
    y, packed_state = mixer(torch.cat([past, x], 1), None, Context(resets=resets))
    torch.testing.assert_close(y[:, 40:], alone)
    assert packed_state.position.tolist() == state.position.tolist() == [30]

    far = mixer.init_state(1)._replace(position=torch.tensor([10_000_000]))
    torch.testing.assert_close(mixer(x, far)[0], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", mixers["gla"].law_cases(), ids=str)
def test_gla_equals_the_paper_written_out(options):
    mixer = moved("gla", 16, **options)
    c, H, K, V = mixer.config, mixer.n_heads, mixer.d_key, mixer.d_value
    x = noise(13, 16)
    q, k, v, low, gate = (x @ w.T for w in mixer.in_proj.weight.split(mixer.parts))
    alpha = torch.sigmoid(low @ mixer.decay_up.weight.T + mixer.decay_up.bias) ** (1 / c.gate_temperature)
    S, outputs = torch.zeros(H, K, V, dtype=torch.float64), []
    for t in range(len(x)):
        S = alpha[t].view(H, K, 1) * S + k[t].view(H, K, 1) * v[t].view(H, 1, V)
        o = rms((q[t].view(H, 1, K) @ S).squeeze(1) / math.sqrt(K), mixer.norm.weight, c.norm_eps).flatten()
        outputs.append(mixer.out_proj(o * (F.silu(gate[t]) if c.gate else 1)))
    torch.testing.assert_close(mixer(x[None])[0][0], torch.stack(outputs))


def test_gla_starts_with_a_memory_of_some_steps():
    mixer = zoo.create_mixer("gla", 256)
    x = torch.randn(1, 200, 256)
    low = x @ mixer.in_proj.weight.split(mixer.parts)[3].T
    half_life = math.log(0.5) / (F.logsigmoid(mixer.decay_up(low)) / 16)
    assert 14 < half_life.mean() < 20


def test_published_sizes():
    """fla's 1,024 wide GLA and RetNet's 2,048 wide layer; Based's 16 features of 153."""
    with torch.device("meta"):
        gla, retention = zoo.create_mixer("gla", 1024), zoo.create_mixer("retention", 2048)
        based = zoo.create_mixer('linear_attention(feature_map="taylor")', 128)
    assert (gla.n_heads, gla.d_key, gla.d_value) == (4, 128, 256)
    assert sum(p.numel() for p in gla.parameters()) == 4 * 1024**2 + 1024 * 16 + 16 * 512 + 512 + 256
    assert (retention.n_heads, retention.d_key, retention.d_value) == (8, 256, 512)
    assert sum(p.numel() for p in retention.parameters()) == 8 * 2048**2 + 512
    assert (based.n_heads, based.d_feature, based.d_key) == (2, 16, 153)
    assert based.init_state(3).memory.shape == (3, 2, 153, 65)


def test_default_heads():
    widths = (16, 18, 34, 48, 66, 128, 130, 256)
    assert [zoo.create_mixer("retention", d).n_heads for d in widths] == [1, 1, 2, 3, 3, 4, 2, 4]
    assert [zoo.create_mixer("gla", d).n_heads for d in widths] == [1, 1, 1, 1, 1, 4, 1, 4]


def test_shared_keys_and_values_keep_one_memory():
    full, shared = (zoo.create_mixer(f"linear_attention(n_heads=4, n_kv_heads={g})", 32) for g in (4, 1))
    assert full.init_state(2).memory.shape == (2, 4, 8, 9)
    assert shared.init_state(2).memory.shape == shared(torch.randn(2, 5, 32))[1].memory.shape == (2, 1, 8, 9)
    assert full.state_bytes(2, 100, torch.float32) == 4 * shared.state_bytes(2, 100, torch.float32)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("linear_attention(n_heads=3)", "n_heads=3 does not divide d_model=64"),
        ("linear_attention(n_heads=4, n_kv_heads=3)", "n_kv_heads=3 does not divide n_heads=4"),
        ('linear_attention(feature_map="identity", normalize=True)', "normalize=True needs a feature_map"),
        ("retention(n_heads=3)", "64 / 3 heads = 21.3333 is not allowed: it should be a whole number"),
        ("retention(expand_v=1.01)", "expand_v * 64 / 4 heads = 16.16 is not allowed"),
        ("gla(expand_k=0.51)", "expand_k * d_model = 0.51 * 64 = 32.64 is not allowed"),
        ("gla(n_heads=3)", "32 key channels / 3 heads = 10.6667 is not allowed"),
        ("gla(n_heads=32, expand_v=0.25)", "16 value channels / 32 heads = 0.5 is not allowed"),
    ],
)
def test_what_does_not_fit(word, message):
    with pytest.raises(zoo.UsageError) as error:
        zoo.create_mixer(word, 64)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
