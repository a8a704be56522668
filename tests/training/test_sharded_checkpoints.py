"""Checkpoints in pieces, and Muon's work shared out: what one process can show of them."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from several import ended, start
from torch import nn

from zoo.core.errors import RunError
from zoo.training import checkpoint, checkpoints, pieces
from zoo.training.group import Group
from zoo.training.muon import SharedMuon, orthogonal, owners
from zoo.training.optimizer import kept_by
from zoo.training.resharding import load_rows, own_moments
from zoo.training.shards import own_rows
from zoo.training.writing import Writing


class One(Group):
    """A process of several that says nothing to the others."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(7, 3))
        self.short = nn.Parameter(torch.randn(1))
        self.register_buffer("seen", torch.tensor(3))


def written(folder, model, states, size):
    """A checkpoint of a model as `size` processes write it."""
    folder.mkdir(exist_ok=True)
    temporary, files = checkpoint.begin(folder, 5), {}
    rest, tensors = pieces.moments(states)
    for rank in range(size):
        rows = {k: v[own_rows(len(v), rank, size)] for k, v in model.named_parameters()}
        rows |= dict(model.named_buffers()) if rank == 0 else {}
        own = {k: v[own_rows(len(v), rank, size)] for k, v in tensors.items()}
        each = {checkpoint.WEIGHTS: rows, pieces.OPTIMIZER: own}
        named = {pieces.piece(name, rank, size): part for name, part in each.items()}
        files |= checkpoint.write(temporary, named, {"optimizer": rest} if rank == 0 else None)
    return checkpoint.complete(temporary, 5, files, best=5, config=None)


@pytest.fixture
def saved(tmp_path):
    model = Model()
    moments = {"exp_avg": torch.randn(7, 3), "step": torch.tensor(4.0)}
    states = [{"state": {0: moments, 1: {"exp_avg": torch.randn(1), "step": 4}}, "param_groups": [{"params": [0, 1]}]}]
    return written(tmp_path / "checkpoints", model, states, 4), model, states


