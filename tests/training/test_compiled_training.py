"""`train.compile`: every word and every objective as one graph, traced once, with the losses of eager layers."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import zoo
from zoo.core.errors import UsageError
from zoo.laws.compare import assert_close, assert_close_gradients
from zoo.models.ends import Ends
from zoo.objectives.base import Objective
from zoo.protocol import mixers
from zoo.training.compiling import compile_layers
from zoo.training.fit import fit

MQAR = {"name": "mqar", "seq_len": 12, "n_pairs": 2, "vocab_size": 20}
SUDOKU = {"name": "sudoku", "size": 4, "max_givens": 6}
FAST = {"gated_deltanet", "swiglu"}
WORDS = [pytest.param(w, marks=[] if w in FAST else pytest.mark.slow) for w in zoo.list_mixers()]
MHA = {"pattern": "mha swiglu"}
TRM = {
    "pattern": 'token_mlp(norm_axis="time") swiglu',
    "placement": "post",
    "norm": "rmsnorm_plain",
    "recursion": {"cycles": 2, "updates": 2},
}
OBJECTIVES: dict[str, tuple[Any, dict[str, Any], int]] = {  # of each a task, a model, and the graphs of its layers
    "next_token": (MQAR, MHA, 1),
    "masked_diffusion": (SUDOKU, {**MHA, "causal": False}, 1),
    "uniform_diffusion": (SUDOKU, {**MHA, "causal": False}, 1),
    "block_diffusion": (SUDOKU, MHA, 3),  # the prompt, a finished block and the noisy ones
    "deep_supervision": (SUDOKU, {**TRM, "causal": False}, 2),  # with and without gradients
    "regression": ({"name": "oscillators", "n_steps": 12}, MHA, 1),
    "classification": ({"name": "digits"}, MHA, 1),
}


def losses_and_gradients(model: Ends, objective: Objective, batches: list[Any]) -> tuple[list[Any], list[Any]]:
    losses, gradients, carry = [], [], {}
    for data in batches:
        model.zero_grad(set_to_none=True)
        update = next(objective.updates(model, data, carry, torch.Generator().manual_seed(0)))
        update.loss.backward()
        losses.append(update.loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return losses, gradients


def check(task: Any, name: str, options: dict[str, Any], monkeypatch, graphs: int = 1) -> None:
    """Two steps of compiled layers: the losses and gradients of eager ones, as few graphs, and nothing said."""
    torch.manual_seed(0)
    _, objective, config = fit(task, name, {"d_model": 32, **options})
    model = zoo.create_model(config).train()
    rows = [objective.task.sample(4, split="train", seed=0, start=4 * i) for i in range(2)]
    batches = [objective.encode(batch) for batch in rows]
    buffers = [b.clone() for b in model.buffers()]
    expected = losses_and_gradients(model, objective, batches)
    for b, before in zip(model.buffers(), buffers, strict=True):
        b.copy_(before)
    torch._dynamo.reset()
    counters.clear()
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    whole = torch.nn.Module.compile
    by_aot = functools.partialmethod(whole, backend="aot_eager")  # of inductor the law of compilation judges
    monkeypatch.setattr(torch.nn.Module, "compile", by_aot)
    with warnings.catch_warnings(record=True) as shown, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        for name in ("torch", "torch._dynamo", "torch._functorch"):
            logging.getLogger(name).addHandler(handler)
            stack.callback(logging.getLogger(name).removeHandler, handler)
        compile_layers(model, lambda: next(objective.updates(model, batches[0], {}, torch.Generator())).loss)
        found = losses_and_gradients(model, objective, batches)
    assert not [*said, *(str(w.message) for w in shown)]
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert_close(found[0], expected[0], 2e-5, "losses")
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    for got, wanted in zip(found[1], expected[1], strict=True):
        assert_close_gradients(got, wanted, 2e-5, "compiled", names)


@pytest.mark.parametrize("word", WORDS)
def test_a_training_step_of_every_word_is_one_graph(word, monkeypatch):
    kind = mixers[word]
    pattern = word if kind.kind == "sequence" else f"mha {word}"
    task = MQAR if kind.causal else SUDOKU
    check(task, "next_token", {"pattern": pattern, "causal": kind.causal}, monkeypatch)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "deep_supervision" else pytest.mark.slow) for n in OBJECTIVES]
)
def test_a_training_step_under_every_objective_is_one_graph(name, monkeypatch):
    task, options, graphs = OBJECTIVES[name]
    check(task, name, options, monkeypatch, graphs)


def test_every_objective_is_compiled_here():
    assert {*OBJECTIVES} == {*zoo.list_objectives()}


def test_what_cannot_be_compiled_is_refused_in_one_line(recipe, tmp_path, monkeypatch):
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=match):
            zoo.train(recipe, {f"train.{key}": value for key, value in options.items()}, quiet=True)

    refused("train.cuda_graphs=true replays what train.compile=true compiles: set both", cuda_graphs=True)
    told = "train.cuda_graphs=true needs a GPU of NVIDIA, and the device is cpu"
    refused(told, cuda_graphs=True, compile=True, device="cpu")
    with monkeypatch.context() as patched:
        patched.setenv("CXX", str(tmp_path / "none"))
        refused("train.compile=true needs a C.. compiler: install", compile=True, device="cpu")
    open_to_all = tmp_path / "graphs"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(open_to_all))
    refused("train.compile=true has no folder for what it compiles: others may write to", compile=True)
    assert not (tmp_path / "runs").exists()
