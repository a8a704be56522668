"""Ops at the sizes of a GPU, and other people's functions of the same inputs, where they are installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import ops

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor]


class Sizes(NamedTuple):
    """Of heads (B, T, H, K), and of channels (B, T, D); and the device on which numbers are drawn."""

    B: int
    T: int
    H: int
    K: int
    device: str = "cpu"

    @property
    def D(self) -> int:
        return self.H * self.K

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        """Numbers that are the same in every call."""
        rng = torch.Generator(self.device).manual_seed(seed + sum(shape))
        return torch.randn(shape, generator=rng, device=self.device)


FULL, TOY = Sizes(4, 8192, 16, 128), Sizes(2, 48, 2, 16)
F32 = frozenset(("log_decay", "A", "D", "delta_bias"))
"""Inputs that are in float32, as their functions take them; all others are in bfloat16."""


class PeerCase(NamedTuple):
    """An op beside others of the same inputs.

    Attributes:
        inputs: from sizes to float32 tensors.
        ours: from a form's name to the function.
        forms: of ours, "auto" first.
        peers: by name, what imports a function; it raises ImportError where there is none.
        shared: inputs without a batch.
    """

    inputs: Callable[[Sizes], Inputs]
    ours: Callable[[str], Function]
    forms: tuple[str, ...]
    peers: Mapping[str, Callable[[], Function]]
    shared: frozenset[str] = frozenset()


def heads(decay: str | None, *more: str) -> Callable[[Sizes], Inputs]:
    def inputs(at: Sizes) -> Inputs:
        shape = (at.B, at.T, at.H, at.K)
        found = {"q": F.normalize(at.normal(*shape), dim=-1), "k": F.normalize(at.normal(*shape, seed=1), dim=-1)}
        found["v"] = at.normal(*shape, seed=2)
        if "beta" in more:
            found["beta"] = at.normal(*shape[:3]).sigmoid()
        if "a" in more:
            a = F.normalize(at.normal(*shape, seed=3), dim=-1)
            found |= {"a": -a, "b": a * at.normal(*shape[:3], 1).sigmoid()}
        if decay is not None:
            found["log_decay"] = F.logsigmoid(at.normal(*(shape if decay == "channel" else shape[:3]), seed=4) + 4)
        return found

    return inputs


def gates(at: Sizes) -> Inputs:
    found = heads(None)(at)
    found["log_i"] = at.normal(at.B, at.T, at.H)
    return found | {"log_f": F.logsigmoid(at.normal(at.B, at.T, at.H, seed=1) + 4)}


def selective(at: Sizes) -> Inputs:
    N = 16
    found = {"u": at.normal(at.B, at.T, at.D), "delta": at.normal(at.B, at.T, at.D, seed=1) - 3}
    found |= {"A": -torch.arange(1.0, N + 1, device=at.device).repeat(at.D, 1), "B": at.normal(at.B, at.T, N)}
    return found | {"C": at.normal(at.B, at.T, N, seed=1), "D": at.normal(at.D)}


def short_conv(at: Sizes) -> Inputs:
    return {"x": at.normal(at.B, at.T, at.D), "weight": 0.5 * at.normal(at.D, 4), "bias": at.normal(at.D)}


def scanned(at: Sizes) -> Inputs:
    return {"a": (at.normal(at.B, at.T, at.D) + 3).sigmoid(), "b": at.normal(at.B, at.T, at.D, seed=1)}


def op(function: Callable[..., Any], **options: Any) -> Callable[[str], Function]:
    def ours(backend: str) -> Function:
        return lambda x: function(**x, **options, backend=backend)[0]

    return ours


def imported(module: str, name: str, call: Callable[[Any, Inputs], Any]) -> Callable[[], Function]:
    """A function of a package by the names of its module and itself; `call` gives it our inputs."""

    def load() -> Function:
        try:
            found = getattr(import_module(module), name)
        except ImportError:
            raise
        except Exception as error:  # built for another torch or CUDA, or without a GPU
            raise ImportError(f"{module}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
        return lambda x: call(found, x)

    return load


def _qkv(x: Inputs) -> list[Tensor]:
    return [x["q"], x["k"], x["v"]]


def _fla(module: str, name: str, *rest: str) -> Callable[[], Function]:
    """A function of flash-linear-attention: q, k, v and the rest in this order, of which it returns the outputs."""
    return imported(f"fla.ops.{module}", name, lambda f, x: f(*_qkv(x), *(x[key] for key in rest))[0])


def _simple_gla() -> Callable[[], Function]:
    return imported("fla.ops.simple_gla", "chunk_simple_gla", lambda f, x: f(*_qkv(x), g=x.get("log_decay"))[0])


def _sdpa(backend: str) -> Callable[[], Function]:
    def load() -> Function:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)

        def run(x: Inputs) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in _qkv(x))
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run

    return load


def _ssd(f: Any, x: Inputs) -> Any:
    """mamba-ssm's SSD at A = -1, where the decay is -dt and x is v / dt."""
    dt = -x["log_decay"]
    A = -torch.ones(dt.shape[2], device=dt.device)
    scaled = (x["v"] / dt[..., None]).to(x["v"].dtype)
    return f(scaled, dt, A, x["k"], x["q"] * x["q"].shape[-1] ** -0.5, 256)


