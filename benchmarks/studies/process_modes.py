"""What a training step costs in each way in which processes share a training, beside the same step in one process.

    python -m zoo.benchmarks.studies.process_modes [--processes 2] [--rounds 7]

All ways train the same model on the same batch, with AdamW and clipping. In each round, in turns and in the same
processes: the first process alone, with the whole batch; DDP; FSDP; FSDP with `train.recompute`; a sequence that all
processes share; and experts that they share out. A process has one thread. Wall time is that of the slowest process,
processor time that of all processes together. Ratios are to one process in the same round: median, and quartiles.
Weights held are the bytes of the process that has most. The load is that of the machine before the measurement: if it
is above the number of cores, other programs take part of the time, and wall times say little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.benchmarks.studies.harness import Data, Study, facts, free_port, quartiles, shown_machine, table
from zoo.models.create import model_config
from zoo.objectives.base import Objective, create_objective
from zoo.tasks import create_task
from zoo.training.data import any_rows
from zoo.training.group import Group
from zoo.training.processes import Processes, join
from zoo.training.session import Session
from zoo.training.shards import here
from zoo.training.train_options import TrainConfig

PATTERN, WIDTH, ROWS, LENGTH = "2*(gated_deltanet moe(n_experts=8, top_k=2))", 256, 8, 256
ONE = "one process"


def modes(n: int) -> dict[str, dict[str, Any]]:
    """The options of every way in which n processes share a training."""
    return {
        ONE: {},
        "ddp": {},
        "fsdp": {"parallel": "fsdp"},
        "fsdp, recompute": {"parallel": "fsdp", "recompute": True},
        "sequence_processes": {"sequence_processes": n},
        "expert_parallel": {"expert_parallel": n},
        "expert_parallel, fsdp": {"expert_parallel": n, "parallel": "fsdp"},
    }


class Mode:
    """A training in one way; every process of the group makes it and takes its steps.

    Args:
        group: the processes.
        objective: of the training.
        data: the batch of all processes.
        options: of training.
    """

    def __init__(self, group: Group, objective: Objective, data: Any, options: dict[str, Any]):
        self._config = TrainConfig(batch_size=ROWS, device="cpu", steps=1000, **options)
        group.cut_sequences(self._config.sequence_processes)
        group.share_experts(self._config.expert_parallel)
        self._group, self._objective, self._data, self._pieces = group, objective, data, group.pieces
        spec = model_config(PATTERN, d_model=WIDTH, vocab_size=objective.task.vocab_size)
        self._session = Session(spec, self._config, torch.device("cpu"), group=group)
        self._session.model.train()
        self._rows = group.rows(ROWS)
        self._stepping = group.stepping(self._session.model, 1)
        self.held = sum(here(p).nbytes for p in self._session.model.parameters())
        self.n_parameters = self._session.model.n_parameters()

    def step(self) -> None:
        """Learn the batch once."""
        more: dict[str, Any] = {} if self._rows is None else {"rows": self._rows}
        more |= {} if self._pieces is None else {"pieces": self._pieces}
        updates = self._objective.updates(self._session.model, self._data, {}, self._session.generator, **more)
        while (update := self._stepping.next(updates)) is not None:
            update.loss.backward()
            self._stepping.finish()
            self._session.optimizer.step(0)


def worker(rank: int, size: int, port: int, rounds: int, out: Path) -> None:
    """One of the processes; the first writes the times of each way in each round."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    group = join()
    assert isinstance(group, Processes)
    task = create_task("mqar", vocab_size=512, seq_len=LENGTH, n_pairs=8)
    objective = create_objective("next_token", task)
    data = objective.encode(any_rows(task, ROWS, 0))
    ways: dict[str, Callable[[], None]] = {}
    held, n_parameters = {}, 0
    for name, options in modes(size).items():
        if name == ONE and rank:
            ways[name], held[name] = lambda: None, 0
            continue
        mode = Mode(Group() if name == ONE else group, objective, data, options)
        ways[name], held[name], n_parameters = mode.step, mode.held, mode.n_parameters
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for name in (*ways, *list(ways) * rounds):  # the first of each is not counted
        group.largest(0)
        start, used = time.perf_counter(), time.process_time()
        ways[name]()
        used = time.process_time() - used
        group.largest(0)
        times[name].append((time.perf_counter() - start, used))
    everywhere = group.gathered([(times, held)])
    if rank == 0:
        found: dict[str, Any] = {"parameters": n_parameters, "ways": {}}
        for name in ways:
            each = [[process[name][turn] for [(process, _)] in everywhere] for turn in range(1, rounds + 1)]
            found["ways"][name] = {
                "wall": [max(wall for wall, _ in turn) for turn in each],
                "processor": [sum(used for _, used in turn) for turn in each],
                "held": max(held[name] for [(_, held)] in everywhere),
            }
        torch.save(found, out)


def measured(processes: int, rounds: int) -> Data:
    """Seconds of one process, and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "times.pt")
        arguments = processes, free_port(), rounds, out
        torch.multiprocessing.start_processes(worker, arguments, processes, start_method="spawn")
        found = torch.load(out)
    one = found["ways"][ONE]
    rows: Data = {}
    for name, way in found["ways"].items():
        ratios = {kind: quartiles(way[kind], one[kind]) for kind in ("wall", "processor")}
        rows[name] = {"held": way["held"], **ratios}
    seconds = {kind: statistics.median(one[kind]) for kind in ("wall", "processor")}
    return {"parameters": found["parameters"], "seconds": seconds, "ways": rows}


def measure(arguments: argparse.Namespace, data: Data) -> Iterator[Data]:
    load = round(os.getloadavg()[0])
    row = measured(arguments.processes, arguments.rounds)
    about = {"processes": arguments.processes, "rounds": arguments.rounds, "machine": facts(), "load": load}
    yield {**about, **row}


def markdown(data: Data) -> str:
    def ratio(found: list[float]) -> str:
        low, middle, high = found
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    seconds = data["seconds"]
    one = f"{seconds['wall']:.2f} s and {seconds['processor']:.2f} processor seconds"
    rows = [
        [f"`{name}`", *(ratio(way[kind]) for kind in ("processor", "wall")), f"{way['held'] / 2**20:.1f} MiB"]
        for name, way in data["ways"].items()
        if name != ONE
    ]
    rows.insert(0, [ONE, "1", "1", f"{data['ways'][ONE]['held'] / 2**20:.1f} MiB"])
    lines = ["# What each way of sharing a training costs", ""]
    lines += ["`python -m zoo.benchmarks.studies.process_modes` measures this page again; its first lines say how.", ""]
    lines += [
        f"A training step of `{PATTERN}` at width {WIDTH} ({data['parameters'] / 1e6:.1f} million parameters) on "
        f"{ROWS} rows of {LENGTH} tokens, float32, AdamW. In one process a step took {one} (medians of "
        f"{data['rounds']} rounds). "
        f"{data['processes']} processes of one thread each share the same batch; the columns are ratios to one process "
        "in the same round: the median, and in brackets the quartiles.",
        "",
        f"Machine: {shown_machine(data['machine'])}; load average {data['load']}, as other programs were running: wall "
        "times say little, and processor times more. Processor time is that of all processes together, so that 1 is a "
        "way that does no work twice; wall time would be 1 / processes at best.",
        "",
    ]
    lines += table(["way", "processor time", "wall time", "weights held by a process"], rows)
    return "\n".join([*lines, ""])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way")


STUDY = Study("process_modes", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
