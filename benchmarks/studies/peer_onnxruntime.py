"""onnxruntime's operators for linear attention and causal convolution, called on torch tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DOMAIN = "com.microsoft"


def linear_attention(
    threads: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, log_decay: Tensor | None = None
) -> Callable[[], Tensor]:
    """A function that runs `LinearAttention` on q, k, v (B, T, H, K) once, by the rule for what is given.

    Raises:
        ImportError: onnxruntime or onnx is not installed.
    """
    B, _, H, K = q.shape
    rules = {(0, 0): "linear", (0, 1): "gated", (1, 0): "delta", (1, 1): "gated_delta"}
    rule = rules[beta is not None, log_decay is not None]
    state = torch.zeros(B, H, K, v.shape[-1])
    names = ["query", "key", "value", "past_state", "decay", "beta"]
    tensors = [q, k, v, state, log_decay, beta]
    given = {n: x if x is state else x.flatten(2) for n, x in zip(names, tensors, strict=True) if x is not None}
    inputs = [n if n in given else "" for n in names]
    run = _session(threads, "LinearAttention", inputs, given, q_num_heads=H, kv_num_heads=H, update_rule=rule)
    return lambda: run().unflatten(-1, (H, -1))


def causal_conv1d(threads: int, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """A function that runs `CausalConvWithState` with SiLU on x (B, T, D) once, channels last.

    Raises:
        ImportError: onnxruntime or onnx is not installed.
    """
    given = {"x": x, "weight": weight[:, None].contiguous(), "bias": bias}
    return _session(threads, "CausalConvWithState", [*given], given, activation="silu", channels_last=1)


def _session(
    threads: int, op: str, inputs: list[str], given: dict[str, Tensor], **attributes: Any
) -> Callable[[], Tensor]:
    """A function that runs a model of one node, and gives its first output."""
    import onnxruntime
    from onnx import TensorProto, helper

    node = helper.make_node(op, inputs, ["y", "last"], domain=DOMAIN, **attributes)
    shown = [helper.make_tensor_value_info(n, TensorProto.FLOAT, tuple(x.shape)) for n, x in given.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "last")]
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], op, shown, results), opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take time from who comes next
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {n: x.numpy() for n, x in given.items()}
    return lambda: torch.from_numpy(session.run(["y", "last"], values)[0])
