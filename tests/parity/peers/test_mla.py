"""Multi-head latent attention against transformers' DeepSeek-V2, V3 and LongCat-Flash layers, weights copied."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cached_layers import close, moved
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache, LongcatFlashConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.longcat_flash import modeling_longcat_flash as longcat

import zoo
from zoo.protocol import Mixer

D, H, N, P, V, R = 48, 3, 10, 6, 7, 12
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8,
    "beta_slow": 0.5,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = f"n_heads={H}, nope_dim={N}, rope_dim={P}, v_dim={V}, kv_rank={R}"
SCALED = 'rope_scaling="yarn", rope_factor=4.0, rope_context=32, rope_bands=[0.5, 8.0], rope_amplitude=1.0'


def config_of(kind: type, q_rank: int | None, bias: bool, rope: dict, **more):
    return kind(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=H,
        qk_nope_head_dim=N,
        qk_rope_head_dim=P,
        v_head_dim=V,
        kv_lora_rank=R,
        q_lora_rank=q_rank,
        attention_bias=bias,
        rope_parameters=dict(rope),
        max_position_embeddings=128,
        attn_implementation="eager",
        **more,
    )


def renamed(theirs: nn.Module, q_rank: int | None) -> dict[str, Tensor]:
    """Their weights by our names: two projections side by side, one unfolded into heads, the rest renamed."""
    given, weights = theirs.state_dict(), {}
    first = "q_a_proj" if q_rank else "q_proj"
    for kind in ("weight", "bias"):
        if f"kv_a_proj_with_mqa.{kind}" in given:
            kv = given[f"kv_a_proj_with_mqa.{kind}"]
            q = given.get(f"{first}.{kind}", kv.new_zeros(H * (N + P)))  # queries in one step never have a bias
            weights[f"in_proj.{kind}"] = torch.cat([q, kv])
            weights[f"out_proj.{kind}"] = given[f"o_proj.{kind}"]
    weights["kv_norm"] = given["kv_a_layernorm.weight"]
    weights["kv_up"] = given["kv_b_proj.weight"].unflatten(0, (H, N + V))
    if q_rank:
        weights |= {"q_norm": given["q_a_layernorm.weight"], "q_up.weight": given["q_b_proj.weight"]}
    return weights


def agree(ours: Mixer, theirs: nn.Module, rotary: nn.Module, config) -> None:
    """Outputs and gradients over 40 steps at once; 30 steps, a piece of 5, then one at a time from a cache."""
    x = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for _ in range(2)]

    def run(x: Tensor, start: int, cache=None) -> Tensor:
        T = x.shape[1]
        positions = torch.arange(start, start + T)[None]
        hidden = torch.arange(start + T) > positions[0][:, None]
        mask = torch.zeros(1, 1, T, start + T).masked_fill(hidden, -torch.inf)
        where = rotary(x, positions)
        return theirs(x, position_embeddings=where, attention_mask=mask, past_key_values=cache)[0]

    outputs = [ours(leaves[0])[0], run(leaves[1], 0)]
    for y in outputs:
        (y * torch.linspace(-1, 1, D)).sum().backward()
    close(*outputs, "outputs")
    close(leaves[0].grad, leaves[1].grad, "gradients of the input")
    for p in theirs.parameters():
        p.grad, p.data = p.data, p.grad
    expected = renamed(theirs, ours.config.q_rank)
    for name, p in ours.named_parameters():
        close(p.grad, expected[name], f"gradient of {name}")
    for p in theirs.parameters():
        p.grad, p.data = None, p.grad

    with torch.no_grad():
        cache, state = DynamicCache(config=config), ours.init_state(2)
        for start, end in pairwise([0, 30, *range(35, 41)]):
            y, state = ours(x[:, start:end], state)
            close(y, run(x[:, start:end], start, cache), f"from a cache, steps {start} to {end}")


@pytest.mark.parametrize("rope", [PLAIN, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize(("q_rank", "bias"), [(None, False), (14, True)])
@pytest.mark.parametrize("version", ["v2", "v3", "v3 in halves"])
def test_deepseek(version, q_rank, bias, rope):
    interleaved = version != "v3 in halves"
    if version == "v2":
        config = config_of(DeepseekV2Config, q_rank, bias, rope)
        theirs, rotary = v2.DeepseekV2Attention(config, 0), v2.DeepseekV2RotaryEmbedding(config)
    else:
        config = config_of(DeepseekV3Config, q_rank, bias, rope, rope_interleave=interleaved)
        theirs, rotary = v3.DeepseekV3Attention(config, 0), v3.DeepseekV3RotaryEmbedding(config)
    moved(theirs)
    scaled = f", {SCALED}, rope_mscale=0.707" if rope is YARN else ""
    word = f"mla({SIZES}, q_rank={q_rank}, bias={bias}, rope_interleaved={interleaved}{scaled})"
    ours = zoo.create_mixer(word, D)
    ours.load_state_dict(renamed(theirs, q_rank))
    agree(ours, theirs, rotary, config)


@pytest.mark.parametrize("bias", [False, True])
def test_longcat_flash(bias):
    config = config_of(LongcatFlashConfig, 14, bias, PLAIN, head_dim=P)
    theirs, rotary = moved(longcat.LongcatFlashMLA(config, 0)), longcat.LongcatFlashRotaryEmbedding(config)
    ours = zoo.create_mixer(f"mla({SIZES}, q_rank=14, bias={bias}, scale_latents=True)", D)
    ours.load_state_dict(renamed(theirs, 14))
    agree(ours, theirs, rotary, config)
