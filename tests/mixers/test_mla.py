"""Latent attention: its sizes, the two orders of its products, its state; the laws are in test_laws.py."""

from __future__ import annotations

import pytest
import torch

from zoo.core.errors import UsageError
from zoo.ops import LatentCache, attention, latent_attention, native
from zoo.ops import _latent_attention as op
from zoo.ops.common import logged_forms
from zoo.pattern import create_mixer
from zoo.protocol import Place

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.parametrize("d_model", range(16, 200, 2))
def test_sizes_are_derived_for_every_width(d_model):
    with torch.device("meta"):
        mixer = create_mixer("mla", d_model)
    assert mixer.n_heads * mixer.nope_dim == d_model
    assert mixer.rope_dim % 2 == 0
    assert mixer.kv_rank == d_model // 4
    assert create_mixer("mla(n_kv_heads=2)", d_model).n_heads % 2 == 0


@pytest.mark.parametrize("rope", [True, False])
def test_without_rotations_order_does_not_matter(rope):
    mixer = create_mixer(f"mla(n_heads=4, causal=False, rope={rope})", 32)
    x, order = noise(2, 11, 32, dtype=torch.float32), torch.arange(11).roll(4)
    same = torch.allclose(mixer(x[:, order])[0], mixer(x)[0][:, order], atol=1e-5)
    assert same is not rope


def test_deepseek_v3_has_its_published_size():
    sizes = "n_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128"
    with torch.device("meta"):
        mixer = create_mixer(f"mla({sizes})", 7168)
    assert sum(p.numel() for p in mixer.parameters()) == 187_107_328
    assert mixer.state_bytes(1, 1, torch.bfloat16) == 2 * 576 + 8


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mla(n_heads=3)", "mla: d_model=64 is not divisible by n_heads=3"),
        ("mla(n_heads=4, n_kv_heads=3)", "n_heads=4 is not divisible by n_kv_heads=3"),
        ("mla(rope_dim=3)", "rope_dim=3 is not allowed"),
        ("mla(rope_mscale=1.0)", "rope_mscale belongs to"),
        ("mla(rope=False, rope_base=500.0)", "mla: rope_base belongs to rope, which is not set"),
        ("mla(rope=False, rope_mscale=1.0)", "mla: rope_mscale belongs to rope, which is not set"),
        ("mla(rope_factor=2.0)", "rope_factor belongs to rope_scaling"),
        ('mla(rope_scaling="yarn", rope_bands=[4.0, 1.0])', r"rope_bands=\[4, 1\] is not allowed"),
    ],
)
def test_wrong_options(word, message):
    with pytest.raises(UsageError, match=message):
        create_mixer(word, 64)


def arguments(B=2, T=11, H=4, G=2, N=5, P=4, V=3, r=6):
    return noise(B, T, H, N + P), noise(B, T, r), noise(B, T, P), noise(G, N + V, r)


@pytest.mark.parametrize("absorb", [True, False])
def test_it_is_attention_over_unfolded_keys_and_values(absorb):
    q, latent, key, expand = arguments()
    both = torch.einsum("btr, gnr -> btgn", latent, expand)
    k = torch.cat([both[..., :5], key[:, :, None].expand(-1, -1, 2, -1)], -1)
    expected, _ = attention(q, k, both[..., 5:])
    o, state = latent_attention(q, latent, key, expand, absorb=absorb)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    assert torch.equal(state.kv, torch.cat([latent, key], -1))


@torch.no_grad()
def test_decoding_leaves_the_state_folded(monkeypatch):
    """No cache of keys and values is formed where few steps meet a long past, nor where it would not fit."""
    unfolded = []
    real = op._expanded
    monkeypatch.setattr(op, "_expanded", lambda *a: unfolded.append(a) or real(*a))
    mixer = create_mixer("mla(n_heads=4, kv_rank=32)", 64)
    _, state = mixer(noise(1, 50, 64, dtype=torch.float32))
    for T in (1, 7):
        _, state = mixer(noise(1, T, 64, dtype=torch.float32), state)
    assert not unfolded
    _, state = mixer(noise(1, 60, 64, dtype=torch.float32), state)
    assert unfolded
    monkeypatch.setattr(op, "EXPANDED_LIMIT", 0)
    unfolded.clear()
    mixer(noise(1, 60, 64, dtype=torch.float32), state)
    assert not unfolded


def test_looking_ahead():
    mixer = create_mixer("mla", 32, place=Place(causal=False)).double()
    assert mixer.init_state(2) == ()
    assert mixer.state_bytes(2, 100, torch.float32) == 0
    with pytest.raises(UsageError, match="mla with causal=False looks ahead"):
        mixer.step(noise(2, 32), ())


def test_wrong_arguments():
    q, latent, key, expand = arguments()
    for given in [(q, latent[..., :5], key, expand), (q, latent, key, expand[:, :5]), (q, latent, key.float(), expand)]:
        with pytest.raises(UsageError, match="latent_attention: "):
            latent_attention(*given)
    with pytest.raises(UsageError, match="takes no state"):
        latent_attention(q, latent, key, expand, LatentCache.empty(2, 10, dtype=torch.float64), causal=False)
    with pytest.raises(UsageError, match=r"state.kv has shape"):
        latent_attention(q, latent, key, expand, LatentCache.empty(2, 9, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("H", "r", "P"), [(1, 3, 2), (4, 20, 6), (18, 64, 16), (33, 130, 10)])
def test_the_kernel_of_single_steps(H, r, P, threads):
    """Rows of unequal length, an empty one too, logits far apart, blocks begun and filled, several threads."""
    if reason := native.why_not():
        pytest.skip(reason)
    lengths = torch.tensor([1, 127, 5000, 0])
    arguments = noise(4, 1, H, 5 + P), noise(4, 1, r), noise(4, 1, P), noise(1, 12, r)
    kv = 3 * noise(4, 5001, r + P)
    kv.masked_fill_((torch.arange(5001) >= lengths[:, None])[..., None], 0)
    expected, _ = latent_attention(*arguments, LatentCache(kv.clone(), lengths), absorb=True, backend="reference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with logged_forms() as forms:
            arguments = [x.float() for x in arguments]
            actual, state = latent_attention(*arguments, LatentCache(kv.float(), lengths), absorb=True)
    finally:
        torch.set_num_threads(before)
    assert forms == {"attention": {"compiled"}}
    assert state.length.tolist() == [2, 128, 5001, 1]
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()
