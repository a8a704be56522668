"""Mixtures of experts against transformers' blocks, weights copied: outputs, gradients, auxiliary loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Lfm2MoeConfig,
    LongcatFlashConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeSparseMoeBlock
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

import zoo
from zoo.protocol import Context, Mixer

D, WIDTH, TOLERANCE = 48, 40, 2e-5
EXPERTS = {"gate_up_proj": "up_proj", "down_proj": "down_proj"}
Weights = dict[str, Tensor]


def mixtral() -> tuple[nn.Module, str]:
    config = MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=6, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(config), "moe(n_experts=6)"


def qwen3_moe(normalize: bool) -> tuple[nn.Module, str]:
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=WIDTH, num_experts=7, num_experts_per_tok=3, norm_topk_prob=normalize
    )
    return Qwen3MoeSparseMoeBlock(config), f"moe(n_experts=7, top_k=3, normalize={normalize})"


def qwen3_next() -> tuple[nn.Module, str]:
    config = Qwen3NextConfig(
        hidden_size=D,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=56,
        num_experts=10,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    return Qwen3NextSparseMoeBlock(config), "moe(n_experts=10, top_k=4, n_shared=1, d_shared=56, shared_gate=True)"


def deepseek_v2() -> tuple[nn.Module, str]:
    config = DeepseekV2Config(
        hidden_size=D,
        moe_intermediate_size=WIDTH,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_shared_experts=2,
        num_attention_heads=4,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
    )
    groups = 'n_groups=4, top_groups=2, group_score="max"'
    return DeepseekV2Moe(config), f"moe(n_experts=12, top_k=3, n_shared=2, {groups}, normalize=False, scale=16.0)"


def deepseek_v3() -> tuple[nn.Module, str]:
    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=WIDTH,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    groups = 'n_groups=4, top_groups=2, router="sigmoid", balance="bias"'
    return DeepseekV3MoE(config), f"moe(n_experts=12, top_k=3, n_shared=2, {groups}, scale=2.5)"


def longcat_flash() -> tuple[nn.Module, str]:
    config = LongcatFlashConfig(
        hidden_size=D,
        expert_ffn_hidden_size=WIDTH,
        n_routed_experts=8,
        zero_expert_num=4,
        moe_topk=5,
        routed_scaling_factor=6.0,
    )
    theirs = LongcatFlashMoE(config)
    return theirs, 'moe(n_experts=8, n_zero_experts=4, top_k=5, normalize=False, scale=6.0, balance="bias")'


def lfm2_moe() -> tuple[nn.Module, str]:
    config = Lfm2MoeConfig(
        hidden_size=D, moe_intermediate_size=WIDTH, num_experts=8, num_experts_per_tok=3, use_expert_bias=True
    )
    return Lfm2MoeSparseMoeBlock(config), 'moe(n_experts=8, top_k=3, router="sigmoid", balance="bias")'


def gpt_oss() -> tuple[nn.Module, str]:
    config = GptOssConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=6, num_experts_per_tok=2)
    return GptOssMLP(config), 'moe(n_experts=6, activation="gpt_oss", bias=True, router_bias=True)'


BLOCKS = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: qwen3_moe(True),
    "qwen3_moe, not normalised": lambda: qwen3_moe(False),
    "qwen3_next": qwen3_next,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "longcat_flash": longcat_flash,
    "lfm2_moe": lfm2_moe,
    "gpt_oss": gpt_oss,
}


def renamed(theirs: Weights, n_experts: int) -> Weights:
    """Their weights under our names; GPT-OSS stores experts transposed, with gates and values in turn."""
    ours = {}
    for name, weight in theirs.items():
        *owner, last = name.split(".")
        if owner and owner[0] == "experts":
            key = {"gate_up_proj_bias": "up_bias", "down_proj_bias": "down_bias"}.get(last, EXPERTS.get(last, last))
            if "experts.down_proj_bias" in theirs:
                weight = weight.mT if weight.ndim == 3 else weight
                weight = torch.cat([weight[:, ::2], weight[:, 1::2]], 1) if "up_" in key else weight
            ours[key] = weight[:n_experts]
        elif last in ("e_score_correction_bias", "expert_bias"):
            ours["e_score_correction_bias"] = weight
        elif owner[0] == "shared_expert_gate":
            ours["shared_gate.weight"] = weight
        elif owner[0] in ("gate", "router"):
            ours[f"router.{last}"] = weight
        elif owner[0] in ("shared_expert", "shared_experts"):
            ours[".".join(["shared", *owner[1:], last])] = weight
        else:
            ours[name] = weight
    return ours


def pair(block: str) -> tuple[Mixer, nn.Module]:
    theirs, word = BLOCKS[block]()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(std=0.2)
    name, options = word.split("(", 1)
    ours = zoo.create_mixer(f"{name}(d_hidden={WIDTH}, {options}", D)
    ours.load_state_dict(renamed(theirs.state_dict(), ours.config.n_experts))
    return ours, theirs


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, error


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_and_gradients(block):
    torch.manual_seed(0)
    ours, theirs = pair(block)
    x = torch.randn(3, 50, D)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(leaves[0])[0], first(theirs(leaves[1]))]
    close(*outputs)
    for y in outputs:
        (y * torch.linspace(-1, 1, D)).sum().backward()
    close(leaves[0].grad, leaves[1].grad)
    expected = renamed({n: p.grad for n, p in theirs.named_parameters()}, ours.config.n_experts)
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name])


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss(padded):
    """Theirs is ours times the number of experts a token has."""
    torch.manual_seed(0)
    ours, theirs = pair("mixtral")
    x, lengths = torch.randn(3, 20, D), torch.tensor([20, 3, 11]) if padded else None
    context = Context(lengths=lengths)
    ours(x, None, context)
    logits, _, _ = theirs.gate(x)
    mask = torch.arange(20) < lengths[:, None] if lengths is not None else None
    expected = load_balancing_loss_func((logits,), 6, 2, mask)
    torch.testing.assert_close(2 * context.losses[0] / ours.config.balance_loss, expected)
