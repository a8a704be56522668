"""The attention words: shapes of heads, options, equality with torch's own layer; the laws are in test_laws.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.core.errors import UsageError
from zoo.mixers.parts import project
from zoo.pattern import create_mixer
from zoo.protocol import Context, Place
from zoo.states import canonical

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WORDS = ["mha", "mqa", "gqa", "swa"]


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.parametrize(
    ("word", "d_model", "heads"),
    [
        ("mha", 256, (4, 4, 64)),
        ("mha", 16, (1, 1, 16)),
        ("mha", 130, (2, 2, 65)),
        ("mha(head_dim=13)", 64, (4, 4, 13)),
        ("mha(n_heads=3, head_dim=5)", 64, (3, 3, 5)),
        ("mqa(n_heads=8)", 64, (8, 1, 8)),
        ("gqa(n_heads=32)", 64, (32, 8, 2)),
        ("gqa(n_heads=8)", 64, (8, 2, 8)),
        ("gqa(n_heads=6)", 96, (6, 1, 16)),
        ("gqa", 64, (1, 1, 64)),
        ("gqa(n_heads=6, n_kv_heads=3)", 96, (6, 3, 16)),
        ("swa(n_heads=4)", 64, (4, 4, 16)),
        ("swa(n_heads=4, n_kv_heads=1)", 64, (4, 1, 16)),
    ],
)
def test_heads(word, d_model, heads):
    mixer = create_mixer(word, d_model)
    assert (mixer.n_heads, mixer.n_kv_heads, mixer.head_dim) == heads


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mha(n_heads=3)", r"mha: d_model=64 is not divisible by n_heads=3"),
        ("gqa(n_heads=4, n_kv_heads=3)", r"n_heads=4 is not divisible by n_kv_heads=3; allowed: 1, 2, 4"),
        ('mha(backend="sdpa", sinks=True)', "does not know sinks"),
        ('mha(backend="sdpa", softcap=2.0)', "does not know softcap"),
        ('mha(backend="flash")', "backend='flash' is not allowed"),
        ("mha(n_kv_heads=2)", "Unknown option of mha 'n_kv_heads'. Did you mean 'n_heads'"),
        ("swa(window=None)", "window=None is not allowed"),
        ("swa(window=0)", "window=0 is not allowed"),
        ("mha(rope_fraction=1.5)", "rope_fraction=1.5 is not allowed"),
    ],
)
def test_wrong_options(word, message):
    with pytest.raises(UsageError, match=message):
        create_mixer(word, 64)


def test_it_is_torch_s_multi_head_attention():
    ours, theirs = (
        create_mixer("mha(n_heads=4, rope=False, bias=True)", 32).double(),
        nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64),
    )
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.in_proj.weight.data, ours.in_proj.bias.data
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = noise(2, 11, 32)
    expected, _ = theirs(x, x, x, attn_mask=torch.ones(11, 11).triu(1).bool(), need_weights=False)
    torch.testing.assert_close(ours(x)[0], expected, rtol=0, atol=1e-12)
    looking_ahead = create_mixer("mha(n_heads=4, rope=False, bias=True, causal=False)", 32).double()
    looking_ahead.load_state_dict(ours.state_dict())
    torch.testing.assert_close(looking_ahead(x)[0], theirs(x, x, x, need_weights=False)[0], rtol=0, atol=1e-12)


def test_groups_are_heads_that_share():
    grouped = create_mixer("gqa(n_heads=4, n_kv_heads=2)", 32).double()
    every = create_mixer("mha(n_heads=4)", 32).double()
    q, k, v = grouped.in_proj.weight.data.split([32, 16, 16])
    k, v = (w.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for w in (k, v))
    every.in_proj.weight.data = torch.cat([q, k, v])
    every.out_proj.load_state_dict(grouped.out_proj.state_dict())
    x = noise(2, 11, 32)
    torch.testing.assert_close(grouped(x)[0], every(x)[0], rtol=0, atol=1e-12)


def test_the_two_layouts_are_one_model_reordered():
    pairs = create_mixer("mha(n_heads=2)", 32).double()
    halves = create_mixer("mha(n_heads=2, rope_interleaved=False)", 32).double()
    halves.load_state_dict(pairs.state_dict())
    order = torch.arange(16).unflatten(0, (8, 2)).mT.flatten()  # even channels, then odd ones
    heads = pairs.in_proj.weight.data.unflatten(0, (6, 16)).clone()
    heads[:4] = heads[:4, order]
    halves.in_proj.weight.data = heads.flatten(0, 1)
    x = noise(2, 11, 32)
    torch.testing.assert_close(halves(x)[0], pairs(x)[0], rtol=0, atol=1e-12)


def test_rotation_sees_distances_not_positions():
    """A document's outputs do not depend on where in a row it stands, up to what it sees of the past."""
    mixer = create_mixer("swa(window=3)", 32).double()
    x = noise(1, 4, 32)
    first = mixer(x)[0][:, 2:]
    later = mixer(torch.cat([noise(1, 50, 32), x], 1))[0][:, -2:]
    torch.testing.assert_close(later, first, rtol=0, atol=1e-12)
    plain = create_mixer("swa(window=3, rope=False)", 32).double()
    plain.load_state_dict(mixer.state_dict())
    assert not torch.allclose(plain(x)[0], mixer(x)[0])


