"""Several processes of which one is lost: the run says which, ends whole, starts again, and loses nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from several import ROOT, ended, start
from torch.distributed import HashStore

from zoo.benchmarks.studies import faults
from zoo.benchmarks.studies.faults import descendants
from zoo.training import failures, joining, roll
from zoo.training.failures import LostProcess, tell_launcher
from zoo.training.launching import End, check_processes
from zoo.training.launching import ended as judged
from zoo.training.roll import Roll

COMMAND = "from zoo.cli import main; main()"
LONG = ("train.steps=4000", "train.eval_every=4000", "train.checkpoint_every=50", "train.log_every=50")
SHORT = ("train.steps=400", "train.eval_every=100", "train.checkpoint_every=50", "train.log_every=50")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2")


# ---- how a start ended


def failure(status: int, **words: Any) -> SimpleNamespace:
    return SimpleNamespace(exitcode=status, error_file_data=words, message=words.get("message", ""))


LOST = {"message": "Another process.", "final": False, "named": False}
NAMED = {"message": "Process 0 of 2.", "final": False, "named": True}


@pytest.mark.parametrize(
    ("failed", "end"),
    [
        ({1: failure(-9), 0: failure(-15)}, End(137, False, "Process 1 of 2 was killed (SIGKILL).")),
        ({0: failure(-6), 1: failure(1, **LOST)}, End(134, False, "Process 0 of 2 was killed (SIGABRT).")),
        ({1: failure(-40), 0: failure(-15)}, End(168, False, "Process 1 of 2 was killed (signal 40).")),
        ({1: failure(-15), 0: failure(-15)}, End(143, True, None)),
        ({0: failure(2, message="wrong", final=True), 1: failure(2)}, End(2, True, None)),
        ({1: failure(143, message="", final=True), 0: failure(143)}, End(143, True, None)),
        ({0: failure(1, message="a full disk", final=True)}, End(1, True, None)),
        ({1: failure(1), 0: failure(1, **LOST)}, End(1, False, "Process 1 of 2 failed.")),
        ({0: failure(1, **LOST), 1: failure(-15)}, End(1, False, "Another process.")),
        ({0: failure(1, **LOST), 1: failure(1, **NAMED)}, End(1, False, "Process 0 of 2.")),
    ],
)
def test_what_ended_a_start_is_found_from_what_failed_first(failed, end):
    assert judged(2, failed) == end


def test_a_process_leaves_word_of_its_error_for_the_launcher(tmp_path, monkeypatch):
    tell_launcher(ValueError("nobody listens"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for error, final in ((failures.RunError("full"), True), (LostProcess("lost", named=True, speaks=False), False)):
        tell_launcher(error)
        words = json.loads((tmp_path / "error.json").read_text())
        assert (words["message"], words["final"]) == (str(error), final)
        assert abs(words["timestamp"] - time.time()) < 60


def test_a_word_for_the_launcher_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(path, data):
        path.write_bytes(data[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.core.files.write_bytes", full)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher(failures.RunError("full"))
    assert not list(tmp_path.iterdir())


def test_restarts_of_torchrun_delete_no_run(monkeypatch):
    check_processes(None, None, fresh=True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(failures.UsageError, match="--fresh would delete the run again"):
        check_processes(None, None, fresh=True)


# ---- who is lost


def called(monkeypatch, silent: dict[int, bool], size: int = 4, store: Any = None) -> dict[int, LostProcess]:
    """What the processes that are left find, each in a thread."""
    monkeypatch.setattr(roll, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(roll, "CLOSED_SECONDS", 0.2)
    store, found = store or HashStore(), {}

    def call(rank: int) -> None:
        found[rank] = Roll(store, rank, size).call(7.0, silent=silent[rank])

    threads = [threading.Thread(target=call, args=[rank]) for rank in silent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_silent_process_is_named_and_one_of_the_others_says_so(monkeypatch):
    found = called(monkeypatch, {1: True, 2: False, 3: False})  # 1 gave up, which the others see as a closed connection
    assert {str(e) for e in found.values()} == {
        "Process 0 of 4 of this training has not answered for 7 s (train.timeout)."
    }
    assert [rank for rank, error in found.items() if error.speaks] == [1]
    assert all(error.named for error in found.values())
    two = called(monkeypatch, {0: True, 3: True})
    assert str(two[0]).startswith("Processes 1, 2 of 4 of this training have not answered for 7 s")


def test_a_closed_connection_names_nobody(monkeypatch):
    found = called(monkeypatch, {0: False, 2: False, 3: False})
    told = "Another process of this training has ended or was killed (its connection is closed)."
    assert {str(error) for error in found.values()} == {told}
    assert [error.speaks for _, error in sorted(found.items())] == [True, False, False]


class Gone:
    """A store that nobody answers for."""

    def set(self, key: str, value: bytes) -> None:
        raise RuntimeError("Connection refused")


@pytest.mark.parametrize(("agent", "who", "speaker"), [(False, "Process 0 of 3", 1), (True, "Another process", 0)])
def test_a_store_that_is_gone_was_in_process_0_or_in_the_launcher(agent, who, speaker, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(agent))
    for silent, told in ((True, "has not answered for 7 s"), (False, "has ended or was killed")):
        found = called(monkeypatch, {speaker: silent, 2: silent}, 3, Gone())
        assert {str(error).split(" of this")[0] for error in found.values()} == {who}
        assert all(told in str(error) for error in found.values())
        assert [rank for rank, error in found.items() if error.speaks] == [speaker]


def test_processes_agree_on_a_name_for_their_start_whatever_an_earlier_one_left():
    store = HashStore()

    def names() -> list[str]:
        found: list[str] = []
        threads = [threading.Thread(target=lambda r=r: found.append(joining._start(store, r, 3))) for r in (2, 1, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join(20)
        assert len(found) == 3
        return found

    first, second = names(), names()  # the second start finds the greetings of the first
    assert len({*first}) == len({*second}) == 1
    assert first != second


@pytest.mark.parametrize(
    ("rank", "size", "told"),
    [
        ("x", "2", "RANK=x is not allowed: it should be a whole number."),
        ("0", "-2", "WORLD_SIZE=-2 is not allowed: it should be a whole number."),
        ("5", "2", "RANK=5 is not allowed: WORLD_SIZE=2 processes have the numbers 0 to 1."),
        ("0", "0", "RANK=0 is not allowed: WORLD_SIZE is 0."),
    ],
)
def test_an_environment_of_no_launcher_is_refused_before_anybody_waits(rank, size, told, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(failures.UsageError, match=told):
        joining.connect()


@pytest.mark.parametrize(
    ("address", "port", "told"),
    [("localhost", "1", "Connection refused"), ("nowhere.invalid", "2000", ""), ("localhost", "99999", "")],
)
def test_a_place_where_nobody_answers_is_one_line(address, port, told, monkeypatch, capfd):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", address), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.3)
    with pytest.raises(failures.UsageError, match=f"did not meet at {address}:{port} .nobody answers there.*{told}"):
        joining.connect()
    assert capfd.readouterr().err == ""


# ---- real processes


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands to end with the test, each the first of a session of its own."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        with_all = [*descendants(process.pid), process.pid]
        for pid in with_all:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def run(children: list[subprocess.Popen[str]], *command: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children.append(process)
    return process


def process_of(rank: int, launcher: int) -> int:
    found = faults.process_of(rank, descendants(launcher))
    assert found is not None, f"there is no process {rank}"
    return found


def reached(folder: str, step: int = 50, *, seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not Path(folder, f"checkpoints/step_{step}/manifest.json").exists():
        assert time.monotonic() < until, f"no checkpoint of step {step}"
        time.sleep(0.02)


def same(folder: str, other: str) -> None:
    """The last weights, and all records but their times, are equal."""
    last = Path("checkpoints/step_400")
    names = sorted(path.name for path in Path(folder, last).glob("*.safetensors"))
    assert any(name.startswith("weights") for name in names)
    for name in names:
        assert Path(folder, last, name).read_bytes() == Path(other, last, name).read_bytes()
    lines = [[json.loads(line) for line in Path(f, "metrics.jsonl").read_text().splitlines()] for f in (folder, other)]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "tokens_per_second")} == {
            k: v for k, v in b.items() if k not in ("seconds", "tokens_per_second")
        }


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "parallel"), [("zoo", "ddp"), ("torchrun", "ddp"), ("zoo", "fsdp")])
def test_a_killed_process_is_started_again_to_the_bits_of_a_run_that_nothing_happened_to(
    launcher, parallel, recipe, children
):
    held = (*SHORT, f"train.parallel={parallel}")
    whole = run(children, sys.executable, "-c", COMMAND, "train", recipe, *held, "out=whole", "--processes", "2")
    assert whole.wait(240) == 0
    again = ("--processes", "2", "--max-restarts", "2") if launcher == "zoo" else ()
    start = (sys.executable, "-c", COMMAND) if launcher == "zoo" else (*TORCHRUN, "-m", "zoo")
    cut = run(children, *start, "train", recipe, *held, "out=cut", *again)
    reached("cut", 50)
    os.kill(process_of(1, cut.pid), signal.SIGKILL)
    reached("cut", 250)
    os.kill(process_of(0, cut.pid), signal.SIGKILL)
    out, err = cut.communicate(timeout=240)
    assert cut.returncode == 0, err
    assert "Traceback" not in err
    assert out.count("finished at step 400") == 1
    if launcher == "zoo":
        assert "zoo: Process 1 of 2 was killed (SIGKILL). All start again (restart 1 of 2)." in err
        assert "zoo: Process 0 of 2 was killed (SIGKILL). All start again (restart 2 of 2)." in err
    same("cut", "whole")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named_and_all_end(rank, recipe, children):
    how = ("train.timeout=6", "--processes", "2")
    process = run(children, sys.executable, "-c", COMMAND, "train", recipe, *LONG, *how)
    reached("runs/small")
    os.kill(process_of(rank, process.pid), signal.SIGSTOP)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    told = f"zoo: Process {rank} of 2 of this training has not answered for 6 s (train.timeout)."
    assert err.count(told) == err.count("zoo: ") == 1, err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named_without_a_launcher(rank, recipe, tmp_path):
    processes = start(2, "-c", COMMAND, "train", recipe, *LONG, "train.timeout=6", cwd=tmp_path)
    reached("runs/small")
    processes[rank].send_signal(signal.SIGSTOP)
    try:
        status = processes[1 - rank].wait(120)
    finally:
        processes[rank].kill()
    err = ended(processes)[1 - rank][2]
    assert status == 1, err
    assert f"zoo: Process {rank} of 2 of this training has not answered for 6 s" in err
    assert "Traceback" not in err


@linux
@pytest.mark.slow
def test_processes_of_a_killed_torchrun_stop_with_a_checkpoint(recipe, children):
    process = run(children, *TORCHRUN, "-m", "zoo", "train", recipe, *LONG)
    reached("runs/small")
    process.kill()
    until = time.monotonic() + 60
    while not Path("runs/small/result.json").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert json.loads(Path("runs/small/result.json").read_text())["status"] == "interrupted"


@linux
@pytest.mark.slow
def test_a_file_system_that_is_full_ends_all_and_keeps_the_last_checkpoint(recipe, children):
    process = run(
        children, sys.executable, "-c", COMMAND, "train", recipe, *LONG, "--processes", "2", "--max-restarts", "2"
    )
    reached("runs/small")
    resource.prlimit(process_of(0, process.pid), resource.RLIMIT_FSIZE, (4096, 4096))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, ""), err
    assert err.count("zoo: ") == 1
    assert "zoo: Cannot write runs/small" in err
    last = err.split("The last good checkpoint is ")[1].split()[0].rstrip(".")
    assert sorted(p.name for p in Path(last).iterdir())[-1] == "weights.safetensors"
    assert not list(Path("runs/small/checkpoints").glob(".*"))
    again = run(
        children, sys.executable, "-c", COMMAND, "train", recipe, *LONG, "train.time_budget=1", "--processes", "2"
    )
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert f"Going on from {last}" in err


@linux
@pytest.mark.slow
def test_two_nodes_start_again_after_a_process_of_one_was_killed(recipe, children):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    meets = ("--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "x")
    command = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meets)
    command += ("--max-restarts", "2", "-m", "zoo", "train", recipe, *SHORT)
    whole = run(children, sys.executable, "-c", COMMAND, "train", recipe, *SHORT, "out=whole", "--processes", "2")
    assert whole.wait(240) == 0
    nodes = [run(children, *command, "out=cut") for _ in range(2)]
    reached("cut", 100)
    os.kill(next(pid for pid in descendants(nodes[1].pid)), signal.SIGKILL)
    found = ended(nodes)
    assert [status for status, _, _ in found] == [0, 0], found
    assert sum(out.count("finished at step 400") for _, out, _ in found) == 1
    same("cut", "whole")


SRUN = """#!/bin/sh
shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids="$pids $!"
done
status=0
for pid in $pids; do wait $pid || status=$?; done
exit $status
"""


@linux
@pytest.mark.slow
def test_the_script_for_slurm_queues_a_preempted_job_again(recipe, tmp_path, children):
    """The script of docs/scale.md, with stand-ins for Slurm's own commands."""
    script = (ROOT / "docs/scale.md").read_text().split("```sh\n#!/bin/bash\n#SBATCH")[1].split("```")[0]
    assert "zoo train mqar out=/shared/runs/mqar" in script
    script = script.replace("train mqar out=/shared/runs/mqar", " ".join(["train", recipe, *LONG]))
    commands = {
        "srun": SRUN,
        "scontrol": f"#!/bin/sh\n[ $1 = show ] && echo localhost || echo $@ > {tmp_path}/queued\n",
        "zoo": f"#!/bin/sh\nexec {sys.executable} -m zoo $@\n",
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = run(children, "bash", "-c", f"#SBATCH{script}", **slurm, SLURM_NTASKS_PER_NODE="2", PATH=path)
    reached("runs/small")
    for rank in (0, 1):
        os.kill(process_of(rank, job.pid), signal.SIGTERM)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 143, err
    assert err.count("Go on with: zoo train") == 1
    assert (tmp_path / "queued").read_text() == f"requeue {os.getpid()}\n"
