"""Kernels are built and loaded outside of what torch.compile traces, in a process that has loaded none of them."""

from __future__ import annotations

import logging
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import zoo
from zoo.laws import noise
from zoo.ops import constant_weights, gated_mlp, gated_norm, native, normed_product, plain_norm, silu_product

N = 300  # steps: more than any op takes without its kernel


def floats(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(0.3 * noise(*shape, seed=i)).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def mixed(word: str, backward: bool = True) -> tuple[Callable[..., object], list[Tensor]]:
    """A pass of a mixer; one of its steps where nothing learns."""
    mixer = zoo.create_mixer(word, 32)
    if backward:
        return lambda x: mixer(x)[0], floats((1, N, 32))
    mixer.eval().requires_grad_(False)
    return lambda x: mixer.step(x, mixer.init_state(1, capacity=N))[0], [noise(1, 32).float()]


def perceptron(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    """As a recursive model calls it."""

    def f(*inputs: Tensor) -> Tensor:
        with constant_weights(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return gated_mlp(*inputs)

    return f, floats((N, 24), (40, 24), (40, 24), (24, 40))


def thinking() -> tuple[Callable[..., object], list[Tensor]]:
    options = {"placement": "post", "causal": False, "max_len": N, "recursion": {"cycles": 2, "updates": 1}}
    model = zoo.create_model("swiglu", d_model=32, vocab_size=20, **options)
    return lambda tokens: model.think(tokens).hidden, [torch.ones(1, N, dtype=torch.int64)]


HEADS = (1, N, 2, 4)


def without_gradients(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A function of its own: torch compiles what it calls directly at most eight times."""
    return zoo.ops.delta_rule(*inputs)


CALLS: dict[str, Callable[[], tuple[Callable[..., object], list[Tensor]]]] = {
    "causal_conv1d": lambda: (zoo.ops.causal_conv1d, floats((1, N, 32), (32, 3))),
    "cfc": lambda: mixed("cfc"),
    "delta": lambda: (zoo.ops.delta_rule, floats(HEADS, HEADS, HEADS, HEADS[:3])),
    "gated_mlp": lambda: perceptron(torch.float32),
    "gated_mlp, bfloat16": lambda: perceptron(torch.bfloat16),
    "gated_norm": lambda: (gated_norm, floats((N, 70), (N, 70), (70,))),
    "gated_mlp, with a norm inside": lambda: (
        partial(gated_mlp, inner_norm=True),
        floats((N, 24), (40, 24), (40, 24), (24, 40)),
    ),
    "gated_mlp, in a recursive model": thinking,
    "heads_pass": lambda: (without_gradients, [x.detach() for x in floats(HEADS, HEADS, HEADS, HEADS[:3])]),
    "index_scores": lambda: mixed("dsa(top_k=2)", backward=False),
    "latent_attention": lambda: mixed("mla", backward=False),
    "linear_attention": lambda: (zoo.ops.linear_attention, floats(HEADS, HEADS, HEADS)),
    "ltc": lambda: mixed("ltc(d_hidden=8)"),
    "m2rnn": lambda: mixed("m2rnn"),
    "mlstm": lambda: (zoo.ops.mlstm, floats(HEADS, HEADS, HEADS, HEADS[:3], HEADS[:3])),
    "normed_product": lambda: (normed_product, floats((N, 70), (N, 70))),
    "oscillate": lambda: (zoo.ops.oscillate, floats((1, N, 8), (8,), (8,), (8,))),
    "plain_norm": lambda: (plain_norm, floats((N, 70))),
    "scan": lambda: (zoo.ops.scan, floats((1, N, 8), (1, N, 8))),
    "selective_scan": lambda: (zoo.ops.selective_scan, floats((1, N, 8), (1, N, 8), (8, 4), (1, N, 4), (1, N, 4))),
    "silu_product": lambda: (silu_product, floats((N, 70), (N, 70))),
    "slstm": lambda: mixed("slstm"),
}


def main() -> None:
    """Compiles a call of every op with a kernel, each the first in this process; prints what torch says of it."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("torch", "torch._dynamo", "torch._functorch", "torch.fx"):
        logging.getLogger(name).addHandler(handler)
    assert native.load.cache_info().currsize == 0, "kernels were loaded on import"
    for name, call in CALLS.items():
        function, inputs = call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for of_torch in ("`torch.jit.script` is deprecated", ".*Function'> should not be instantiated"):
                warnings.filterwarnings("ignore", of_torch)
            outputs = tree_leaves(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs))
            if any(output.requires_grad for output in outputs):
                sum(output.sum() for output in outputs if output.requires_grad).backward()
        if said:
            print(f"{name}: {said}")
            said.clear()


def test_every_kernel_is_called():
    untraced = {"probe", "step", "cell"}  # the last two serve single steps in eager mode alone
    kernels = {path.stem for path in native.SOURCES.glob("*.cpp")} - untraced
    assert {name.partition(",")[0] for name in CALLS} == kernels


@pytest.mark.slow
def test_a_fresh_process_traces_every_op_in_one_graph():
    if why_not := native.why_not():  # asked here, as this file is what the process runs
        pytest.skip(why_not)
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__))],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(zoo.__file__).parents[1],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


if __name__ == "__main__":
    main()
