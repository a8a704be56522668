"""Runs whose weights lie in pieces in several processes: resumed by other numbers of them, killed, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from several import HELD, ROOT, at_end, distance, ended, in_processes, start, train

import zoo
from zoo.training import checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "deep_supervision", "next_token"])
def test_a_run_of_four_processes_is_resumed_by_any_number(kind, tmp_path, monkeypatch):
    """By four to the same bits; by two and by one, in pieces or whole, to within rounding."""
    monkeypatch.chdir(tmp_path)
    in_processes(4, f"{kind},whole,{HELD}", f"{kind},cut,{HELD},steps=13", f"{kind},again,{HELD},steps=13")
    for name in ("two", "one", "other"):
        shutil.copytree("cut", name)
    in_processes(4, f"{kind},again,{HELD}")
    in_processes(2, f"{kind},two,{HELD}", f'{kind},other,parallel="ddp",schedule="constant"')
    train(kind, "one", schedule="constant")
    files = {p.name: p.read_bytes() for p in at_end("whole").glob("*.safetensors")}
    assert len(files) in (8, 12)
    assert files == {p.name: p.read_bytes() for p in at_end("again").glob("*.safetensors")}
    for run in ("two", "one", "other"):
        assert distance(run, "whole") < 1e-9, run
    assert len(list(at_end("two").glob("weights-*"))) == 2
    assert (at_end("other") / checkpoint.WEIGHTS).exists()
    model = zoo.load("whole")
    assert all(torch.equal(p, zoo.load("again").get_parameter(name)) for name, p in model.named_parameters())
    in_processes(2, f"{kind},one,{HELD},steps=24")  # a whole checkpoint, taken in pieces
    assert len(list(Path("one/checkpoints/step_24").glob("weights-*"))) == 2


@pytest.mark.slow
def test_generation_and_evaluation_of_unequal_length_in_pieces(tmp_path):
    """Every process may call the model as often as it likes: all gather weights with those that still call it."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import zoo
from zoo.training.options import TrainConfig
from zoo.training.processes import join
from zoo.training.session import Session
from zoo.models.create import model_config
group, config = join(), TrainConfig(parallel="fsdp", device="cpu")
spec = model_config("2*(gated_deltanet swiglu)", d_model=16, vocab_size=32)
model = Session(spec, config, torch.device("cpu"), group=group).model
alone = Session(spec, config, torch.device("cpu")).model
prompts = [[1, 2, 3], [4]]
for _ in range(2):
    with group.together(model):
        if group.rank == 1:
            found = model.generate(prompts, max_new_tokens=7 + group.rank, temperature=0.0)
            expected = alone.generate(prompts, max_new_tokens=8, temperature=0.0)
            assert [t.tolist() for t in found] == [t.tolist() for t in expected]
    print(sum(p.to_local().numel() for p in model.parameters()), sum(p.numel() for p in alone.parameters()))
"""
    found = ended(start(2, "-c", code, cwd=tmp_path))
    assert [status for status, _, _ in found] == [0, 0], found
    for _, out, _ in found:
        held, everything = map(int, out.split()[:2])
        assert held < 0.6 * everything
