"""Several processes train one model as one would, and all of them end, whatever happens to one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from several import KINDS, PARTS, ROOT, ended, start, train

import zoo
from zoo.cli import main
from zoo.core.errors import UsageError
from zoo.models.create import model_config
from zoo.objectives.base import objectives
from zoo.objectives.next_token import NextToken
from zoo.training import checkpoint
from zoo.training.group import Group
from zoo.training.processes import check_shared
from zoo.training.train import train as train_one
from zoo.training.train_options import TrainConfig

SEVERAL = str(Path(__file__).with_name("several.py"))
COMMAND = "from zoo.cli import main; main()"
FAST = {"next_token": "ddp", "deep_supervision": "ddp", "experts": "fsdp"}
MODEL = model_config("gqa swiglu", d_model=16, vocab_size=32)
TIMES = ("seconds", "tokens_per_second")


def lines(folder: str | Path) -> list[dict[str, Any]]:
    found = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def weights(folder: str | Path) -> dict[str, bytes]:
    last = max(Path(folder, "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    return {"last": last.name.encode(), **{p.name: p.read_bytes() for p in last.glob("*.safetensors")}}


def all_well(processes: list[tuple[int, str, str]]) -> None:
    assert all(status == 0 for status, _, _ in processes), processes


def files(folder: Path) -> set[str]:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in names if not name.startswith("events.")}


PIECES = re.compile(r"-0000[0-9]-of-0000[0-9]|optimizer-[^/]*")


def compare(n: int, kinds: Mapping[str, str], folder: Path) -> None:
    """Train every kind in n processes and in one; all that does not depend on time is the same to within rounding.

    Kinds are given with what the processes hold of the model, `train.parallel`.
    """
    jobs = [f'{kind},{kind}-n,parallel="{parallel}"' for kind, parallel in kinds.items()]
    all_well(ended(start(n, SEVERAL, *jobs, cwd=folder)))
    for kind, parallel in kinds.items():
        parts = {"accumulate": n} if kind in PARTS else {}
        alone, (first, *others) = (
            train(kind, folder / f"{kind}-1", **parts),
            [torch.load(folder / f"{kind}-n.{rank}.pt") for rank in range(n)],
        )
        size = torch.cat([g.flatten() for g in alone]).norm()
        assert size > 0
        for ours, theirs in zip(first, alone, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * size, kind
        assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))
        ours, theirs = lines(folder / f"{kind}-n"), lines(folder / f"{kind}-1")
        assert len(ours) == len(theirs) == 23
        for line, expected in zip(ours, theirs, strict=True):
            assert line.keys() == expected.keys()
            for key in {"loss", "accuracy", "exact", "mse", "grad_norm", "step", "tokens", "n_rows"} & line.keys():
                assert line[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12), (kind, key)
        there = {PIECES.sub("", name) for name in files(folder / f"{kind}-n")}
        assert {name for name in there if not name.endswith("/")} == files(folder / f"{kind}-1")
        pieces = list((folder / f"{kind}-n/checkpoints/step_20").glob("weights-*-of-*"))
        assert len(pieces) == (n if parallel == "fsdp" else 0)
        result = json.loads((folder / f"{kind}-n" / "result.json").read_text())
        assert (result["status"], result["machine"]["processes"]) == ("finished", n)
        assert zoo.load(folder / f"{kind}-n").n_parameters() == result["n_parameters"]


def test_two_processes_train_as_one(tmp_path):
    compare(2, FAST, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("n", "kinds"), [(2, [*KINDS, *PARTS]), (4, [*FAST, "muon", *PARTS])], ids=["2", "4"])
def test_every_objective_trains_in_several_processes_as_in_one(n, kinds, parallel, tmp_path):
    compare(n, dict.fromkeys(kinds, parallel), tmp_path)


# ---- what cannot be shared


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--processes", "0"), "--processes=0 is not allowed: it should be at least 1"),
        (("--processes", "3"), "train.batch_size=4 cannot be divided among 3 processes, which read as many rows each"),
        (("--processes", "8"), "train.batch_size=8 can."),
        (
            ("--processes", "2", "train.sequence_processes=4"),
            "2 processes cannot be divided into groups that share a sequence: start a multiple of 4.",
        ),
        (("--processes", "2", "train.accumulate=3"), "each of 2 processes has 2 rows of a batch"),
        (("--processes", "2", "train.lrr=1"), "Did you mean 'lr'?"),
        (("--processes", "2", "--dry-run"), "leave out --processes"),
        (("--max-restarts", "2", "--dry-run"), "leave out --max-restarts"),
        (("--max-restarts", "2"), "--max-restarts=2 belongs to --processes: give both"),
        (("--processes", "2", "--max-restarts", "-1"), "--max-restarts=-1 is not allowed: it should be at least 0"),
        (("--processes", "2", "--max-restarts", "1", "--fresh"), "--fresh would delete the run again at every restart"),
        (("--processes", "2", "train.timeout=0"), "timeout=0 is not allowed"),
    ],
)
def test_wrong_numbers_of_processes_are_refused_before_any_is_started(arguments, told, recipe, capsys):
    assert told in refused(capsys, "train", recipe, *arguments)
    assert not Path("runs").exists()


def test_torchrun_and_processes_are_not_given_together(recipe, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("zoo.training.launch.join", Group)
    assert "leave one of them out" in refused(capsys, "train", recipe, "--processes", "2")
    assert "torchrun has an option of this name of its own" in refused(capsys, "train", recipe, "--max-restarts", "2")


def test_wrong_words_are_refused_by_the_first_process_of_a_machine(recipe, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "No such option: --nosuch" in refused(capsys, "train", recipe, "--nosuch")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as left:
        main(["train", recipe, "--nosuch"])
    assert (left.value.code, capsys.readouterr().err) == (2, "")


def test_an_objective_that_reads_a_batch_whole_is_not_shared(monkeypatch):
    class Whole(NextToken):
        name = "whole"

        def updates(self, model, data, carry, generator):
            yield from super().updates(model, data, carry, generator)

    monkeypatch.setitem(objectives._classes, "whole", Whole)
    whole = object.__new__(Whole)
    check_shared(1, TrainConfig(), whole, MODEL)
    with pytest.raises(UsageError, match="the objective whole reads a batch whole"):
        check_shared(2, TrainConfig(), whole, MODEL)


def test_more_processes_than_devices_are_refused(monkeypatch):
    objective = object.__new__(NextToken)
    for device, told in (("mps", "as MPS serves one"), ("cuda", "as there are 1 GPUs")):
        monkeypatch.setattr("zoo.training.processes.choose_device", lambda name, device=device: torch.device(device))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        check_shared(1, TrainConfig(), objective, MODEL)
        with pytest.raises(UsageError, match=f"2 processes on this machine are too many, {told}: set train.device=cpu"):
            check_shared(2, TrainConfig(), objective, MODEL)


OTHER_VERSION = """
from zoo.training import machine
found = machine.versions()
machine.versions = lambda: {**found, "torch": "2.0." + os.environ["RANK"]}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sys.argv += ['train.lr=0.1' + os.environ['RANK']]", "train.lr: 0.1 in process 0, 0.11 in process 1"),
        (OTHER_VERSION, "versions.torch: '2.0.0' in process 0, '2.0.1' in process 1"),
    ],
    ids=["options", "versions"],
)
def test_processes_that_were_started_differently_are_refused(change, told, recipe, tmp_path):
    processes = start(2, "-c", f"import os, sys\n{change}\n{COMMAND}", "train", recipe, cwd=tmp_path)
    (status, out, err), (other, out_2, err_2) = ended(processes)
    assert (status, other) == (2, 2)
    assert not out
    assert not out_2
    assert not err_2
    assert f"The processes differ in {told}" in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_folder_in_use_is_told_by_the_first_process(recipe, tmp_path):
    train_one(recipe, quiet=True)
    processes = start(2, "-c", COMMAND, "train", recipe, "train.lr=0.5", cwd=tmp_path)
    (status, _, err), (other, _, err_2) = ended(processes)
    assert (status, other) == (2, 2)
    assert "holds a run with a different train.lr" in err
    assert not err_2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_of_another_model_is_told_by_the_first_process(parallel, recipe, tmp_path):
    train_one(recipe, quiet=True)
    train_one(recipe, {"model.d_model": 32, "out": "other"}, quiet=True)
    there, other = (Path(run, "checkpoints/step_40") for run in ("runs/small", "other"))
    config = checkpoint.read_manifest(there).config
    shutil.rmtree(Path("runs/small/checkpoints"))
    there.parent.mkdir()
    temporary = checkpoint.begin(there.parent, 40)
    for path in other.glob("[!m]*"):
        shutil.copy(path, temporary)
    files = {name: file.model_dump() for name, file in checkpoint.read_manifest(other).files.items()}
    checkpoint.complete(temporary, 40, files, best=40, config=config)
    more = ("train.steps=50", f"train.parallel={parallel}")
    (status, out, err), (other_status, _, err_2) = ended(start(2, "-c", COMMAND, "train", recipe, *more, cwd=tmp_path))
    assert (status, other_status, out, err_2) == (2, 2, "", "")
    assert "of another training" in err or "belongs to another model" in err
    assert "No checkpoint is left to go on from: start over with --fresh." in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_meeting_place_that_is_not_there(recipe, tmp_path):
    code = f"import zoo.training.joining as j; j.JOIN_SECONDS = 3.0\n{COMMAND}"
    processes = start(2, "-c", code, "train", recipe, cwd=tmp_path)
    processes[1].kill()  # the first waits for it
    (status, out, err), _ = ended(processes, 60)
    assert (status, out) == (2, "")
    assert "The 2 processes of the training did not meet at localhost:" in err
    (alone,) = start(1, "-c", code, "train", recipe, cwd=tmp_path, WORLD_SIZE="2", RANK="1")
    alone.kill()
    alone.wait()


