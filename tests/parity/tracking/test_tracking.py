"""Trackers with their real packages, without a network: what W&B and MLflow hold of a run, resumed ones too."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zoo
from zoo.core.errors import UsageError
from zoo.core.run_files import read_metrics
from zoo.training.stopping import Interrupted
from zoo.training.tracking import MLflow, WandB

ROOT = Path(__file__).resolve().parents[3]
EXPERIMENT = {
    "name": "small",
    "task": {"name": "mqar", "vocab_size": 64, "seq_len": 16, "n_pairs": 2},
    "model": {"pattern": "short_conv mlp", "d_model": 16},
    "train": {
        "steps": 20,
        "batch_size": 4,
        "eval_every": 10,
        "log_every": 5,
        "eval_rows": 8,
        "test_rows": 8,
        "threads": 1,
    },
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def offline_runs() -> list[dict]:
    """What the files of W&B's offline mode hold, in order of time: id, config, history rows, summary and exit code.

    W&B 0.31 still writes them for a moment after a run was finished.
    """
    for _ in range(100):
        found = [offline_run(path) for path in sorted(Path("wandb").glob("offline-run-*/run-*.wandb"))]
        if all("exit" in run for run in found):
            break
        time.sleep(0.3)
    return found


def offline_run(path: Path) -> dict:
    """A head of 7 bytes, then blocks of 32 KiB; a record has a checksum, a length, a type, and may be in pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, piece = path.read_bytes(), 7, b""
    found: dict = {"history": [], "summary": {}, "config": {}}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):  # it is still being written
            break
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # the first or a middle piece
            continue
        record, piece = Record.FromString(piece), b""
        match record.WhichOneof("record_type"):
            case "run":
                found |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "config":
                found["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
            case "history":
                items = record.history.item
                found["history"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            case "summary":
                items = record.summary.update
                found["summary"] |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            case "exit":
                found["exit"] = record.exit.exit_code
    return found


class Cut(zoo.Callback):
    def on_log(self, record):
        if record["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)


def expected(split: str, figure: str, rel: float = 1e-6) -> list[tuple[int, float]]:
    lines = read_metrics(Path("runs/small"))
    return [(line["step"], pytest.approx(line[figure], rel=rel)) for line in lines if line["split"] == split]


def test_wandb_holds_a_run_and_its_resumption():
    with pytest.raises(Interrupted):
        zoo.train(EXPERIMENT, callbacks=[WandB(project="mine", dir=os.getcwd()), Cut()], quiet=True)
    result = zoo.train(EXPERIMENT, callbacks=[WandB(project="mine", dir=os.getcwd())], quiet=True)
    first, second = offline_runs()
    assert first["id"] == second["id"]
    assert (first["project"], first["name"], first["exit"], second["exit"]) == ("mine", "small", 1, 0)
    assert second["config"]["train"]["steps"] == 20
    rows = [*first["history"], *second["history"]]
    for split, figure in (("train", "loss"), ("train", "grad_norm"), ("validation", "accuracy"), ("test", "exact")):
        found = [(row["step"], row[f"{split}/{figure}"]) for row in rows if f"{split}/{figure}" in row]
        assert found == expected(split, figure)
    assert second["summary"]["status"] == "finished"
    assert second["summary"]["validation/best_accuracy"] == result.metrics["validation"]["accuracy"]


def test_wandb_uses_a_run_that_is_active_and_leaves_it_open():
    import wandb

    with wandb.init(project="mine", dir=os.getcwd()) as run:
        zoo.train(EXPERIMENT, callbacks=[WandB()], quiet=True)
        assert wandb.run is run
        run.log({"step": 99, "own": 1})
    [found] = offline_runs()
    assert found["history"][-1]["own"] == 1
    assert found["summary"]["status"] == "finished"


def test_wandb_follows_tensorboard():
    """`sync_tensorboard` finds the run folder by torch's SummaryWriter and reads the events that are written there."""
    import wandb

    with wandb.init(project="mine", dir=os.getcwd(), sync_tensorboard=True):
        zoo.train(EXPERIMENT, quiet=True)
    [found] = offline_runs()
    losses = [(row["global_step"], row["train/loss"]) for row in found["history"] if "train/loss" in row]
    assert losses == expected("train", "loss", rel=1e-5)


def test_mlflow_holds_a_run_and_its_resumption():
    from mlflow import MlflowClient

    with pytest.raises(Interrupted):
        zoo.train(EXPERIMENT, callbacks=[MLflow("mine"), Cut()], quiet=True)
    client = MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "KILLED"
    result = zoo.train(EXPERIMENT, callbacks=[MLflow("mine")], quiet=True)
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "small")
    assert run.data.params["train.steps"] == "20"
    assert run.data.params["model.pattern"] == "short_conv mlp"
    assert run.data.tags["zoo.status"] == "finished"
    for split, figure in (("train", "loss"), ("validation", "accuracy"), ("test", "exact")):
        history = client.get_metric_history(run.info.run_id, f"{split}/{figure}")
        assert sorted({(m.step, m.value) for m in history}) == expected(split, figure)
    assert run.data.metrics["validation/best_accuracy"] == result.metrics["validation"]["accuracy"]


def test_the_command_tracks_every_variant_with_both():
    Path("two.yaml").write_text(
        "task: {name: mqar, vocab_size: 64, seq_len: 16, n_pairs: 2}\n"
        "model: {d_model: 16}\n"
        "train: {steps: 10, batch_size: 4, eval_rows: 8, test_rows: 8, threads: 1}\n"
        "variants: {conv: {model.pattern: short_conv mlp}, gru: {model.pattern: min_gru mlp}}\n"
    )
    code = "from zoo.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "two.yaml", "--track", "wandb", "--track", "mlflow", "--quiet"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {run["name"] for run in offline_runs()} == {"conv", "gru"}
    from mlflow import MlflowClient

    assert {run.info.run_name for run in MlflowClient().search_runs(["0"])} == {"conv", "gru"}


def test_a_tracker_that_fails_ends_the_run_in_one_line():
    with pytest.raises(zoo.core.errors.RunError, match=r"^The callback MLflow failed in on_start \([^\n]*$"):
        zoo.train(EXPERIMENT, callbacks=[MLflow(tracking_uri="nowhere://x")], quiet=True)


@pytest.mark.parametrize("kind", [WandB, MLflow])
def test_a_damaged_id_is_told_and_a_new_run_begins(kind):
    zoo.train({**EXPERIMENT, "out": "run"}, {"train.steps": 10}, quiet=True)
    Path("run/tracking.json").write_text("{")
    with pytest.warns(zoo.core.errors.UsageWarning, match=f"tracking.json:1: .* {kind.__name__} starts a new run"):
        assert kind().known_as("run") is None
    kind().remember("run", "abc")
    assert kind().known_as("run") == "abc"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"^WandB needs the package wandb: pip install 'sequence-zoo\[wandb\]'\.$"):
        WandB()
