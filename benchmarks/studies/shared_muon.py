"""What a step of Muon costs where processes train one model together, beside the same step in one process.

    python -m zoo.benchmarks.studies.shared_muon [--processes 2] [--rounds 15]

The matrices are those of the layers below. In each round, in turns and in the same processes: torch.optim.Muon in the
first process alone, with all matrices (`one`); the zoo's where each process has all matrices (`ddp`) and where it has
its rows of each (`fsdp`); and torch.optim.Muon of the same rows as DTensors (`dtensor`). A process has one thread.
Ratios are to `one` of the same round: median, and quartiles. The load is that of the machine before the measurement, as
Linux and macOS give it: if it is above the number of cores, other programs take part of the time.
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
from torch import Tensor, nn

from zoo.benchmarks.studies.harness import Data, Study, facts, free_port, quartiles, shown_machine
from zoo.models.create import create_backbone
from zoo.training.muon import SharedMuon
from zoo.training.optimizer import parameter_groups
from zoo.training.processes import join
from zoo.training.shards import own_rows

SIZES = [("4*(gated_deltanet swiglu)", 128), ("4*(gated_deltanet swiglu)", 384)]
SEVERAL = ("ddp", "fsdp", "dtensor")


def measured(processes: int, rounds: int, pattern: str, width: int) -> Data:
    """Milliseconds of one process, and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "times.pt")
        arguments = processes, free_port(), rounds, pattern, width, out
        torch.multiprocessing.start_processes(worker, arguments, processes, start_method="spawn")
        times = torch.load(out)
    return {
        "milliseconds": 1000 * statistics.median(times["one"]),
        "matrices": times["matrices"],
        **{way: quartiles(times[way], times["one"]) for way in SEVERAL},
    }


def worker(rank: int, size: int, port: int, rounds: int, pattern: str, width: int, out: Path) -> None:
    """One of the processes; the first writes the seconds of each way in each round."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    group = join()
    import torch.distributed as dist

    torch.manual_seed(0)
    backbone = create_backbone(pattern, d_model=width)
    matrices = [p.detach() for p in parameter_groups(backbone, muon=True)["matrices"]]
    gradients = [torch.randn_like(matrix) for matrix in matrices]
    steps = steps_of(group, matrices, gradients)
    times: dict[str, Any] = {way: [] for way in steps}
    for way in (*steps, *list(steps) * rounds):  # the first of each is not counted
        dist.barrier()
        start = time.perf_counter()
        if way != "one" or rank == 0:
            steps[way]()
        times[way].append(time.perf_counter() - start)
        dist.barrier()
    if rank == 0:
        torch.save({"matrices": len(matrices)} | {way: each[1:] for way, each in times.items()}, out)


def steps_of(group: Any, matrices: list[Tensor], gradients: list[Tensor]) -> dict[str, Callable[[], object]]:
    """A step of each way."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def parameters(cut: Callable[[Tensor], Tensor]) -> list[nn.Parameter]:
        found = [nn.Parameter(cut(matrix).clone()) for matrix in matrices]
        for parameter, gradient in zip(found, gradients, strict=True):
            parameter.grad = cut(gradient)
        return found

    def shared(cut: Callable[[Tensor], Tensor], in_pieces: bool) -> SharedMuon:
        found = parameters(cut)
        shapes = {parameter: matrix.shape for parameter, matrix in zip(found, matrices, strict=True)}
        return SharedMuon(found, lr=0.01, shapes=shapes, in_pieces=in_pieces, group=group)

    mesh = init_device_mesh("cpu", (group.size,))
    how: Any = {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    return {
        "one": torch.optim.Muon(parameters(lambda t: t), **how).step,
        "ddp": shared(lambda t: t, False).step,
        "fsdp": shared(lambda t: t[own_rows(len(t), group.rank, group.size)], True).step,
        "dtensor": torch.optim.Muon(parameters(lambda t: distribute_tensor(t, mesh, [Shard(0)])), **how).step,
    }


def measure(arguments: argparse.Namespace, data: Data) -> Iterator[Data]:
    for pattern, width in SIZES:
        load = round(os.getloadavg()[0])
        row = measured(arguments.processes, arguments.rounds, pattern, width)
        name = f"{pattern}, {width}, {arguments.processes}"
        about = {"pattern": pattern, "width": width, "processes": arguments.processes, "rounds": arguments.rounds}
        row = {**about, "machine": facts(), "load": load, **row}
        data = {**data, "rows": {**data.get("rows", {}), name: row}}
        yield data


def markdown(data: Data) -> str:
    def ratio(found: list[float]) -> str:
        low, middle, high = found
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    rows = []
    for row in data["rows"].values():
        cells = [
            f"`{row['pattern']}`",
            row["width"],
            row["matrices"],
            row["processes"],
            row["load"],
            f"{row['milliseconds']:.1f} ms",
        ]
        rows.append(f"| {' | '.join(map(str, [*cells, *(ratio(row[way]) for way in SEVERAL)]))} |")
    head = "| layers | width | matrices | processes | load | one process | ddp | fsdp | DTensors |"
    head += "\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    told = "`python -m zoo.benchmarks.studies.shared_muon` measures this page again; its first lines say how."
    machines = " ".join(dict.fromkeys(f"Machine: {shown_machine(row['machine'])}." for row in data["rows"].values()))
    slower = all(row[way][1] > 1 for row in data["rows"].values() for way in SEVERAL)
    found = " No speed-up was measured: every median is above 1." if slower else ""
    return "\n".join(
        ["# What Muon costs in several processes", "", told, "", *ABOUT, "", machines + found, "", head, *rows, ""]
    )


ABOUT = """\
Time of a step. `one process` is the baseline: `torch.optim.Muon` with all matrices in the first of the processes. The other columns
are ratios to the baseline of the same round: the median over the rounds, and in brackets the quartiles. A round measures all ways
in turns, in the same processes, of one thread each. `ddp` and `fsdp` are the zoo's, `DTensors` is `torch.optim.Muon` of the same
rows as DTensors. `load` is the machine's load average: far above the number of cores, other programs took most of the time.""".splitlines()  # noqa: E501


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each way")


STUDY = Study("shared_muon", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