# ---- interruptions


def started(folder: Path, *, timeout: float = 120.0) -> None:
    """Wait for the first checkpoint."""
    until = time.monotonic() + timeout
    while not list((folder / "checkpoints").glob("step_*/weights.safetensors")):
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.05)


LONG = ("train.steps=4000", "train.eval_every=4000", "train.checkpoint_every=50", "train.log_every=50")
SHORT = ("train.steps=400", "train.eval_every=100", "train.checkpoint_every=50", "train.log_every=50")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_process_saves_and_stops_all(rank, recipe, tmp_path):
    processes = start(2, "-c", COMMAND, "train", recipe, *LONG, cwd=tmp_path)
    started(tmp_path / "runs/small")
    processes[rank].send_signal(signal.SIGTERM)
    (status, _, err), (other, _, err_2) = ended(processes)
    assert (status, other) == (143, 143)
    assert "Go on with: zoo train" in err
    assert not err_2
    assert json.loads(Path("runs/small/result.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_resumes(recipe, tmp_path):
    """By two processes to the bits of a run that nothing happened to (dropout included), by one to within rounding."""
    whole = start(2, "-c", COMMAND, "train", recipe, *SHORT, "out=whole", cwd=tmp_path)
    all_well(ended(whole))
    for victim in (0, 1):
        cut = start(2, "-c", COMMAND, "train", recipe, *SHORT, f"out=cut{victim}", cwd=tmp_path)
        started(tmp_path / f"cut{victim}")
        cut[victim].kill()
        began = time.monotonic()
        found = ended(cut, 60)
        assert time.monotonic() - began < 30
        assert found[victim][0] == -signal.SIGKILL
        assert found[1 - victim][0] == 1, found
        if victim == 1:
            assert "Another process of this training has ended" in found[0][2]
        all_well(ended(start(2, "-c", COMMAND, "train", recipe, *SHORT, f"out=cut{victim}", cwd=tmp_path)))
        assert weights(f"cut{victim}") == weights("whole")
        assert lines(f"cut{victim}") == lines("whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deep_supervision", "next_token"])
def test_a_run_of_two_processes_is_resumed_by_one_and_by_four(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(kind, "whole")
    for then in (1, 4):
        stop = f"{kind},cut{then},steps=20,time_budget=1e-9"
        all_well(ended(start(2, SEVERAL, stop, cwd=tmp_path)))
        assert json.loads(Path(f"cut{then}/result.json").read_text())["steps"] < 20
        if then == 1:
            train(kind, "cut1")
        else:
            all_well(ended(start(4, SEVERAL, f"{kind},cut4", cwd=tmp_path)))
        at_end = [[line for line in lines(run) if line["step"] == 20] for run in ("whole", f"cut{then}")]
        for expected, line in zip(*at_end, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_error_of_the_first_process_ends_all(recipe, tmp_path, parallel):
    """A callback, which the first one alone calls: with a checkpoint, and one line."""
    code = """
import sys, zoo
class Fails(zoo.Callback):
    def on_log(self, record):
        if record["step"] == 20:
            raise ValueError("no more")
options = {"train.checkpoint_every": None, "train.parallel": sys.argv[2]}
try:
    zoo.train(sys.argv[1], options, quiet=True, callbacks=[Fails()])
except zoo.RunError as error:
    sys.exit(f"told: {error}")
"""
    found = ended(start(2, "-c", code, recipe, parallel, cwd=tmp_path))
    assert [status for status, _, _ in found] == [1, 1], found
    assert "The callback Fails failed in on_log (ValueError: no more)" in found[0][2]
    assert "told: The leading process of this training has failed" in found[1][2]
    assert weights("runs/small")["last"] == b"step_20"


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "method"), [("ddp", "on_evaluation"), ("fsdp", "on_checkpoint")])
def test_an_error_of_the_first_process_at_the_very_end_fails_the_run(recipe, tmp_path, parallel, method):
    """After the last step: as the test rows are scored, and as the last checkpoint is told of."""
    code = """
import sys, zoo
class Fails(zoo.Callback):
    def on_evaluation(self, record):
        if sys.argv[3] == "on_evaluation" and record["split"] == "test":
            raise ValueError("no more")
    def on_checkpoint(self, checkpoint):
        if sys.argv[3] == "on_checkpoint" and checkpoint["step"] == 40:
            raise ValueError("no more")
try:
    zoo.train(sys.argv[1], {"train.parallel": sys.argv[2]}, quiet=True, callbacks=[Fails()])
except zoo.RunError as error:
    sys.exit(f"told: {error}")
"""
    found = ended(start(2, "-c", code, recipe, parallel, method, cwd=tmp_path))
    assert [status for status, _, _ in found] == [1, 1], found
    assert f"The callback Fails failed in {method} (ValueError: no more)" in found[0][2]
    assert "told: The leading process of this training has failed" in found[1][2]
    assert json.loads(Path("runs/small/result.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("error", ["zoo.core.errors.Diverged('not finite')", "zoo.training.watch.Pruned"])
def test_a_checkpoint_on_its_way_is_finished_when_all_processes_end(recipe, tmp_path, error):
    code = f"""
import sys, time, zoo, zoo.core.errors, zoo.training.watch
from zoo.training import checkpoint
from zoo.training.loop import Trainer
write, step = checkpoint.write, Trainer._step
def slowly(*given):
    time.sleep(2.0)
    return write(*given)
def ending(self, data):
    if self.at.step == 15:
        raise {error}
    return step(self, data)
checkpoint.write, Trainer._step = slowly, ending
try:
    zoo.train(sys.argv[1], {{"train.parallel": "fsdp", "train.checkpoint_every": 14}}, quiet=True)
except zoo.RunError as error:
    print(f"told: {{error}}")
"""
    found = ended(start(2, "-c", code, recipe, cwd=tmp_path))
    all_well(found)
    assert sorted(path.name for path in Path("runs/small/checkpoints").iterdir())[-1] == "step_14"
    assert not list(Path("runs/small/checkpoints").glob(".*"))
    if "Diverged" in error:
        assert "The last good checkpoint is runs/small/checkpoints/step_14" in found[0][1]


# ---- the command


@pytest.mark.slow
def test_the_command_starts_processes_and_passes_their_status_on(recipe, zoo_command):
    out, err = (process := zoo_command("train", recipe, "--processes", "2")).communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.startswith(f"{Path('runs/small')}: finished at step 40")
    assert out.count("\n") == 1
    assert err.count("step 40/40") == 1
    assert "Warning" not in err
    (process := zoo_command("train", recipe, "--processes", "2", "train.lr=0.5")).wait(240)
    assert process.returncode == 2
    err = process.communicate()[1]
    assert err.count("\n") == 1
    assert "holds a run with a different train.lr" in err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_command_stops_all_its_processes(number, status, recipe, zoo_command):
    process = zoo_command("train", recipe, "--processes", "2", *LONG)
    started(Path("runs/small"))
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status
    assert "Go on with: zoo train" in err
    assert json.loads(Path("runs/small/result.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_processes_of_a_killed_command_stop_with_a_checkpoint(recipe, zoo_command):
    process = zoo_command("train", recipe, "--processes", "2", *LONG)
    started(Path("runs/small"))
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while not Path("runs/small/result.json").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert json.loads(Path("runs/small/result.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_two_nodes_that_torchrun_brings_together(recipe, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    how = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        place,
        "--rdzv-id",
        "x",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "zoo", "train", recipe]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    nodes = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    found = ended(nodes)
    all_well(found)
    assert sum(out.count("finished at step 40") for _, out, _ in found) == 1
    assert json.loads(Path("runs/small/result.json").read_text())["machine"]["processes"] == 2
