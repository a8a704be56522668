"""The mLSTM and the sLSTM, beside their authors' plain PyTorch code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benchmarks.studies.measure import Case, Function, op_case
from zoo.ops import mlstm, slstm

B, T, H, K, V = 2, 2048, 4, 64, 64
STEPS = 512  # of the sLSTM


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    heads = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    heads |= {"log_i": normal(B, T, H), "log_f": F.logsigmoid(normal(B, T, H) + 3)}
    cell = {"gates": normal(B, STEPS, 4, H, K), "weight": K**-0.5 * normal(H, 4, K, K)}
    forms = ("compiled", "chunked")
    return {
        "mlstm": op_case(
            mlstm, heads, forms, peer=_chunkwise, peer_name="mlstm_kernels native chunkwise", at_least=1.8
        ),
        "mlstm, its authors' shortened gradients": op_case(
            mlstm, heads, forms, peer=_shortened, peer_name="mlstm_kernels native chunkwise, custom backward"
        ),
        "slstm, T 512": op_case(
            slstm,
            cell,
            ("compiled", "reference"),
            counted="reference",
            peer=_cell,
            peer_name="xlstm vanilla",
            at_least=5,
        ),
    }


def _chunkwise() -> Function:
    from mlstm_kernels.torch.chunkwise.native.fwbw import mlstm_chunkwise__native_autograd as function

    return lambda x: (function(*_their_inputs(x), chunk_size=64).transpose(1, 2),)


def _shortened() -> Function:
    """Their hand-written backward pass, which leaves the normaliser's gradient out: faster, and not the gradient."""
    from mlstm_kernels.torch.chunkwise.native.fwbw import mlstm_chunkwise__native_custbw as function

    return lambda x: (function(*_their_inputs(x), chunk_size=64).transpose(1, 2),)


def _their_inputs(x: dict[str, Tensor]) -> list[Tensor]:
    """Heads before time, and the forget gate before its log sigmoid."""
    log_f = x["log_f"]
    preactivation = log_f - torch.log(-torch.expm1(log_f))
    return [t.transpose(1, 2) for t in (x["q"], x["k"], x["v"], x["log_i"], preactivation)]


def _cell() -> Function:
    from xlstm.blocks.slstm.src.vanilla import slstm_forward
    from xlstm.blocks.slstm.src.vanilla.slstm import slstm_forward_pointwise

    def run(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        gates, weight = x["gates"], x["weight"]
        inputs = gates.flatten(2).transpose(0, 1)
        state, bias = gates.new_zeros(4, len(gates), H * K), gates.new_zeros(4 * H * K)
        states, _, _ = slstm_forward(inputs, state, weight.flatten(1, 2), bias, slstm_forward_pointwise)
        return (states[0, 1:].transpose(0, 1).unflatten(-1, (H, K)),)

    return run
