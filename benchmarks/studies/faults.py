"""Trainings by several processes into which faults are injected: what happened, and what was lost.

    python -m zoo.benchmarks.studies.faults [--kinds killed hang ...] [--seed 0]

A small training (dropout, a running average, a checkpoint every 25 steps) is run by real commands in real processes,
once without a fault for each way of sharing it, and once for every kind of fault, of which several are injected one
after another at moments drawn from the seed. A kind that ends the command is followed by the same command again. At the
end the weights, the running average and every record of `metrics.jsonl` but its times have to equal those of the run
without faults, bit for bit: then no batch was lost or repeated. `recomputed` is the number of steps between the
checkpoint that was read and the last record before the fault. Needs Linux, as the processes are found in /proc; a file
system that is full needs root (a tmpfs of its own), and is otherwise a limit on the size of files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zoo.benchmarks.studies.harness import Data, Study, facts, free_port, shown_machine

STEPS, EVERY, TIMEOUT = 400, 25, 6.0
EXPERIMENT: dict[str, Any] = {
    "name": "run",
    "task": {"name": "mqar", "vocab_size": 64, "seq_len": 32, "n_pairs": 4},
    "model": {"pattern": "mamba2 gqa swiglu", "d_model": 32, "dropout": 0.1},
    "train": {
        "steps": STEPS,
        "batch_size": 8,
        "ema": 0.9,
        "threads": 1,
        "eval_every": 50,
        "eval_rows": 512,
        "test_rows": 16,
        "log_every": 1,
        "checkpoint_every": EVERY,
        "checkpoint_seconds": None,
        "timeout": TIMEOUT,
    },
}
SECONDS = 600.0  # for anything to happen
ZOO = (sys.executable, "-m", "zoo", "train", "../experiment.yaml", "out=run")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


# ---- processes


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def process_of(rank: int, pids: Iterable[int]) -> int | None:
    """Which of some processes has this rank, if any."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    return None