@pytest.mark.parametrize("word", WORDS)
def test_looking_ahead(word):
    mixer = create_mixer(word, 32, place=Place(causal=False)).double()
    assert mixer.causal is False
    assert mixer.init_state(2) == ()
    assert mixer.state_bytes(2, 100, torch.float32) == 0
    x = noise(2, 6, 32)
    y, state = mixer(x, ())
    assert state == ()
    assert not torch.allclose(y[:, :3], mixer(x[:, :3])[0])
    with pytest.raises(UsageError, match=f"{word} with causal=False looks ahead"):
        mixer.step(x[:, 0], ())
    assert create_mixer(f"{word}(causal=True)", 32, place=Place(causal=False)).causal
    assert not create_mixer(f"{word}(causal=False)", 32).causal


def test_a_window_looks_as_far_ahead_as_back():
    mixer = create_mixer("swa(window=3, causal=False)", 32).double()
    x = noise(1, 9, 32).requires_grad_()
    seen = torch.autograd.grad(mixer(x)[0][0, 4].sum(), x)[0][0].abs().sum(-1) > 0
    assert seen.tolist() == [False, False, True, True, True, True, True, False, False]


def test_autocast():
    mixer = create_mixer("gqa(n_heads=4, qk_norm=True, sinks=True)", 64)
    x = noise(2, 20, 64, dtype=torch.float32)
    expected, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        z, _ = mixer(x[:, :1], state)
        from_buffer, after = mixer(x, mixer.init_state(2))
    assert y.dtype == z.dtype == from_buffer.dtype == state.k.dtype == torch.bfloat16
    assert after.k.dtype == torch.float32  # as init_state was asked for
    for actual in (y, from_buffer):
        assert (actual - expected).abs().max() < 2e-2 * expected.abs().max()


def test_inits_keep_the_scale():
    for d_model, depth in ((64, 1), (512, 8)):
        mixer = create_mixer("mha(n_heads=8, bias=True, sinks=True)", d_model, place=Place(n_layers=depth))
        q, k, _ = mixer.in_proj(torch.randn(4, 100, d_model)).chunk(3, -1)
        logits = (q * k).unflatten(-1, (8, -1)).sum(-1) * mixer.head_dim**-0.5
        assert 0.9 < logits.std() < 1.1
        assert 0.9 < mixer.out_proj.weight.std() * (2 * depth * d_model) ** 0.5 < 1.1
        assert not mixer.in_proj.bias.any()
        assert not mixer.out_proj.bias.any()
        assert not mixer.sinks.any()


