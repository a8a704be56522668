"""What goes wrong in a run is told in one line, and nothing on the disk is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import zoo
from zoo.core.errors import RunError
from zoo.training import checkpoint
from zoo.training.loading import load
from zoo.training.loop import Trainer
from zoo.training.train import train

RUN = Path("runs/small")


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_loss_that_is_not_finite(recipe):
    with pytest.raises(RunError) as error:
        train(recipe, {"train.lr": 1e25, "train.clip": None, "train.checkpoint_every": 1}, quiet=True)
    text = one_line(error)
    assert "not finite" in text or "became" in text
    assert "train.lr (now 1e+25)" in text
    assert json.loads((RUN / "result.json").read_text())["status"] == "failed"


def test_loss_that_turns_bad_keeps_the_last_good_checkpoint(recipe, monkeypatch):
    original = Trainer._step

    def stepping(self, data):
        update = original(self, data)
        if self.at.step == 16:
            self.loss_sum.fill_(float("nan"))
            next(self.model.parameters()).data.fill_(float("nan"))
        return update

    monkeypatch.setattr(Trainer, "_step", stepping)
    with pytest.raises(RunError, match=r"became nan by step 20.*The last good checkpoint is .*step_14"):
        train(recipe, quiet=True)
    weights = load(RUN, "last").state_dict()
    assert all(w.isfinite().all() for w in weights.values())


@contextlib.contextmanager
def file_size_limit(n_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_file_system_that_refuses(recipe, monkeypatch):
    """The operating system itself cuts the write of a checkpoint short."""
    original = checkpoint.save

    def saving(folder, step, **content):
        with file_size_limit(4096) if step >= 14 else contextlib.nullcontext():
            return original(folder, step, **content)

    monkeypatch.setattr(checkpoint, "save", saving)
    with pytest.raises(RunError) as error:
        train(recipe, quiet=True)
    assert "step_14: File too large. The last good checkpoint is runs/small/checkpoints/step_10" in one_line(error)
    assert not list(RUN.glob("**/*.tmp"))
    assert load(RUN, "last")
    monkeypatch.undo()


@pytest.mark.parametrize("call", [3, 9, 14, 21])
def test_full_disk(recipe, monkeypatch, call, outcome_of, uncut):
    """No space left at any of the points where data are flushed."""
    calls = 0
    original = os.fsync

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(RunError) as error:
            train(recipe, quiet=True)
    assert "No space left on device" in one_line(error)
    assert "last good checkpoint" in str(error.value) or "no checkpoint yet" in str(error.value)
    train(recipe, quiet=True)  # with space again, on to the same bits
    assert outcome_of(RUN) == uncut({})["outcome"]


def test_folder_in_use(recipe):
    RUN.mkdir(parents=True)
    with FileLock(RUN / ".lock"), pytest.raises(zoo.UsageError, match=r"runs/small is in use.*out="):
        train(recipe, quiet=True)


def test_folder_of_something_else(recipe):
    RUN.mkdir(parents=True)
    (RUN / "thesis.tex").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(zoo.UsageError, match=r"holds no config.yaml"):
            train(recipe, fresh=fresh, quiet=True)
    assert (RUN / "thesis.tex").read_text() == "precious"
    Path("file").write_text("")
    with pytest.raises(zoo.UsageError, match="is a file"):
        train(recipe, {"out": "file"}, quiet=True)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.AVERAGE, checkpoint.TRAINING, checkpoint.MANIFEST])
def test_damaged_newest_checkpoint(recipe, name, damage, capsys, outcome_of, finished_run):
    """Reading it is refused; training goes on from the one before, and says so."""
    run, whole = finished_run
    (run / "result.json").unlink()
    newest = run / "checkpoints/step_40"
    damage(newest / name)
    with pytest.raises(zoo.UsageError, match=r"damaged|no checkpoint of this package|has format"):
        load(newest)
    train(run)
    said = capsys.readouterr().err
    assert f"going on from {run}/checkpoints/step_" in said
    assert outcome_of(run) == whole
    assert (run / "checkpoints/step_40.damaged").is_dir()


@pytest.fixture
def finished_run(recipe, outcome_of, made_once):
    run = made_once("finished", RUN, lambda: train(recipe, quiet=True))
    return run, outcome_of(run)


def test_no_checkpoint_left(finished_run):
    run, _ = finished_run
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step_*"):
        (path / checkpoint.TRAINING).write_bytes(b"")
    for refused in (lambda: train(run, quiet=True), lambda: load(run)):
        with pytest.raises(zoo.UsageError, match=r"step_40 is damaged: training.pt is truncated, 0 of"):
            refused()


def test_missing_and_foreign_checkpoints(finished_run, tmp_path):
    run, _ = finished_run
    with pytest.raises(zoo.UsageError, match="There is no run folder 'runs/none'"):
        load("runs/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(zoo.UsageError, match="holds no checkpoint"):
        load(tmp_path / "empty")
    foreign = run / "checkpoints/step_50"
    foreign.mkdir()
    torch.save({"model": {}}, foreign / "pytorch_model.bin")
    with pytest.raises(zoo.UsageError, match="no checkpoint of this package"):
        load(foreign)
    for which in ("best", "last"):
        with pytest.raises(zoo.UsageError, match=r"step_50 is no checkpoint.*step_40 is whole.*which='step_40'"):
            load(run, which)
    assert load(run, "step_40")
    with pytest.raises(zoo.UsageError, match="'best' or 'last'"):
        load(run, "first")


def test_checkpoint_of_another_model(finished_run):
    run, _ = finished_run
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("d_model: 16", "d_model: 32"))
    with pytest.raises(zoo.UsageError, match=r"belongs to another model: embedding.weight is \(64, 16\) there and"):
        load(run)


def test_damaged_config(finished_run):
    run, _ = finished_run
    for text in ("{", "task: 1", "\x00"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(zoo.UsageError, match=r"config.yaml is damaged"):
            load(run)


def test_checkpoints_hold_no_code(finished_run):
    """A checkpoint with a pickled object in it is refused, not run."""
    run, _ = finished_run
    path = run / "checkpoints/step_40"
    torch.save({"position": Path}, path / checkpoint.TRAINING)
    with pytest.raises(checkpoint.Damaged, match=r"training\.pt"):
        checkpoint.read_training(path)


def test_read_only_folder(recipe):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    Path("runs").mkdir(mode=0o500)
    with pytest.raises(RunError, match="Permission denied"):
        train(recipe, quiet=True)
    shutil.rmtree("runs")