class Run:
    """A training in a folder, by one command or one for each node, which are started again where they end.

    Args:
        folder: with the experiment's file; the run goes into `run` below.
        commands: of each node.
    """

    def __init__(self, folder: Path, commands: list[tuple[str, ...]]):
        self.folder, self.run, self.commands = folder, folder / "run", commands
        self.log = folder / "log.txt"
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.old: set[int] = set()
        self.start()

    def start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.launchers = [
                subprocess.Popen(
                    list(command),
                    cwd=self.folder,
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
                for command in self.commands
            ]

    def last(self) -> dict[str, Any]:
        """The last record that is written whole."""
        with contextlib.suppress(FileNotFoundError), open(self.run / "metrics.jsonl", "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            *lines, _ = file.read().split(b"\n")
            with contextlib.suppress(ValueError, IndexError):
                return json.loads(lines[-1])
        return {"step": 0, "split": "train"}

    def step(self) -> int:
        return self.last()["step"]

    def waits_for(self, done: Callable[[], Any], pause: float = 0.005) -> Any:
        until = time.monotonic() + SECONDS
        while not (found := done()):
            if time.monotonic() > until:
                raise TimeoutError(f"nothing in {SECONDS:.0f} s: {self.log}")
            if self.statuses() is not None:
                raise RuntimeError(f"the run has ended: {self.log}: {self.log.read_text()[-2000:]}")
            time.sleep(pause)
        return found

    def statuses(self) -> list[int] | None:
        """Exit statuses of the commands, once all have ended."""
        found = [launcher.poll() for launcher in self.launchers]
        return None if None in found else found  # type: ignore[return-value]

    def waits_for_end(self) -> list[int]:
        until = time.monotonic() + SECONDS
        while (found := self.statuses()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"no end in {SECONDS:.0f} s: {self.log}")
            time.sleep(0.02)
        return found

    def processes(self) -> set[int]:
        return {pid for launcher in self.launchers for pid in descendants(launcher.pid)}

    def pid(self, rank: int) -> int:
        """The process of this rank that was started after the last fault."""
        return self.waits_for(lambda: process_of(rank, self.processes() - self.old))

    def lines(self, start: int = 0) -> list[str]:
        """What the commands have said, from a byte of the log on."""
        text = self.log.read_bytes()[start:].decode(errors="replace")
        return [line.removeprefix("zoo: ") for line in text.splitlines() if line.startswith("zoo: ")]

    def end(self) -> None:
        """Leave no process behind."""
        for launcher in self.launchers:
            for pid in [*descendants(launcher.pid), launcher.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()


# ---- faults


def at_random_step(run: Run, chance: random.Random, low: int, high: int) -> None:
    """Wait for a step, and then for a part of one."""
    step = chance.randrange(low, high)
    run.waits_for(lambda: run.step() >= step, 0.001)
    time.sleep(chance.uniform(0.0, 0.02))


def send(number: int, rank: int | None = None) -> Callable[..., str]:
    """Send a signal at a random step to a process, to a random one where none is given."""

    def inject(run: Run, chance: random.Random, low: int, high: int) -> str:
        chosen = chance.randrange(2) if rank is None else rank
        pid = run.pid(chosen)
        at_random_step(run, chance, low, high)
        os.kill(pid, number)
        return f"process {chosen}"

    return inject


def send_launcher(number: int) -> Callable[..., str]:
    """Send a signal at a random step to the launcher, as a scheduler does; SIGINT to all, as a terminal does."""

    def inject(run: Run, chance: random.Random, low: int, high: int) -> str:
        workers = descendants(run.launchers[0].pid) if number == signal.SIGINT else []
        at_random_step(run, chance, low, high)
        for pid in [run.launchers[0].pid, *workers]:
            os.kill(pid, number)
        return "launcher and processes" if workers else "launcher"

    return inject


def while_it_writes(run: Run, chance: random.Random, low: int, high: int) -> str:
    """Kill process 0 while a checkpoint has another name still."""
    pid, folder = run.pid(0), run.run / "checkpoints"
    at_random_step(run, chance, low, high)
    run.waits_for(lambda: any(folder.glob(".step_*.tmp/*")), 0.0)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    return "process 0, checkpoint cut" if any(folder.glob(".step_*.tmp")) else "process 0, checkpoint just written"


def while_it_evaluates(run: Run, chance: random.Random, low: int, high: int) -> str:
    """Kill a process after the training line of a step whose evaluation is due, and before the line of that."""
    rank = chance.randrange(2)
    pid, every = run.pid(rank), EXPERIMENT["train"]["eval_every"]
    at_random_step(run, chance, low, high)

    def evaluates() -> bool:
        record = run.last()
        return record["step"] % every == 0 and record["split"] == "train"

    run.waits_for(evaluates, 0.001)
    time.sleep(chance.uniform(0.0, 0.03))
    os.kill(pid, signal.SIGKILL)
    return f"process {rank}"


def while_it_starts(run: Run, chance: random.Random, low: int, high: int) -> str:
    """Kill a process up to 20 seconds after it was started, in the first start or in one after another fault."""
    rank, before = chance.randrange(2), run.step()
    pid = run.pid(rank)
    until = time.monotonic() + chance.uniform(0.1, 20.0)
    run.waits_for(lambda: time.monotonic() > until or run.step() > before + 1)
    os.kill(pid, signal.SIGKILL)
    return f"process {rank}"


def full_disk(run: Run, chance: random.Random, low: int, high: int) -> str:
    """Fill the run's file system, or where there is none of its own let process 0 write no longer files."""
    pid = run.pid(0)
    at_random_step(run, chance, low, high)
    if not run.run.is_mount():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
        return "process 0, files limited"
    with contextlib.suppress(OSError), open(run.run / ".filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return "the run's file system"


class Kind(NamedTuple):
    """A kind of fault.

    Attributes:
        told: what is done.
        times: how often.
        inject: does it, between two steps; returns to whom.
        command: that trains, of each node.
        ends: whether the command ends by it, and is given again.
        options: of the training.
    """

    told: str
    times: int
    inject: Callable[[Run, random.Random, int, int], str]
    command: tuple[str, ...] = ("--processes", "2", "--max-restarts", "20")
    ends: bool = False
    options: tuple[str, ...] = ()


ONCE = ("--processes", "2")
AGAIN = ("--max-restarts", "20")
NODE = ("--nnodes", "2", "--nproc-per-node", "1", *AGAIN, "--rdzv-backend", "c10d", "--rdzv-id", "faults")
CUT = ("train.sequence_processes=2",)
SHARED_OUT = ("train.expert_parallel=2", "model.pattern=mamba2 gqa moe(n_experts=4)")
KINDS: dict[str, Kind] = {
    "killed": Kind("SIGKILL to a random process", 8, send(signal.SIGKILL)),
    "first": Kind("SIGKILL to process 0", 4, send(signal.SIGKILL, 0)),
    "writing": Kind("SIGKILL while a checkpoint is written", 4, while_it_writes),
    "evaluating": Kind("SIGKILL during an evaluation", 3, while_it_evaluates),
    "starting": Kind("SIGKILL during a start", 3, while_it_starts),
    "torchrun": Kind("SIGKILL to a random process", 4, send(signal.SIGKILL), ("torchrun", *AGAIN)),
    "nodes": Kind("SIGKILL to a random process of two nodes", 2, send(signal.SIGKILL), ("torchrun", *NODE)),
    "pieces": Kind("SIGKILL to a process with a piece of a sequence", 3, send(signal.SIGKILL), options=CUT),
    "experts": Kind(
        "SIGKILL to a process with some of the experts (`moe` for `swiglu`)",
        3,
        send(signal.SIGKILL),
        options=SHARED_OUT,
    ),
    "hang": Kind("SIGSTOP to a random process", 3, send(signal.SIGSTOP)),
    "preempted": Kind("SIGTERM to the launcher", 2, send_launcher(signal.SIGTERM), ONCE, True),
    "terminated": Kind("SIGTERM to a random process", 2, send(signal.SIGTERM), ONCE, True),
    "interrupted": Kind("SIGINT from a terminal", 2, send_launcher(signal.SIGINT), ONCE, True),
    "launcher": Kind("SIGKILL to the launcher, which keeps the store", 2, send_launcher(signal.SIGKILL), ONCE, True),
    "disk": Kind("a file system that is full", 2, full_disk, ONCE, True),
}


def commands(kind: Kind) -> list[tuple[str, ...]]:
    """What trains, of each node."""
    if kind.command[0] != "torchrun":
        return [(*ZOO, *kind.options, *kind.command)]
    options = kind.command[1:]
    if "--nnodes" not in options:
        return [(*TORCHRUN, "--nproc-per-node", "2", *options, *ZOO[1:])]
    return [(*TORCHRUN, *options, "--rdzv-endpoint", f"localhost:{free_port()}", *ZOO[1:])] * 2


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be equal: bytes of the last weights, and the records without times."""
    last = folder / "checkpoints" / f"step_{STEPS}"
    weights = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "tokens_per_second")
    return {**weights, "records": [{k: v for k, v in record.items() if k not in times} for record in records]}


@contextlib.contextmanager
def of_its_own(folder: Path) -> Iterator[None]:
    """A small file system at a folder, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "zoo-faults", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def injected(name: str, kind: Kind, folder: Path, seed: int) -> list[Data]:
    """A training with the faults of one kind, as a row for each."""
    chance, rows = random.Random(f"{seed} {name}"), []
    run = Run(folder, commands(kind))
    try:
        width = (STEPS - 40) // kind.times
        for i in range(kind.times):
            said = run.log.stat().st_size
            low = max(10 + i * width, run.step() + 1)
            to = kind.inject(run, chance, low, max(10 + (i + 1) * width, low + 1))
            run.old |= run.processes()
            step, at = run.step(), time.monotonic()
            status = None
            if kind.ends:
                status = run.waits_for_end()[0]
                if name == "launcher":  # the processes outlive it by the time that their checkpoint takes
                    lock = run.run / "result.json"
                    while not lock.exists():
                        time.sleep(0.05)
                (run.run / ".filler").unlink(missing_ok=True)
                ended = time.monotonic() - at
                run.start()
            if step >= EVERY or (kind.ends and name != "disk"):
                resumed = run.waits_for(functools.partial(from_step, run, said), 0.02)
            else:  # nothing was written yet
                resumed, _ = 0, run.pid(0)
            rows.append(
                {
                    "to": to,
                    "step": step,
                    "resumed": resumed,
                    "recomputed": max(step - resumed, 0),
                    "seconds": ended if kind.ends else time.monotonic() - at,
                    "status": status,
                    "said": [line.replace("../", "") for line in run.lines(said)][:1],
                }
            )
        statuses = run.waits_for_end()
        if any(statuses):
            raise RuntimeError(f"{name} ended with {statuses}: {run.log.read_text()[-2000:]}")
    finally:
        run.end()
    return rows


def from_step(run: Run, said: int) -> int | None:
    """The step from which the run has gone on, as it says."""
    text = run.log.read_bytes()[said:].decode(errors="replace")
    found = [line for line in text.splitlines() if line.startswith("Going on from ")]
    return int(found[-1].rstrip(".").rsplit("_", 1)[1]) if found else None


def unharmed(root: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """The outcome of the training with these options, without a fault."""
    folder = root / "-".join(["whole", *(option.split("=")[0] for option in options)])
    folder.mkdir()
    run = Run(folder, [(*ZOO, *options, *ONCE)])
    try:
        if any(run.waits_for_end()):
            raise RuntimeError(run.log.read_text())
    finally:
        run.end()
    return outcome(folder / "run")


def measure(arguments: argparse.Namespace, data: Data) -> Iterator[Data]:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "experiment.yaml").write_text(json.dumps(EXPERIMENT))
        wholes: dict[tuple[str, ...], dict[str, Any]] = {}
        for name in arguments.kinds:
            options = KINDS[name].options
            if options not in wholes:
                wholes[options] = unharmed(root, options)
            expected, folder = wholes[options], root / name
            folder.mkdir()
            with of_its_own(folder / "run") if name == "disk" else contextlib.nullcontext():
                rows = injected(name, KINDS[name], folder, arguments.seed)
                found = outcome(folder / "run")
            equal = {key: found.get(key) == value for key, value in expected.items()}
            command = " ".join([*KINDS[name].options[:1], *KINDS[name].command])
            row = {"faults": rows, "equal": equal, "command": command}
            kinds = {**data.get("kinds", {}), name: row}
            data = {
                **data,
                "machine": facts(),
                "seed": arguments.seed,
                "kinds": {k: kinds[k] for k in KINDS if k in kinds},
            }
            yield data


def markdown(data: Data) -> str:
    kinds = data["kinds"]
    n = sum(len(row["faults"]) for row in kinds.values())
    lost = sum(not all(row["equal"].values()) for row in kinds.values())
    head = [
        "# Faults in trainings by several processes",
        "",
        "`python -m zoo.benchmarks.studies.faults` measures this page again; its first lines say how.",
        "",
        f"{n} faults were injected into {len(kinds)} trainings of {STEPS} steps by 2 processes on one machine (seed "
        f"{data['seed']}); the two nodes of one kind are two launchers on this machine. "
        f"**Runs lost: {lost}.** A run counts as lost if it did not end, or if its last weights, its running average "
        "or its records differ in a bit from those of the run without a fault: then a batch was left out or repeated.",
        "",
        f"Machine: {shown_machine(data['machine'])}, with other programs running. Steps recomputed are those after the "
        f"last checkpoint, which is written every {EVERY} steps. Seconds are from the fault until the run resumes, or "
        "until the command has ended, and are mostly the start of Python; a process that does not answer costs "
        "`train.timeout` (6 s) and 30 s of torch's launcher.",
        "",
        "| fault | command | injected | what happened | steps recomputed | seconds | equal to the bit |",
        "|---|---|--:|---|--:|--:|---|",
    ]
    return "\n".join([*head, *(_row(KINDS[name], row) for name, row in kinds.items()), ""])


def _row(kind: Kind, row: Data) -> str:
    faults = row["faults"]
    steps = sorted(fault["recomputed"] for fault in faults)
    seconds = sorted(fault["seconds"] for fault in faults)
    if kind.ends:
        ends = sorted({"by the signal" if f["status"] < 0 else f"with status {f['status']}" for f in faults})
        happened = f"the command ended {' or '.join(ends)}; given again, it resumed"
    else:
        happened = "all started again by themselves"
    command = row["command"] if row["command"].startswith("torchrun") else f"zoo train {row['command']}"
    spans = f"{steps[0]} to {steps[-1]} | {seconds[0]:.0f} to {seconds[-1]:.0f}"
    differ = ", ".join(key for key, equal in row["equal"].items() if not equal)
    equal, shown = f"no: {differ}" if differ else "yes", command.split(" --rdzv")[0]
    return f"| {kind.told} | `{shown}` | {len(faults)} | {happened} | {spans} | {equal} |"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of faults")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the processes")


STUDY = Study("faults", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