@torch.no_grad()
def test_a_window_s_state_stops_growing():
    mixer = create_mixer("swa(window=16)", 32)
    state, x = mixer.init_state(2), noise(2, 40, 32, dtype=torch.float32)
    for t in range(40):
        y, state = mixer.step(x[:, t], state)
    assert state.k.shape[1] == 16
    expected, last = mixer(x)
    torch.testing.assert_close(y, expected[:, -1])
    torch.testing.assert_close(canonical(state), canonical(last))
    assert mixer.state_bytes(2, 10**6, torch.float32) == mixer.state_bytes(2, 16, torch.float32)
    assert mixer.flops_per_token(10**6) == mixer.flops_per_token(16)


def test_state_bytes_follow_the_groups():
    per_token = [create_mixer(w, 64).state_bytes(1, 1001, torch.bfloat16) for w in ("mha(n_heads=8)", "mqa(n_heads=8)")]
    assert per_token == [2 * 64 * 2 * 1001 + 8, 2 * 8 * 2 * 1001 + 8]
    assert create_mixer("gqa(n_heads=8)", 64).state_bytes(1, 1001, torch.bfloat16) == 2 * 16 * 2 * 1001 + 8


def test_packed_positions_start_again():
    mixer = create_mixer("mha", 32).double()
    x, resets = noise(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    resets[:, 4] = True
    y, state = mixer(x, None, Context(resets=resets))
    expected, last = mixer(x[:, 4:])
    torch.testing.assert_close(y[:, 4:], expected)
    torch.testing.assert_close(canonical(state), canonical(last))


@pytest.mark.parametrize(
    ("word", "d_model", "heads"),
    [
        ("gqa(n_kv_heads=2)", 64, (2, 2)),
        ("gqa(n_kv_heads=2)", 512, (8, 2)),
        ("gqa(n_kv_heads=3)", 96, (3, 3)),
        ("gqa(n_kv_heads=2, head_dim=32)", 128, (4, 2)),
        ("swa(n_kv_heads=4)", 64, (4, 4)),
    ],
)
def test_heads_are_derived_in_multiples_of_the_groups(word, d_model, heads):
    mixer = create_mixer(word, d_model=d_model)
    assert (mixer.n_heads, mixer.n_kv_heads) == heads


def test_groups_that_no_number_of_heads_fits_are_refused():
    with pytest.raises(UsageError, match="d_model=64 is not divisible by n_heads=3"):
        create_mixer("gqa(n_kv_heads=3)", d_model=64)


@pytest.mark.parametrize(("gate", "rows"), [("head", 4), ("channel", 32)])
def test_a_gate_opens_and_closes(gate, rows):
    plain = create_mixer("gqa(n_heads=4, n_kv_heads=2, bias=True)", 32).double()
    gated = create_mixer(f'gqa(n_heads=4, n_kv_heads=2, bias=True, gate="{gate}")', 32).double()
    assert gated.in_proj.out_features == plain.in_proj.out_features + rows
    weights, x = plain.state_dict(), noise(2, 11, 32)
    for level, share in ((40.0, 1.0), (0.0, 0.5), (-40.0, 0.0)):
        gated.load_state_dict(
            {
                **weights,
                "in_proj.weight": torch.cat([weights["in_proj.weight"], torch.zeros(rows, 32)]),
                "in_proj.bias": torch.cat([weights["in_proj.bias"], torch.full((rows,), level)]),
            }
        )
        expected = share * (plain(x)[0] - plain.out_proj.bias) + plain.out_proj.bias
        torch.testing.assert_close(gated(x)[0], expected, rtol=0, atol=1e-12)


def test_norms_centred_at_zero_are_shifted_weights():
    plain = create_mixer("mha(n_heads=4, qk_norm=True)", 32)
    shifted = create_mixer("mha(n_heads=4, qk_norm=True, norm_zero_centred=True)", 32)
    assert not shifted.q_norm.any()
    weights = plain.state_dict()
    shifted.load_state_dict({k: v - 1 if "norm" in k else v for k, v in weights.items()})
    x = noise(2, 11, 32, dtype=torch.float32)
    torch.testing.assert_close(shifted(x)[0], plain(x)[0])


def test_biases_are_where_they_are_asked_for():
    def biases(word):
        mixer = create_mixer(word, 32)
        return [layer.bias is not None for layer in (mixer.in_proj, mixer.out_proj)]

    assert biases("mha(bias=True)") == [True, True]
    assert biases("mha(bias=True, out_bias=False)") == [True, False]
    assert biases("mha(out_bias=True)") == [False, True]


def test_a_norm_over_all_heads():
    mixer = create_mixer('gqa(n_heads=4, n_kv_heads=2, qk_norm=True, qk_norm_over="all", rope=False)', 32)
    with torch.no_grad():
        mixer.q_norm.uniform_(0.5, 2)
        mixer.k_norm.uniform_(0.5, 2)
    x = noise(2, 11, 32, dtype=torch.float32)
    q, k, v = mixer.in_proj(x).split([32, 16, 16], -1)
    q, k = (F.rms_norm(m, m.shape[-1:], w, 1e-6) for m, w in ((q, mixer.q_norm), (k, mixer.k_norm)))
    heads = (m.unflatten(-1, (-1, 8)).transpose(1, 2) for m in (q, k, v))
    o = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(o.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("option", ["norm_zero_centred=True", "norm_eps=1e-5", 'qk_norm_over="all"'])
def test_a_norm_s_option_needs_the_norm(option):
    with pytest.raises(UsageError, match="belongs to qk_norm, which is not set"):
        create_mixer(f"mha({option})", 32)


OF_ROPE = ["rope_base=500.0", "rope_fraction=0.5", "rope_interleaved=False", 'rope_scaling="linear"']


@pytest.mark.parametrize("option", OF_ROPE)
def test_options_of_positions_need_them(option):
    with pytest.raises(UsageError, match="belongs to rope, which is not set"):
        create_mixer(f"gqa(rope=False, {option})", 32)
    assert create_mixer("gqa(rope=False, rope_base=10000.0)", 32).rotated == 0  # the default, spelt out


PEAK = """
import sys, torch
from zoo.pattern import create_mixer
from zoo.training.machine import peak_memory
torch.set_num_threads(1)
mixer = create_mixer(sys.argv[1], 32)
mixer(torch.randn(1, 64, 32))[0].sum().backward()
peak = lambda: peak_memory(torch.device("cpu")) / 2**20
before = peak()
mixer(torch.randn(1, int(sys.argv[2]), 32))[0].sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "word", ["gqa", "swa", "swa(causal=False)", "mha(softcap=5.0)", "mha(sinks=True)", "mla", "mla(v_dim=9)"]
)
def test_training_memory_is_linear(word):
    """A matrix of 16,384 x 16,384 float32 numbers alone would be 1,024 MB."""

    def megabytes(steps):
        child = [sys.executable, "-c", PEAK, word, str(steps)]
        return float(subprocess.run(child, capture_output=True, text=True, check=True).stdout)

    short, long = megabytes(4096), megabytes(16384)
    assert long < 250, f"{long:.0f} MB at 16,384 steps"
    assert long < 6 * short, f"{short:.0f} MB at 4,096 steps, {long:.0f} MB at 16,384"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_without_width_are_no_products(dtype, monkeypatch):
    """They have the dtype of the others, under autocast too, and the gradients are those of one product."""
    layer, x, products, linear = nn.Linear(6, 9), torch.randn(2, 3, 6), [], F.linear
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        whole = layer(x)
        monkeypatch.setattr(F, "linear", lambda *given: products.append(linear(*given)) or products[-1])
        parts = project(x, layer, [4, 0, 5, 0])
    assert [part.shape for part in parts] == [(2, 3, 4), (2, 3, 0), (2, 3, 5), (2, 3, 0)]
    assert [part.shape[-1] for part in products] == [4, 5]
    assert {part.dtype for part in parts} == {dtype}
    expected, found = (
        torch.autograd.grad(y.float().square().sum(), list(layer.parameters())) for y in (whole, torch.cat(parts, -1))
    )
    torch.testing.assert_close(found, expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
