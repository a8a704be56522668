"""Sweeps by Ray: the same results as without, and nothing left of it, however the sweep ends."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from test_sweep import alike

import zoo
from zoo.sweeps.store import Store

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]


def processes_of_ray() -> list[int]:
    """Processes of sweeps that have a working folder or a temporary folder of this test."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                environment = (path / "environ").read_bytes()
            except OSError:
                continue
            if b"ZOO_RAY_FOLDER=" + tempfile.gettempdir().encode() in environment:
                found.append(int(path.name))
    return found


def workers() -> list[int]:
    """Those of them that train the trials. Ray adds the method to the name at some times only."""
    found = []
    for pid in processes_of_ray():
        try:
            if b"ray::Worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch):
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield
    wait_for(lambda: not processes_of_ray(), 30)
    assert not list(Path(folder).glob("zoo-ray-*"))
    shutil.rmtree(folder)


@pytest.fixture
def study(small):
    """A file of four trials of a few seconds, and what they come to without Ray."""
    small["train"] |= {"steps": 1000, "eval_every": 50, "log_every": 50}
    data = {"experiment": small, "space": {"train.lr": [1e-3, 1e-2]}, "seeds": [0, 1]}
    Path("study.yaml").write_text(yaml.safe_dump(data))
    return Store(zoo.sweep("study.yaml", out="whole", ray=False, quiet=True).path)


def test_killed_interrupted_and_whole_sweeps_come_to_the_same_bits(study, start_zoo):
    here, arguments = Path("runs/study/trials"), ("sweep", "study.yaml", "--workers", "2")
    killed = start_zoo(*arguments)
    wait_for(lambda: any(here.glob("*/checkpoints/step_*")))
    killed.kill()
    killed.wait()
    assert "running" in Store("runs/study").trials()["status"].to_list()
    wait_for(lambda: not processes_of_ray(), 30)

    stopped = start_zoo(*arguments)
    wait_for(lambda: len(workers()) == 2)
    time.sleep(1)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130
    assert "Traceback" not in said[1]
    assert "The same command continues: zoo sweep runs/study" in said[1]
    assert "running" not in Store("runs/study").trials()["status"].to_list()

    last = start_zoo(*arguments)
    said = last.communicate(timeout=300)
    assert last.returncode == 0
    assert "4 trials: 4 finished" in said[0]
    assert alike(Store("runs/study")) == alike(study)


def test_a_worker_that_dies_is_recorded_and_its_trial_goes_on(study, start_zoo):
    running = start_zoo("sweep", "study.yaml", "--workers", "1", "--ray", "--retries", "1")
    wait_for(lambda: any(Path("runs/study/trials").glob("*/checkpoints/step_*")))
    os.kill(workers()[0], signal.SIGKILL)
    said = running.communicate(timeout=300)
    assert running.returncode == 0
    assert "00000 failed and is started again: the worker's process ended" in said[1]
    trials = Store("runs/study").trials()
    assert trials["attempts"].to_list() == [2, 1, 1, 1]
    assert trials["test.loss"].to_list() == study.trials()["test.loss"].to_list()


def test_asha_by_ray(small):
    small["train"] |= {"steps": 60, "eval_every": 15, "metric": "loss"}
    rates = {"train.lr": [1e-2, 1e-9, 1e-8, 1e-7]}
    done = zoo.sweep(small, rates, search="asha(grace=15, reduction=2)", out="asha", ray=True, workers=1, quiet=True)
    alone = zoo.sweep(small, rates, search="asha(grace=15, reduction=2)", out="alone", ray=False, quiet=True)
    assert done.counts == alone.counts
    assert done.counts["pruned"] >= 1