def _selective(f: Any, x: Inputs) -> Any:
    u, delta, B, C = (x[name].transpose(1, 2) for name in ("u", "delta", "B", "C"))
    return f(u, delta, x["A"], B, C, x["D"], None, None, True).transpose(1, 2)


def _conv(f: Any, x: Inputs) -> Any:
    return f(x["x"].transpose(1, 2), x["weight"], x["bias"], activation="silu").transpose(1, 2)


def _torch_conv(x: Inputs) -> Tensor:
    padded = F.pad(x["x"].transpose(1, 2), (x["weight"].shape[1] - 1, 0))
    y = F.conv1d(padded, x["weight"][:, None], x["bias"], groups=len(x["weight"]))
    return F.silu(y).transpose(1, 2)


FLA = "fla "
"""How names of the functions of flash-linear-attention begin."""
_delta = functools.partial(PeerCase, ours=op(ops.delta_rule), forms=("auto", "chunked"))
_linear = functools.partial(PeerCase, ours=op(ops.linear_attention), forms=("auto", "chunked"))
CASES: dict[str, PeerCase] = {
    "delta_rule, decay per head": _delta(
        inputs=heads("head", "beta"),
        forms=("auto", "flash_qla", "chunked"),
        peers={
            "fla chunk_gated_delta_rule": _fla("gated_delta_rule", "chunk_gated_delta_rule", "log_decay", "beta"),
            "flash-qla chunk_gated_delta_rule": imported(
                "flash_qla",
                "chunk_gated_delta_rule",
                lambda f, x: f(q=x["q"], k=x["k"], v=x["v"], g=x["log_decay"], beta=x["beta"])[0],
            ),
        },
    ),
    "scan": PeerCase(scanned, op(ops.scan), ("auto", "triton", "chunked"), {}),
    "causal_conv1d": PeerCase(
        short_conv,
        op(ops.causal_conv1d, activation="silu"),
        ("auto", "triton", "chunked"),
        {
            "causal-conv1d causal_conv1d_fn": imported("causal_conv1d", "causal_conv1d_fn", _conv),
            "torch conv1d": lambda: _torch_conv,
        },
        frozenset(("weight", "bias")),
    ),
    "selective_scan": PeerCase(
        selective,
        op(ops.selective_scan, delta_softplus=True),
        ("auto", "triton", "chunked"),
        {
            "mamba-ssm selective_scan_fn": imported(
                "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", _selective
            )
        },
        frozenset(("A", "D")),
    ),
    "attention": PeerCase(
        heads(None),
        op(ops.attention),
        ("auto",),
        {"SDPA FlashAttention": _sdpa("FLASH_ATTENTION"), "SDPA cuDNN": _sdpa("CUDNN_ATTENTION")},
    ),
    "linear_attention, decay per head": _linear(
        inputs=heads("head"),
        peers={
            "fla chunk_simple_gla": _simple_gla(),
            "mamba-ssm mamba_chunk_scan_combined": imported(
                "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", _ssd
            ),
        },
    ),
    "mlstm": PeerCase(gates, op(ops.mlstm), ("auto", "triton", "chunked"), {}),
    "delta_rule, decay per channel": _delta(
        inputs=heads("channel", "beta"), peers={"fla chunk_kda": _fla("kda", "chunk_kda", "log_decay", "beta")}
    ),
    "linear_attention, decay per channel": _linear(
        inputs=heads("channel"), peers={"fla chunk_gla": _fla("gla", "chunk_gla", "log_decay")}
    ),
    "dplr, decay per channel": PeerCase(
        heads("channel", "a"),
        op(ops.dplr),
        ("auto", "chunked"),
        {
            "fla chunk_dplr_delta_rule": _fla(
                "generalized_delta_rule.dplr", "chunk_dplr_delta_rule", "a", "b", "log_decay"
            )
        },
    ),
    "delta_rule, no decay": _delta(
        inputs=heads(None, "beta"),
        peers={"fla chunk_delta_rule": _fla("delta_rule", "chunk_delta_rule", "beta")},
    ),
    "linear_attention, no decay": _linear(inputs=heads(None), peers={"fla chunk_simple_gla": _simple_gla()}),
}
"""In the order in which they are measured: those without long tuning, and the one with published figures, first."""
