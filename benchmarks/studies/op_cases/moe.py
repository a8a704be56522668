"""The mixture of experts, beside transformers' blocks and beside a dense layer of the same active width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

import zoo
from zoo.benchmarks.studies.measure import Case, Function, Inputs

N, D, WIDTH, EXPERTS, TOP_K = 4096, 256, 512, 8, 2
MANY = {"n_experts": 64, "top_k": 6, "d_hidden": 128}


def cases() -> dict[str, Case]:
    few = {"n_experts": EXPERTS, "top_k": TOP_K, "d_hidden": WIDTH}
    return {
        "moe, 8 experts of 512, top 2": _case(few, lambda: _mixtral(few), "transformers MixtralSparseMoeBlock", 1),
        "moe, 64 experts of 128, top 6": _case(MANY, lambda: _mixtral(MANY), "transformers MixtralSparseMoeBlock", 1),
        "moe, 8 experts of 512, top 2, beside a dense layer": _case(
            few, _dense, "swiglu(d_hidden=1024), another function of the same work", 1 / 1.5
        ),
    }


def _case(options: dict[str, Any], peer: Any, peer_name: str, at_least: float) -> Case:
    torch.manual_seed(0)
    mixer = zoo.create_mixer("moe", D, **options)
    inputs = {"x": torch.randn(1, N, D), **{n: p.detach().clone() for n, p in mixer.named_parameters()}}
    double = zoo.create_mixer("moe", D, **options).double()
    return Case(
        inputs, lambda _: _calling(mixer), ("auto",), _calling(double), "auto", peer, peer_name, at_least=at_least
    )


def _calling(module: nn.Module) -> Function:
    def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        own = {name: x for name, x in inputs.items() if name != "x"}
        x = inputs["x"].view_as(inputs["x"])  # no leaf: the FLOP counter cannot follow one into a module
        return (functional_call(module, own, (x,))[0],)

    return run


def _mixtral(options: dict[str, Any]) -> Function:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D,
        intermediate_size=options["d_hidden"],
        num_local_experts=options["n_experts"],
        num_experts_per_tok=options["top_k"],
    )
    block = MixtralSparseMoeBlock(config)
    names = {"gate.weight": "router.weight", "experts.gate_up_proj": "up_proj", "experts.down_proj": "down_proj"}
    return lambda x: (functional_call(block, {theirs: x[ours] for theirs, ours in names.items()}, (x["x"],)),)


def _dense() -> Function:
    """As wide as the experts that a token has; its matrices are the first experts', so that theirs get gradients."""

    def run(x: Inputs) -> tuple[torch.Tensor, ...]:
        gate, up = (x["up_proj"][:TOP_K].unflatten(1, (2, WIDTH))[:, i].flatten(0, 1) for i in range(2))
        down = x["down_proj"][:TOP_K].transpose(0, 1).flatten(1)
        own = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        return (functional_call(dense, own, (x["x"],))[0],)

    dense = zoo.create_mixer("swiglu", D, d_hidden=TOP_K * WIDTH)
    return run
