"""Attention words against the layers of transformers' Llama, Qwen 2, 3 and 3-Next, Gemma 3 and GPT-OSS, weights copied;
and every scaling of rotary positions against theirs."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from cached_layers import close, moved
from torch import Tensor, nn
from transformers import DynamicCache, Gemma3TextConfig, GptOssConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers import Qwen3NextConfig as NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import zoo
from zoo.ops import RopeScaling, frequencies, rotary_table, yarn_amplitude
from zoo.protocol import Mixer

D, H, G, K, WINDOW = 48, 6, 2, 10, 7  # six heads of ten channels from 48
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default"}


class Pair(NamedTuple):
    """A layer of theirs and the word that it is."""

    ours: Mixer
    theirs: nn.Module
    rotary: Any
    window: int | None = None


def pair(kind, layer, rotary, word: str, rope: dict, *, index: int = 0, window: int | None = None, **options) -> Pair:
    sizes = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": K}
    common = {"num_hidden_layers": 2, "vocab_size": 8, "attn_implementation": "eager", "max_position_embeddings": 64}
    config = kind(**sizes, **common, rope_parameters=rope, **options)
    theirs, options = moved(layer(config, index)), f"n_heads={H}, n_kv_heads={G}, head_dim={K}, rope_interleaved=False"
    name, _, more = word.partition(" ")
    ours = zoo.create_mixer(f"{name}({options}{', ' + more if more else ''})", D)
    ours.load_state_dict(renamed(theirs, ours))
    return Pair(ours, theirs, rotary(config), window)


def renamed(theirs: nn.Module, ours: Mixer) -> dict[str, Tensor]:
    """q, k, v (and the gate, which Qwen3-Next keeps beside each head's q) one above another; the rest renamed."""
    given, weights = theirs.state_dict(), {}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" not in given:
            continue
        q, *rest = (given[f"{name}_proj.{kind}"] for name in ("q", "k", "v"))
        if ours.config.gate:
            q, gate = (part.flatten(0, 1) for part in q.unflatten(0, (H, 2, K)).unbind(1))
            rest.append(gate)
        weights[f"in_proj.{kind}"] = torch.cat([q, *rest])
    weights |= {f"out_proj.{k}": given[f"o_proj.{k}"] for k in ("weight", "bias") if f"o_proj.{k}" in given}
    weights |= {f"{n}_norm": given[f"{n}_norm.weight"] for n in ("q", "k") if f"{n}_norm.weight" in given}
    return weights | ({"sinks": given["sinks"]} if "sinks" in given else {})


def gemma(sliding: bool) -> Pair:
    kind = "sliding_attention" if sliding else "full_attention"
    ropes = {
        "sliding_attention": {**PLAIN, "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }

    def rotary(config):
        return partial(gemma3.Gemma3RotaryEmbedding(config), layer_type=kind)

    words = [
        'gqa rope_base=1000000.0, rope_scaling="linear"',
        f"swa window={WINDOW}",
    ]
    return pair(
        Gemma3TextConfig,
        gemma3.Gemma3Attention,
        rotary,
        f"{words[sliding]}, qk_norm=True, norm_zero_centred=True, scale={24**-0.5}",
        ropes,
        index=int(sliding),
        window=WINDOW if sliding else None,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    )


def oss(sliding: bool) -> Pair:
    words = ["gqa bias=True", f"swa window={WINDOW}, bias=True"]
    yarn = 'rope_scaling="yarn", rope_factor=32.0, rope_context=4096, rope_truncate=False'
    return pair(
        GptOssConfig,
        gpt_oss.GptOssAttention,
        gpt_oss.GptOssRotaryEmbedding,
        f"{words[sliding]}, sinks=True, rope_base=150000.0, {yarn}",
        {**YARN, "rope_theta": 150000.0},
        index=int(sliding),
        window=WINDOW if sliding else None,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=True,
    )


PAIRS = {
    "llama 3": lambda: pair(
        LlamaConfig,
        llama.LlamaAttention,
        llama.LlamaRotaryEmbedding,
        'gqa rope_base=500000.0, rope_scaling="llama3", rope_context=64',
        {**LLAMA3, "rope_theta": 500000.0},
    ),
    "qwen 2": lambda: pair(
        Qwen2Config,
        qwen2.Qwen2Attention,
        qwen2.Qwen2RotaryEmbedding,
        "gqa bias=True, out_bias=False",
        {**PLAIN, "rope_theta": 10000.0},
    ),
    "qwen 3": lambda: pair(
        Qwen3Config,
        qwen3.Qwen3Attention,
        qwen3.Qwen3RotaryEmbedding,
        "gqa qk_norm=True, rope_base=1000000.0, norm_eps=1e-05",
        {**PLAIN, "rope_theta": 1e6},
        rms_norm_eps=1e-5,
    ),
    "qwen 3-next": lambda: pair(
        NextConfig,
        qwen3_next.Qwen3NextAttention,
        qwen3_next.Qwen3NextRotaryEmbedding,
        'gqa qk_norm=True, norm_zero_centred=True, gate="channel", rope_fraction=0.4',
        {**PLAIN, "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    ),
    "gemma 3, global": partial(gemma, False),
    "gemma 3, window": partial(gemma, True),
    "gpt-oss, global": partial(oss, False),
    "gpt-oss, window": partial(oss, True),
}


@pytest.mark.parametrize("name", PAIRS)
def test_layer(name):
    ours, theirs, rotary, window = PAIRS[name]()
    x = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for _ in range(2)]

    def run(x: Tensor, start: int, cache=None) -> Tensor:
        T = x.shape[1]
        positions = torch.arange(start, start + T)
        distance = positions[:, None] - torch.arange(start + T)
        hidden = (distance < 0) | (distance >= (window or 1000))
        mask = torch.zeros(1, 1, T, start + T).masked_fill(hidden, -torch.inf)
        where = rotary(x, positions[None])
        return theirs(x, position_embeddings=where, attention_mask=mask, past_key_values=cache)[0]

    outputs = [ours(leaves[0])[0], run(leaves[1], 0)]
    for y in outputs:
        (y * torch.linspace(-1, 1, D)).sum().backward()
    close(*outputs, "outputs")
    close(leaves[0].grad, leaves[1].grad, "gradients of the input")
    with torch.no_grad():
        cache, state = DynamicCache(), ours.init_state(2)
        for start, end in pairwise([0, 30, *range(35, 41)]):
            y, state = ours(x[:, start:end], state)
            close(y, run(x[:, start:end], start, cache), f"from a cache, steps {start} to {end}")

    for p in theirs.parameters():
        p.grad, p.data = p.data, p.grad
    expected = renamed(theirs, ours)
    for name, p in ours.named_parameters():
        close(p.grad, expected[name], f"gradient of {name}")


# ---- rotary positions for longer contexts

SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 8.0}, RopeScaling("linear", 8.0)),
    "dynamic, at twice the length": ({"rope_type": "dynamic", "factor": 3.0}, RopeScaling("ntk", 4.0)),
    "yarn": ({**YARN, "truncate": True}, RopeScaling("yarn", 32.0, 4096)),
    "yarn, not truncated": (YARN, RopeScaling("yarn", 32.0, 4096, truncate=False)),
    "yarn, other bands": (
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        RopeScaling("yarn", 32.0, 4096, (2.0, 16.0), truncate=False),
    ),
    "yarn, amplitude": ({**YARN, "attention_factor": 1.3}, RopeScaling("yarn", 32.0, 4096, None, False, 1.3)),
    "yarn, mscale of two kinds": (
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        RopeScaling("yarn", 32.0, 4096, None, False, yarn_amplitude(32.0) / yarn_amplitude(32.0, 0.5)),
    ),
    "llama3": (LLAMA3, RopeScaling("llama3", 8.0, 64)),
    "llama3, other bands": ({**LLAMA3, "low_freq_factor": 2.0}, RopeScaling("llama3", 8.0, 64, (2.0, 4.0))),
}


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("width", [6, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling(name, width, base):
    theirs, ours = SCALINGS[name]
    config = LlamaConfig(head_dim=width, max_position_embeddings=4096, rope_parameters={**theirs, "rope_theta": base})
    expected, amplitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, seq_len=8192)
    actual = frequencies(width, base, ours)
    assert ((actual - expected).abs() / expected).max() < 2e-5  # theirs are float32
    cos, sin = rotary_table(torch.arange(9), width, base=base, scaling=ours)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, amplitude**2))
