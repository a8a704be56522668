"""Processes that share out the experts of moe: the gradients and losses of one process that holds them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from several import PARTS, ROOT, at_end, distance, ended, in_processes, start, train

from zoo.cli import main
from zoo.ops import grouped_feed_forward

FIGURES = {"loss", "accuracy", "exact", "grad_norm", "step", "tokens"}


def compare(n: int, jobs: dict[str, dict[str, object]], folder: Path) -> None:
    """Train each kind with these options in n processes, and in one process without them."""
    given = [",".join([k, f"{k}-n", *(f"{o}={json.dumps(v)}" for o, v in more.items())]) for k, more in jobs.items()]
    in_processes(n, *given, cwd=folder)
    for kind in jobs:
        alone = train(kind, folder / f"{kind}-1", **({"accumulate": n} if kind in PARTS else {}))
        first, *others = [torch.load(folder / f"{kind}-n.{rank}.pt") for rank in range(n)]
        size = torch.cat([g.flatten() for g in alone]).norm()
        for ours, theirs in zip(first, alone, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * size, kind
        assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))
        ours, theirs = (
            [json.loads(line) for line in (folder / f"{kind}-{run}/metrics.jsonl").read_text().splitlines()]
            for run in ("n", 1)
        )
        for line, expected in zip(ours, theirs, strict=True):
            for key in FIGURES & expected.keys():
                assert line[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12), (kind, key)


def test_two_processes_that_share_out_experts_train_as_one(tmp_path):
    compare(2, {"early_experts": {"expert_parallel": 2}}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "train.expert_parallel=2: start several processes: --processes 2."),
        (("--processes", "3", "train.batch_size=6"), "3 processes cannot be divided into groups that share out"),
        (("--processes", "2"), "the model has no experts to share out. Put moe into its pattern"),
        (
            ("--processes", "2", "model.pattern=shortcut(moe(n_experts=9), gqa swiglu)"),
            "it does not divide the 9 experts of moe. Choose from 1, 3, 9.",
        ),
        (("--processes", "2", "train.compile=true"), "train.expert_parallel=2: train.compile is not allowed with it"),
    ],
)
def test_experts_that_cannot_be_shared_out_are_refused(arguments, told, recipe, capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", recipe, "train.expert_parallel=2", *arguments])
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert not Path("runs").exists()


def test_experts_without_rows_have_a_gradient():
    """All that is exchanged is then part of every process's graph."""
    rows = torch.randn(3, 4, requires_grad=True)
    up, down = (torch.randn(2, *shape, requires_grad=True) for shape in ((6, 4), (4, 6)))
    y = grouped_feed_forward(rows, torch.tensor([0, 0]), up, down, torch.tanh)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(3, 4))
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (rows, up, down))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_and_two_holders_of_every_expert_train_as_one(parallel, tmp_path):
    four, two = ({"expert_parallel": n, "parallel": parallel} for n in (4, 2))
    jobs = {"experts": four, "early_experts": two, "balance_loss": two, "expert_puzzles": two}
    compare(4, jobs, tmp_path)


@pytest.mark.slow
def test_experts_of_sequences_that_are_cut_and_of_layers_that_are_computed_again(tmp_path):
    cut = {"expert_parallel": 2, "sequence_processes": 2, "recompute": True}
    compare(4, {"experts": cut, "early_experts": {**cut, "accumulate": 2, "parallel": "fsdp"}}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parallel"), [("early_experts", "ddp"), ("experts", "fsdp")])
def test_a_run_with_experts_shared_out_by_four_is_resumed_by_any_number(kind, parallel, tmp_path, monkeypatch):
    """By four to the same bits; by two and by one, with experts shared out or whole, to within rounding."""
    monkeypatch.chdir(tmp_path)
    two, four = (f'parallel="{parallel}",schedule="constant",expert_parallel={n}' for n in (2, 4))
    in_processes(4, f"{kind},whole,{two}", f"{kind},cut,{two},steps=13", f"{kind},again,{two},steps=13")
    for name in ("all", "two", "one", "other", "pieces"):
        shutil.copytree("cut", name)
    in_processes(4, f"{kind},again,{two}", f"{kind},all,{four}")
    held, plain = ('parallel="fsdp",schedule="constant"', 'parallel="ddp",schedule="constant"')
    in_processes(2, f"{kind},two,{two}", f"{kind},other,{plain}", f"{kind},pieces,{held}")
    train(kind, "one", schedule="constant")
    files = {p.name: p.read_bytes() for p in at_end("whole").glob("*.safetensors")}
    assert len(files) == (12 if kind == "early_experts" else 8)
    assert files == {p.name: p.read_bytes() for p in at_end("again").glob("*.safetensors")}
    for run in ("all", "two", "one", "other", "pieces"):
        assert distance(run, "whole") < 1e-9, run
    in_processes(2, f"{kind},one,{two},steps=24")  # a whole checkpoint, whose experts are shared out
    assert len(list(Path("one/checkpoints/step_24").glob("weights-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_generation_and_evaluation_of_unequal_length_with_experts_shared_out(parallel, tmp_path):
    """Every process may call the model as often as it likes: those that are done still answer for their experts."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import zoo
from zoo.training.options import TrainConfig
from zoo.training.processes import join
from zoo.training.session import Session
from zoo.models.create import model_config
group, config = join(), TrainConfig(parallel={parallel!r}, expert_parallel=2, device="cpu")
group.share_experts(2)
spec = model_config("gated_deltanet engram shortcut(moe(n_experts=4), gqa swiglu)", d_model=16, vocab_size=32)
model = Session(spec, config, torch.device("cpu"), group=group).model
alone = Session(spec, TrainConfig(device="cpu"), torch.device("cpu")).model
prompts = [[1, 2, 3], [4]]
for lower in (False, True):
    with group.together(model):
        if group.rank == 1:
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                found = model.generate(prompts, max_new_tokens=7 + group.rank, temperature=0.0)
                expected = alone.generate(prompts, max_new_tokens=8, temperature=0.0)
            assert [t.tolist() for t in found] == [t.tolist() for t in expected]
here = lambda p: p.to_local() if hasattr(p, "to_local") else p
pairs = [(name, p) for name, p in model.named_parameters() if name.endswith(("up_proj", "down_proj")) and p.ndim == 3]
print(sum(here(p).numel() for _, p in pairs), sum(p.numel() for _, p in pairs))
"""
    found = ended(start(2, "-c", code, cwd=tmp_path))
    assert [status for status, _, _ in found] == [0, 0], found
    for _, out, _ in found:
        held, everything = map(int, out.split()[:2])
        assert 2 * held == everything > 0
