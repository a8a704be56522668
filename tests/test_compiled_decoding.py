"""`generate(..., compile=True)`: the tokens of the eager decoder by one graph, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from typer.testing import CliRunner

import zoo
from zoo.cli import app
from zoo.core.errors import UsageError
from zoo.laws.compare import assert_close
from zoo.models import compiled_step as compiled_step_module
from zoo.models import graph_packages
from zoo.models.compiled_step import capacity_of, compiled_step, laid_out
from zoo.models.generation import ROOM
from zoo.ops import native
from zoo.protocol import Traits, mixers
from zoo.training import evaluation
from zoo.training.evaluation import evaluate, held_out
from zoo.training.fit import fit

PATTERNS = (
    "mha swiglu",
    "swa(window=8)",
    "gated_deltanet swiglu",
    "mamba2",
    "rwkv7 rwkv_channel_mix",
    "mamba2 gqa moe",
)


def model_of(pattern: str, seed: int = 0) -> zoo.Model:
    torch.manual_seed(seed)
    model = zoo.create_model(pattern, d_model=32, vocab_size=40).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compiled(folder: Path) -> list[Path]:
    return sorted((folder / "kernels" / "graphs").glob("*.pt2"))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder of compiled graphs, beside the kernels that there are."""
    kernels = native.folder()
    (tmp_path / "kernels").mkdir(mode=0o700)
    for path in kernels.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "kernels")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    native.folder.cache_clear()
    yield tmp_path
    native.folder.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_tokens_are_those_of_the_eager_decoder_by_one_graph(pattern, monkeypatch, folder):
    counters.clear()
    model, prompts = model_of(pattern), torch.randint(0, 40, (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = model.generate(prompts, max_new_tokens=30, compile=True)
        longer = model.generate(prompts[:, :3], max_new_tokens=12, compile=True)
    assert torch.equal(found, model.generate(prompts, max_new_tokens=30))
    assert torch.equal(longer, model.generate(prompts[:, :3], max_new_tokens=12))
    assert len(compiled(folder)) == 1
    assert not counters["graph_break"]
    stop = int(found[0, 8])
    ended = model.generate(prompts, max_new_tokens=30, stop=stop, compile=True)
    for a, b in zip(ended, model.generate(prompts, max_new_tokens=30, stop=stop), strict=True):
        assert torch.equal(a, b)
    # other weights of the same architecture, which another process may have: nothing is compiled
    monkeypatch.setattr(graph_packages, "_compile", lambda *given: pytest.fail("it is compiled again"))
    other = model_of(pattern, seed=1)
    assert torch.equal(
        other.generate(prompts, max_new_tokens=30, compile=True), other.generate(prompts, max_new_tokens=30)
    )
    with torch.no_grad():  # learned meanwhile
        for parameter in other.parameters():
            parameter.mul_(0.9)
    assert torch.equal(
        other.generate(prompts, max_new_tokens=30, compile=True), other.generate(prompts, max_new_tokens=30)
    )


@pytest.mark.slow
def test_a_step_writes_into_the_caches_that_it_is_given(folder):
    model = model_of("mha")
    tokens = torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        state = model.init_state(2, capacity=256)
        step = compiled_step(model, tokens, state)
        places = [x.data_ptr() for x in tree_leaves(state) if x.ndim == 4]
        for _ in range(3):
            _, state = step(tokens, state)
    assert len(places) == 2
    assert [x.data_ptr() for x in tree_leaves(state) if x.ndim == 4] == places


@pytest.mark.slow
def test_a_later_process_loads_the_graph_without_the_compiler(folder):
    code = """
import sys, time, torch, zoo
torch.manual_seed(0)
model = zoo.create_model("gated_deltanet", d_model=16, vocab_size=16)
steps = model.stream(torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=3, compile=True)
next(steps), next(steps)
print(time.process_time(), "torch._inductor" in sys.modules)
"""
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert [imported for _, imported in said] == ["True", "False"]
    assert float(said[1][0]) < 6  # of processor time, the start of Python and torch included; 2.3 on a quiet machine


@pytest.mark.slow
@pytest.mark.parametrize("word", [w for w in zoo.list_mixers() if mixers[w].causal])
def test_a_step_of_every_word_is_traced_without_its_weights(word):
    """The traced step gives what another model of the architecture gives, by that model's weights alone."""
    pattern = word if mixers[word].kind == "sequence" else f"mha {word}"
    model, other = model_of(pattern), model_of(pattern, seed=1)
    tokens = torch.tensor([3, 5])
    with torch.no_grad():
        _, state = other.features(torch.randint(0, 40, (2, 7)), other.init_state(2, capacity=16))
        state = tree_map(laid_out, state)
        leaves, form = tree_flatten(state)
        names = tuple(compiled_step_module._weights(model))
        inputs = [tokens, *leaves, *compiled_step_module._weights(model).values()]
        program = torch.export.export(compiled_step_module._Traced(model, form, names), (inputs,), strict=False)
        given = [tokens, *(x.clone() for x in leaves), *compiled_step_module._weights(other).values()]
        logits, *after = program.module()(given)
        expected, state = other.step(tokens, state)
    assert_close((logits, after), (expected, tree_leaves(state)), 2e-5, word)


def test_a_graph_is_named_by_what_it_depends_on():
    one = model_of("mha swiglu")
    name = graph_packages.identity(one, "sizes")
    assert name == graph_packages.identity(model_of("mha swiglu", seed=1), "sizes")
    assert name != graph_packages.identity(one, "other sizes")
    assert name != graph_packages.identity(model_of("mha(rope=False) swiglu"), "sizes")
    one.generate(torch.zeros(1, 2, dtype=torch.int64), max_new_tokens=3)
    assert name == graph_packages.identity(one, "sizes")
    handle = one.norm.register_forward_hook(lambda *given: None)
    assert graph_packages.identity(one, "sizes") is None
    handle.remove()
    one.norm.__class__ = type("Strange", (type(one.norm),), {"__module__": "elsewhere"})
    assert graph_packages.identity(one, "sizes") is None


@pytest.mark.parametrize("attach", [register_module_forward_hook, register_module_full_backward_hook])
def test_a_graph_has_no_name_while_hooks_of_all_modules_are_there(attach):
    model = model_of("mamba2")
    handle = attach(lambda *given: None)
    try:
        assert graph_packages.identity(model, "sizes") is None
    finally:
        handle.remove()
    assert graph_packages.identity(model, "sizes") is not None


def test_another_hook_in_place_of_one_has_the_step_compiled_anew(monkeypatch):
    built = []
    monkeypatch.setattr(compiled_step_module, "refuse_uncompilable", lambda model: None)
    monkeypatch.setattr(compiled_step_module, "build", lambda *given: built.append(given))
    model, tokens = model_of("mamba2"), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        handle = model.norm.register_forward_hook(lambda *given: None)
        for _ in range(2):
            compiled_step(model, tokens, model.init_state(1))
        handle.remove()
    assert len(built) == 2


def test_a_package_that_was_changed_is_made_again_and_never_loaded(folder, monkeypatch):
    made, loaded = [], []
    monkeypatch.setattr(
        graph_packages, "_compile", lambda traced, inputs, path: made.append(path.write_bytes(b"graph"))
    )
    monkeypatch.setattr(graph_packages, "_load", lambda path, device: loaded.append(path.read_bytes()))
    place = torch.device("cpu")
    for _ in range(2):
        graph_packages.build(torch.nn.Identity(), [], "name", place)
    assert len(made) == 1
    native.compiled_graphs().joinpath("name.pt2").write_bytes(b"other")
    graph_packages.build(torch.nn.Identity(), [], "name", place)
    graph_packages.build(torch.nn.Identity(), [], None, place)
    assert len(made) == 3
    assert loaded == [b"graph"] * 4
    assert [path.name for path in compiled(folder)] == ["name.pt2"]


def test_an_evaluation_compiles_the_steps_of_whole_batches(monkeypatch):
    monkeypatch.setattr(
        compiled_step_module,
        "compiled_step",
        lambda model, tokens, state: lambda t, s: calls.append(len(t)) or plain(t, s),
    )
    monkeypatch.setattr(compiled_step_module, "why_not_compiled", lambda model: None)
    monkeypatch.setattr(evaluation, "why_not_compiled", lambda model: None)
    sudoku = {"name": "sudoku", "size": 4, "max_givens": 6}
    task, objective, config = fit(sudoku, "next_token", {"pattern": "gated_deltanet", "d_model": 16})
    model, calls = zoo.create_model(config).eval(), []
    plain, rows = model.step, held_out(task, "validation", 5)
    found = evaluate(model, objective, rows, batch_size=2, compile=True)
    assert set(calls) == {2}  # the last row is alone
    assert found == evaluate(model, objective, rows, batch_size=2)
    assert "step" not in vars(model)


def test_what_cannot_compile_is_refused_in_one_line(monkeypatch, tmp_path):
    model, prompt = model_of("mha"), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(UsageError, match="compile='yes' is not allowed: it should be True or False"):
        model.generate(prompt, max_new_tokens=2, compile="yes")
    with monkeypatch.context() as patched:
        patched.setattr(model.mixers()[0], "traits", Traits(not_compilable="it counts"))
        with pytest.raises(UsageError, match="compile=True does not serve mha: it counts"):
            model.generate(prompt, max_new_tokens=2, compile=True)
    with monkeypatch.context() as patched:
        patched.setattr(native, "_compiler", lambda: None)
        with pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
            model.generate(prompt, max_new_tokens=2, compile=True)
    open_to_all = tmp_path / "graphs"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(open_to_all))
    with pytest.raises(UsageError, match=r"others may write to .*TORCHINDUCTOR_CACHE_DIR"):
        model.generate(prompt, max_new_tokens=2, compile=True)


def test_the_capacity_is_a_power_of_two():
    assert [capacity_of(n) for n in (1, 256, 257, ROOM)] == [256, 256, 512, ROOM]


def test_an_example_takes_no_compiled_step(tmp_path):
    found = CliRunner().invoke(app, ["generate", str(tmp_path), "--example", "0", "--compile"])
    assert "--compile cannot go with it" in str(found.exception) + found.output
