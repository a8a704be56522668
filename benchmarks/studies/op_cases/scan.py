"""State-space scans and mixers, LSTM and GRU, beside mambapy, s5-pytorch, transformers and torch's own cells."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from zoo.benchmarks.studies.measure import Case, Function, Inputs, mixer_case, op_case, plain_case
from zoo.ops import scan, selective_scan

B, T, D, N = 2, 2048, 256, 16
SHORT = 256  # for a peer whose backward pass is quadratic in time: 70 s at 2048
WIDTH, WIDE_N = 128, 64  # of the Mamba mixers, whose channels are twice as many; states of the second
FORMS = ("compiled", "chunked")


def cases() -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    steps = {"a": torch.sigmoid(normal(B, T, D) + 3), "b": normal(B, T, D)}

    def selective(n_steps: int) -> Inputs:
        return {
            "u": normal(B, n_steps, D),
            "delta": normal(B, n_steps, D) - 4,
            "A": -torch.arange(1.0, N + 1).repeat(D, 1),
            "B": normal(B, n_steps, N),
            "C": normal(B, n_steps, N),
            "D": normal(D),
            "z": normal(B, n_steps, D),
            "delta_bias": normal(D),
        }

    rotating = {"size": torch.sigmoid(normal(B, T, D) + 3), "angle": normal(B, T, D)}
    rotating |= {"real": normal(B, T, D), "imaginary": normal(B, T, D)}
    op = functools.partial(selective_scan, delta_softplus=True)
    return {
        f"scan, width {D}": op_case(scan, steps, FORMS, peer=_real_peer, peer_name="mambapy pscan"),
        f"scan, complex, width {D}": plain_case(
            _complex_scan, rotating, peer=_complex_peer, peer_name="s5-pytorch associative_scan", at_least=1
        ),
        f"selective_scan, width {D}, state {N}": op_case(
            op, selective(T), FORMS, peer=_parallel_peer, peer_name="mambapy pscan", at_least=5
        ),
        f"selective_scan, width {D}, state {N}, T {SHORT}": op_case(
            op, selective(SHORT), FORMS, peer=_sequential_peer, peer_name="transformers, sequential", at_least=5
        ),
        f"mamba, width {WIDTH}, expand 2, state {N}, T {SHORT}": mixer_case(
            "mamba", WIDTH, (B, SHORT), FORMS, peer=_mamba_peer, peer_name="transformers MambaMixer", at_least=5
        ),
        f"mamba2, width {WIDTH}, expand 2, state {WIDE_N}": mixer_case(
            f"mamba2(d_state={WIDE_N})",
            WIDTH,
            (B, T),
            FORMS,
            peer=_mamba2_peer,
            peer_name="transformers Mamba2Mixer",
            at_least=2,
        ),
        f"s5, width {WIDTH}, {WIDTH} complex states": mixer_case(
            f"s5(d_state={WIDTH}, conj_sym=False, clip_eigs=False, activation=None)",
            WIDTH,
            (B, T),
            FORMS,
            peer=_s5_peer,
            peer_name="s5-pytorch",
            at_least=1,
        ),
        f"lru, width {D}": mixer_case("lru", D, (B, T), FORMS),
        f"linoss, width {D}": mixer_case("linoss", D, (B, T), FORMS),
        f"rg_lru, width {D}": mixer_case("rg_lru", D, (B, T), FORMS),
        f"min_gru, width {D}": mixer_case("min_gru", D, (B, T), FORMS),
        f"lstm, width {WIDTH}": mixer_case(
            "lstm", WIDTH, (B, T), (), counted="fused", peer=_torch_peer(nn.LSTM), peer_name="torch.nn.LSTM", at_least=1
        ),
        f"gru, width {WIDTH}": mixer_case(
            "gru", WIDTH, (B, T), (), counted="fused", peer=_torch_peer(nn.GRU), peer_name="torch.nn.GRU", at_least=1
        ),
    }


def _complex_scan(size: Tensor, angle: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    return torch.view_as_real(scan(torch.polar(size, angle), torch.complex(real, imaginary))[0])


def _complex_peer() -> Function:
    from s5.jax_compat import associative_scan

    def after(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return second[0] * first[0], second[0] * first[1] + second[1]

    def run(x: Inputs) -> tuple[Tensor, ...]:
        a, b = torch.polar(x["size"], x["angle"]), torch.complex(x["real"], x["imaginary"])
        states = [associative_scan(after, row)[1] for row in zip(a, b, strict=True)]
        return (torch.view_as_real(torch.stack(states)),)

    return run


def _real_peer() -> Function:
    from mambapy.pscan import pscan

    return lambda x: (pscan(x["a"][..., None], x["b"][..., None]).squeeze(-1),)


def _parallel_peer() -> Function:
    from mambapy.pscan import pscan

    def run(x: Inputs) -> tuple[Tensor, ...]:
        dt = F.softplus(x["delta"] + x["delta_bias"])
        states = pscan(torch.exp(dt[..., None] * x["A"]), (dt * x["u"])[..., None] * x["B"][:, :, None])
        y = (states @ x["C"][..., None]).squeeze(-1) + x["D"] * x["u"]
        return (y * F.silu(x["z"]),)

    return run


def _sequential_peer() -> Function:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run(x: Inputs) -> tuple[Tensor, ...]:
        u, delta, z = (x[name].mT for name in ("u", "delta", "z"))
        B, C = x["B"].mT, x["C"].mT
        y = mamba_selective_scan(u, delta, x["A"], B, C, x["D"], z, x["delta_bias"], delta_softplus=True)
        return (y.mT,)

    return run


def _mamba_peer() -> Function:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    layer = MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=N, num_hidden_layers=1), 0)

    def run(x: Inputs) -> tuple[Tensor, ...]:
        weights = {name.replace("conv.", "conv1d."): value for name, value in x.items() if name != "x"}
        weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
        return (functional_call(layer, weights, (x["x"],)),)

    return run


def _mamba2_peer() -> Function:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    head = 64
    sizes = {
        "hidden_size": WIDTH,
        "num_heads": 2 * WIDTH // head,
        "head_dim": head,
        "state_size": WIDE_N,
        "n_groups": 1,
    }
    layer = Mamba2Mixer(Mamba2Config(num_hidden_layers=1, **sizes), 0)

    def run(x: Inputs) -> tuple[Tensor, ...]:
        weights = {name.replace("conv.", "conv1d."): value for name, value in x.items() if name != "x"}
        weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
        return (functional_call(layer, weights, (x["x"],)),)

    return run


def _s5_peer() -> Function:
    from s5.s5_model import apply_ssm, discretize_zoh

    def run(x: Inputs) -> tuple[Tensor, ...]:
        rows, columns = x["in_proj.weight"], x["out_proj.weight"]
        eigenvalues = torch.complex(x["Lambda_re"], x["Lambda_im"])
        into, out = torch.complex(rows[::2], rows[1::2]), torch.complex(columns[:, ::2], -columns[:, 1::2])
        decay, into = discretize_zoh(eigenvalues, into, x["log_step"].exp())
        return (torch.vmap(lambda row: apply_ssm(decay, into, out, x["D"], row)[0])(x["x"]),)

    return run


def _torch_peer(cell: type[nn.LSTM] | type[nn.GRU]) -> Callable[[], Function]:
    layer = cell(WIDTH, WIDTH, batch_first=True)
    return lambda: lambda x: (functional_call(layer, {n: v for n, v in x.items() if n != "x"}, (x["x"],))[0],)
