"""What every study shares: its command line, the rows of earlier runs, and the files that it writes.

`python -m zoo.benchmarks.studies.NAME --out docs/results` writes the page `NAME.md` and, where there is a picture,
`NAME.svg` into the folder, and the data `data/NAME.json` below it, after every row. The last line printed is
the data, or what a study says in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.core.errors import UsageError
from zoo.core.files import write_atomic
from zoo.training import machine

Data = dict[str, Any]
RESULTS = Path("docs/results")


def facts() -> Data:
    """This machine, and the versions of what computes on it."""
    return machine.describe_machine(torch.device("cpu")) | {"versions": machine.versions()}


def shown_machine(found: Data) -> str:
    """What `facts` says of a machine, in a few words."""
    return f"{found['cpu']}, {found['cpus']} cores, {found['system']}, torch {found['versions']['torch']}"


def load() -> float | None:
    """Processes at work on this machine over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def shown_load(found: float | None) -> str:
    """The same as the end of a sentence about a machine."""
    return "" if found is None else f", {found:.1f} processes at work when it began"


def quartiles(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios of times that were taken in turns."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table, whose columns of figures, all but the first, are set to the right."""
    under = ["---", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in [head, under, *rows]]


@dataclass(frozen=True)
class Study:
    """What is measured, and how it is shown.

    Attributes:
        name: of the module, and of the files.
        about: the module's docstring, which `--help` prints.
        arguments: adds the study's own arguments to a parser.
        measure: from the arguments and the data of earlier runs ({} if there is none) to the data after each new row.
            What is not measured this time, it keeps.
        markdown: the data as a page.
        svg: the data as a picture beside the page.
        said: the last line that is printed, from the data.
    """

    name: str
    about: str | None
    arguments: Callable[[argparse.ArgumentParser], object]
    measure: Callable[[argparse.Namespace, Data], Iterator[Data]]
    markdown: Callable[[Data], str]
    svg: Callable[[Data], str] | None = None
    said: Callable[[Data], str] = json.dumps

    def read(self, folder: Path) -> Data:
        """The data of earlier runs in a folder, {} if there is none."""
        file = folder / "data" / f"{self.name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def write(self, folder: Path, data: Data) -> None:
        """Write the data, the page and the picture into a folder."""
        (folder / "data").mkdir(parents=True, exist_ok=True)
        texts = {f"data/{self.name}.json": json.dumps(data, indent=1) + "\n", f"{self.name}.md": self.markdown(data)}
        texts |= {f"{self.name}.svg": self.svg(data)} if self.svg is not None else {}
        for name, text in texts.items():
            write_atomic(folder / name, text.encode())  # a study that is killed leaves whole files

    def main(self, given: Sequence[str] | None = None) -> None:
        """Run the command line, by default that of this process."""
        parser = argparse.ArgumentParser(
            prog=f"python -m zoo.benchmarks.studies.{self.name}",
            description=self.about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.arguments(parser)
        parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder to write into, by default {RESULTS}")
        arguments = parser.parse_args(given)
        data = self.read(arguments.out)
        try:
            for found in self.measure(arguments, data):
                self.write(arguments.out, data := found)
        except UsageError as error:
            parser.exit(2, f"{error}\n")
        print(self.said(data))
