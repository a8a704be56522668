"""The delta rule and linear attention, beside the plain PyTorch chunked forms of flash-linear-attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.studies.measure import Case, Function, load_naive, op_case
from zoo.ops import causal_conv1d, delta_rule, linear_attention, slot_scores

B, T, H, K, V = 2, 2048, 4, 64, 64
CHANNELS, WINDOW, SLOTS = 512, 4, 64
STEPS = 512  # beside peers that go step by step
FORMS = ("compiled", "chunked")


def fla(module: str, call: Callable[[Any], Callable[..., Tensor]]) -> dict[str, Any]:
    """The peer of a case: `call` maps fla's naive module to a function of the case's inputs, by name."""

    def peer() -> Function:
        function = call(load_naive(module))
        return lambda x: (function(**x),)

    return {"peer": peer, "peer_name": f"fla {module}"}


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    qkv = {"q": normal(B, T, H, K), "k": F.normalize(normal(B, T, H, K), dim=-1), "v": normal(B, T, H, V)}
    beta = {"beta": normal(B, T, H).sigmoid()}
    per_head = {"log_decay": F.logsigmoid(normal(B, T, H) + 3)}
    per_channel = {"log_decay": F.logsigmoid(normal(B, T, H, K) + 3)}
    conv = {"x": normal(B, T, CHANNELS), "weight": normal(CHANNELS, WINDOW), "bias": normal(CHANNELS)}
    rwkv6 = {name: x[:, :STEPS] for name, x in qkv.items()} | {"log_decay": -normal(B, STEPS, H, K).exp()}
    forget = torch.sigmoid(normal(B, STEPS, 2, 128) + 2)  # its keys are what it does not keep
    hgrn2 = {"q": F.silu(normal(B, STEPS, 2, 128)), "k": 1 - forget, "v": normal(B, STEPS, 2, 128)}
    hgrn2 |= {"log_decay": forget.log()}
    written = normal(B, T, H, SLOTS).sigmoid()
    slots = {"q": qkv["q"], "k": qkv["k"], "slots": 1 - written, "log_decay": written.log()}
    return {
        "delta_rule, decay per head": op_case(
            delta_rule,
            qkv | beta | per_head,
            FORMS,
            at_least=5,
            **fla(
                "gated_delta_rule",
                lambda m: lambda q, k, v, beta, log_decay: m.naive_chunk_gated_delta_rule(q, k, v, log_decay, beta)[0],
            ),
        ),
        "delta_rule, no decay": op_case(
            delta_rule,
            qkv | beta,
            FORMS,
            at_least=4,
            **fla(
                "delta_rule",
                lambda m: (
                    lambda **x: m.delta_rule_chunkwise(*(t.transpose(1, 2) for t in x.values()))[0].transpose(1, 2)
                ),
            ),
        ),
        "delta_rule, decay per channel": op_case(
            delta_rule,
            qkv | beta | per_channel,
            FORMS,
            at_least=20,
            **fla("kda", lambda m: lambda q, k, v, beta, log_decay: m.naive_chunk_kda(q, k, v, log_decay, beta)[0]),
        ),
        "linear_attention, decay per head": op_case(
            linear_attention,
            qkv | per_head,
            FORMS,
            at_least=3,
            **fla("simple_gla", lambda m: lambda q, k, v, log_decay: m.naive_chunk_simple_gla(q, k, v, log_decay)[0]),
        ),
        "linear_attention, no decay": op_case(
            linear_attention, qkv, FORMS, **fla("linear_attn", lambda m: lambda **x: m.naive_chunk_linear_attn(**x))
        ),
        "linear_attention, decay per channel": op_case(linear_attention, qkv | per_channel, FORMS),
        f"linear_attention, as in rwkv6, T {STEPS}": op_case(
            functools.partial(linear_attention, scale=1.0), rwkv6, FORMS, **fla("gla", lambda m: _gla(m, K**0.5))
        ),
        f"linear_attention, as in hgrn2, T {STEPS}": op_case(
            linear_attention, hgrn2, FORMS, **fla("gla", lambda m: _gla(m, 1.0))
        ),
        f"slot_scores, {SLOTS} slots": op_case(slot_scores, slots, FORMS),
        "causal_conv1d": op_case(causal_conv1d, conv, FORMS, peer=lambda: _torch_conv1d, peer_name="torch conv1d"),
    }


def _gla(module: Any, factor: float) -> Callable[..., Tensor]:
    return lambda q, k, v, log_decay: module.naive_recurrent_gla(factor * q, k, v, log_decay)[0]


def _torch_conv1d(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    x, weight, bias = inputs.values()
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return (F.conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2),)