def test_a_checkpoint_in_pieces_is_read_as_any_other(saved):
    path, model, states = saved
    assert checkpoints.steps(path.parent) == [5]
    assert sorted(p.name for p in path.glob("weights*")) == [
        f"weights-0000{i}-of-00004.safetensors" for i in range(1, 5)
    ]
    checkpoint.verify(path)
    weights = checkpoint.read_weights(path)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    (found,) = checkpoint.read_training(path)["optimizer"]
    assert torch.equal(found["state"][0]["exp_avg"], states[0]["state"][0]["exp_avg"])
    assert found["state"][1]["step"] == 4
    (outline,) = checkpoint.read_training(path, values=False)["optimizer"]
    assert outline["state"][0]["exp_avg"].is_meta
    assert outline["state"][0]["exp_avg"].shape == (7, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_any_number_of_processes_reads_its_rows(saved, size):
    path, model, states = saved
    files = [path / name for name in checkpoint.files_of(checkpoint.read_manifest(path), average=True)]
    shapes = pieces.shapes(files)
    parts = [pieces.read_rows(files, shapes, rank, lambda name: 1 if name == "seen" else size) for rank in range(size)]
    assert [len(part["wide"]) for part in parts] == [len(range(7)[own_rows(7, rank, size)]) for rank in range(size)]
    for name, tensor in model.named_parameters():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    assert all(part["seen"] == 3 for part in parts)
    rows = [own_moments(path, One(rank, size), {"0.0": size, "0.1": size}) for rank in range(size)]
    assert torch.equal(torch.cat([part["0.0.exp_avg"] for part in rows]), states[0]["state"][0]["exp_avg"])


def test_a_damaged_piece_is_told_in_one_line(saved):
    path, model, _ = saved
    wrong = nn.Linear(2, 2)
    with pytest.raises(checkpoint.Damaged, match="belongs to another model"):
        load_rows(wrong, path, Group())
    (path / "weights-00003-of-00004.safetensors").write_bytes(b"0" * 9)
    with pytest.raises(checkpoint.Damaged, match=r"weights-00003-of-00004.safetensors is truncated"):
        checkpoint.read_weights(path)
    with pytest.raises(checkpoint.Damaged, match="cannot be read by every process"):
        load_rows(model, path, Group())
    manifest = json.loads((path / "manifest.json").read_text())
    assert ".metadata" not in manifest["files"]


def test_a_piece_that_is_missing_from_the_manifest_makes_no_checkpoint(tmp_path):
    temporary = checkpoint.begin(tmp_path, 3)
    name = pieces.piece(checkpoint.WEIGHTS, 0, 2)
    files = checkpoint.write(temporary, {name: {"w": torch.zeros(1)}}, {})
    path = checkpoint.complete(temporary, 3, files, best=None, config=None)
    with pytest.raises(checkpoint.Damaged, match=r"names no weights.safetensors"):
        checkpoint.verify(path)


def test_a_checkpoint_appears_when_all_of_it_is_written(tmp_path):
    rows = {"w": torch.arange(3.0)}
    writing = Writing(Group(), tmp_path, 7, {checkpoint.WEIGHTS: rows}, {"optimizer": []}, best=None, config={})
    assert not checkpoints.steps(tmp_path)
    rows["w"].zero_()  # training goes on
    path = writing.end()
    assert checkpoint.read_weights(path)["w"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["step_7"]


def test_a_full_disk_leaves_no_checkpoint(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    rows = {checkpoint.WEIGHTS: {"w": torch.zeros(1)}}
    writing = Writing(Group(), tmp_path, 7, rows, {}, best=None, config={})
    with pytest.raises(RunError, match=r"Cannot write .*step_7: No space left on device"):
        writing.end()
    assert not list(tmp_path.iterdir())


def test_pieces_are_plain_safetensors(saved):
    path, model, _ = saved
    parts = [safetensors.torch.load_file(file) for file in sorted(path.glob("weights-*"))]
    assert torch.equal(torch.cat([part["wide"] for part in parts]), model.wide)


def test_a_model_in_pieces_is_freed(tmp_path):
    code = """
import gc, weakref, torch, torch.distributed as dist
from zoo.models.create import create_model
from zoo.training.processes import Processes
from zoo.training.train_options import TrainConfig
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = Processes()
with torch.device("meta"):
    model = create_model("gqa swiglu", d_model=16, vocab_size=32)
group.cut(model, TrainConfig(parallel="fsdp"), torch.device("cpu"))
with group.together(model), torch.no_grad():
    model(torch.zeros(1, 3, dtype=torch.int64))
kept = weakref.ref(model)
del model
gc.collect()
print(kept() is None)
"""
    ((status, out, err),) = ended(start(1, "-c", code, cwd=tmp_path))
    assert (status, out.strip()) == (0, "True"), err


# ---- Muon


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_shared_muon_has_the_bits_of_torch(scaling, nesterov):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((12, 20), (20, 12), (9, 9))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    how = {"weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 5, "adjust_lr_fn": scaling}
    pair = SharedMuon(ours, 0.02, **how), torch.optim.Muon(theirs, 0.02, **how)
    assert kept_by(pair[0]) == kept_by(pair[1]) == {"momentum_buffer"}
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_work_is_shared_out_evenly():
    shapes = ((512, 512),) * 6 + ((16, 16),) * 5
    found = owners(shapes, 3)
    assert [found[:6].count(rank) for rank in range(3)] == [2, 2, 2]
    assert set(owners(shapes[:2], 4)) == {0, 1}


def test_orthogonal_updates():
    values = torch.linalg.svdvals(orthogonal(torch.randn(30, 10).bfloat16(), 5).float())
    assert 0.6 < values.min() <= values.max() < 1.3
