"""`generate(..., compile=True)`: the tokens of the eager decoder by one graph, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from typer.testing import CliRunner

import zoo
from zoo.cli import app
from zoo.core.errors import UsageError
from zoo.models import compiled_step
from zoo.models.generation import ROOM
from zoo.ops import native
from zoo.protocol import Traits

WORDS = ("mha", "swa(window=8)", "gated_deltanet", "mamba2", "rwkv7")


def model_of(pattern: str) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.create_model(pattern, d_model=32, vocab_size=40).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_the_tokens_are_those_of_the_eager_decoder_by_one_graph(word, monkeypatch, tmp_path):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    native.folder.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    model, prompts = model_of(f"{word} swiglu"), torch.randint(0, 40, (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = model.generate(prompts, max_new_tokens=30, compile=True)
        longer = model.generate(prompts[:, :3], max_new_tokens=12, compile=True)
    assert torch.equal(found, model.generate(prompts, max_new_tokens=30))
    assert torch.equal(longer, model.generate(prompts[:, :3], max_new_tokens=12))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert any((tmp_path / "kernels" / "graphs").iterdir())
    stop = int(found[0, 8])
    ended = model.generate(prompts, max_new_tokens=30, stop=stop, compile=True)
    for a, b in zip(ended, model.generate(prompts, max_new_tokens=30, stop=stop), strict=True):
        assert torch.equal(a, b)
    assert counters["stats"]["unique_graphs"] == 1
    native.folder.cache_clear()


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
    assert [compiled_step.capacity_of(n) for n in (1, 256, 257, ROOM)] == [256, 256, 512, ROOM]


def test_an_example_takes_no_compiled_step(tmp_path):
    found = CliRunner().invoke(app, ["generate", str(tmp_path), "--example", "0", "--compile"])
    assert "--compile cannot go with it" in str(found.exception) + found.output
