"""What every study made of sweeps shares: a page that is made from the stores of its sweeps, and from nothing else.

The stores lie in `data/studies` of the folder of the results, each as `zoo sweep` makes it, without its run folders.
The sweep of a store continues there: `zoo sweep SWEEP --out docs/results/data/studies/NAME`.
`python -m zoo.benchmarks.studies.NAME --out docs/results` makes the page and its pictures again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from zoo.benchmarks.studies.harness import RESULTS, table
from zoo.report.runs import ENDED
from zoo.report.trials.board import gap_cells, gap_title, lines
from zoo.report.trials.compare import Comparison
from zoo.report.trials.groups import named, task_of
from zoo.report.trials.source import CHOOSE, Trials, from_sweep, value
from zoo.sweeps.config import read_sweep_config
from zoo.sweeps.space import SEED
from zoo.sweeps.store import is_sweep
from zoo.tasks.protocol import create_task
from zoo.training.evaluation import held_out

Row = Mapping[str, Any]
STUDIES = Path("data", "studies")


@dataclass(frozen=True)
class Stored:
    """A sweep whose store is in the tree.

    Attributes:
        name: of its folder below `data/studies`.
        command: of the sweep, without `--out`.
        where: the folder, once it is read.
        trials: what it holds; None where it has not been run yet.
    """

    name: str
    command: str
    where: Path = Path()
    trials: Trials | None = None

    def read(self, folder: Path) -> Stored:
        """The same with its trials, where the folder of the results has them."""
        where = folder / STUDIES / self.name
        found = from_sweep(where) if is_sweep(where) else None
        return Stored(self.name, self.command, where, found)

    def planned(self) -> list[dict[str, str]]:
        """Every combination of the sweep's lists, by key, without the option that is chosen and the seed."""
        if self.trials is None:
            return []
        axes = read_sweep_config(str(self.where)).read_space().axes
        kept = {k: v for k, v in axes.items() if k != SEED and k not in self.trials.chosen}
        return [dict(zip(kept, map(named, point), strict=True)) for point in itertools.product(*kept.values())]

    def seeds(self) -> int:
        """The number of seeds of every combination."""
        return len(read_sweep_config(str(self.where)).read_space().axes.get(SEED, [0]))

    def results(self, point: Mapping[str, str] | None = None) -> list[Row]:
        """The trials that enter results, by default of all combinations."""
        found = [r for r in self.trials.rows if r["stage"] != CHOOSE and r["status"] in ENDED] if self.trials else []
        return [r for r in found if all(named(value(r, k)) == v for k, v in (point or {}).items())]


Read = Mapping[str, Stored]


@dataclass(frozen=True)
class SweepStudy:
    """A page about sweeps.

    Attributes:
        name: of the module, and of the page.
        about: the module's docstring, which `--help` prints.
        stores: the sweeps.
        title: of the page.
        paragraphs: its text before the first section.
        sections: lines by title, none where nothing was measured; those on what is missing and how it was made follow.
        pictures: texts of SVG files by their names.
    """

    name: str
    about: str | None
    stores: tuple[Stored, ...]
    title: str
    paragraphs: tuple[str, ...]
    sections: Callable[[Read], dict[str, list[str]]]
    pictures: Callable[[Read], dict[str, str]] = field(default=lambda read: {})

    def read(self, folder: Path) -> dict[str, Stored]:
        """The sweeps with what the folder of the results has of them."""
        return {each.name: each.read(folder) for each in self.stores}

    def markdown(self, read: Read) -> str:
        """The page."""
        parts = [f"# {self.title}", "", *(line for text in self.paragraphs for line in paragraph(text))]
        for title, found in self.sections(read).items():
            parts += [f"## {title}", "", *(found or ["Not measured yet."]), ""]
        parts += [*missing(list(read.values())), "", *made_by(self.name, list(read.values()))]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write the page and its pictures into the folder of the results."""
        read = self.read(folder)
        texts = {f"{self.name}.md": self.markdown(read)}
        texts |= {f"{name}.svg": text for name, text in self.pictures(read).items()}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in texts]

    def main(self, given: Sequence[str] | None = None) -> None:
        """Run the command line, by default that of this process."""
        parser = argparse.ArgumentParser(prog=f"python -m zoo.benchmarks.studies.{self.name}", description=self.about)
        parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results, by default {RESULTS}")
        for path in self.write(parser.parse_args(given).out):
            print(path)


# ---- text and tables


def paragraph(text: str) -> list[str]:
    """A paragraph as lines, with an empty one behind it."""
    return [*textwrap.wrap(" ".join(text.split()), 116, break_long_words=False, break_on_hyphens=False), ""]


def code(name: str) -> str:
    """The name of a group as code; of layers that are one, each of their names."""
    return " = ".join(f"`{part}`" for part in name.replace("|", "\\|").split(" = "))


def comparison_table(comparison: Comparison) -> list[str]:
    """The table of a comparison, the best figures bold."""
    shown, cells = lines(comparison)
    rows = []
    for group, line in zip(comparison.groups, cells, strict=True):
        texts = [code(name) for name in group.names]
        for cell in line:
            text = f"**{cell.text}**" if cell.best else cell.text
            detail = "; ".join(part for part in cell.detail.split("\n") if part)
            texts.append(" ".join(filter(None, [text, f"({detail})" if detail else ""])).replace("\n", " "))
        rows.append(texts)
    return table([*comparison.by, *(column.title.replace("\n", " ") for column in shown)], rows)


def gap_table(comparison: Comparison) -> list[str]:
    """The differences of a comparison to its baseline, under a line on what they are of."""
    if not comparison.gaps:
        return []
    rows = [
        [*map(code, gap.group.names), *(cell.replace("\n", " ") for cell in gap_cells(comparison, gap))]
        for gap in comparison.gaps
    ]
    head = [*comparison.by, "difference", f"95 % interval (of all {len(rows)} at once)", "p (Holm)", "method"]
    return [f"{gap_title(comparison)}:", "", *table(head, rows)]


# ---- what is missing, and how it was made


def missing(stores: Sequence[Stored]) -> list[str]:
    """Which combinations of the sweeps have fewer seeds than were planned, and which failed."""
    found = []
    for each in stores:
        if each.trials is None:
            found.append(f"- `{each.name}`: not measured yet.")
            continue
        seeds, none, few = each.seeds(), [], []
        for point in each.planned():
            label, n = ", ".join(f"`{v}`" for v in point.values()), len(each.results(point))
            if n == 0:
                none.append(label)
            elif n < seeds:
                few.append(f"{label} ({n} of {seeds} seeds)")
        if none:
            found.append(f"- `{each.name}`, no seed yet: {'; '.join(none)}.")
        if few:
            found.append(f"- `{each.name}`, fewer seeds than planned: {'; '.join(few)}.")
        if failed := [r for r in each.trials.rows if r["status"] == "failed"]:
            reasons = "; ".join(f"{r['id']} ({r['reason']})" for r in failed)
            found.append(f"- `{each.name}`, trials that failed: {reasons}.")
    return ["## What is missing", "", *(found or ["Nothing of what was planned."])]


def made_by(name: str, stores: Sequence[Stored]) -> list[str]:
    """The commands, and the machine, commits and processor time of the trials."""
    found = ["## How it was made", "", "```sh"]
    found += [f"{each.command} --out {RESULTS / STUDIES / each.name}" for each in stores]
    found += [f"python -m zoo.benchmarks.studies.{name}  # this page", "```", ""]
    found += ["`zoo sweep` continues from a store: trials that ended are not trained again.", ""]
    rows = []
    for each in stores:
        if each.trials is None:
            continue
        ended = [r for r in each.trials.rows if r["status"] in ENDED]
        hours = sum(r["processor_seconds"] or 0.0 for r in ended) / 3600
        loads = [r["load"] for r in ended if r["load"] is not None]
        rows.append(
            [
                f"`{each.name}`",
                f"{len(ended)} of {len(each.trials.rows) + each.trials.missing}",
                f"{hours:.2f}",
                f"{min(loads):.0f} to {max(loads):.0f}" if loads else "",
                ", ".join(sorted({f"{r['machine.cpu']}, {r['machine.threads']} thread" for r in ended})),
                ", ".join(sorted({str(r["commit"]).rstrip("+")[:7] for r in ended})),
            ]
        )
    head = ["store", "trials that ended", "processor hours", "load of the machine", "machine", "commit"]
    return [*found, *table(head, rows)]


# ---- figures of parts of the test rows


def by_slice(trials: Trials, rows: Sequence[Row], name: str) -> list[dict[int, float]]:
    """For each trial, its accuracy on the test rows of each value of a slice, such as the number of pairs.

    The rows are drawn again: a task gives the same rows for the same config.
    """
    known: dict[str, Any] = {}
    found = []
    for row in rows:
        task = task_of(row)
        key = json.dumps(task)
        if key not in known:
            batch = held_out(create_task(task.pop("name"), **task), "test", int(row["config.train.test_rows"]))
            known[key] = batch.slices[name].tolist()
        figures = trials.tests(row["trial"])
        assert figures is not None
        each: dict[int, list[float]] = {}
        for at, figure in zip(known[key], figures.figures["accuracy"].tolist(), strict=True):
            each.setdefault(int(at), []).append(figure)
        found.append({at: fmean(each[at]) for at in sorted(each)})
    return found


def by_position(rows: Sequence[Row]) -> list[dict[int, float]]:
    """For each trial, its accuracy by the last position of a stretch, of tasks whose score has it."""
    found = []
    for row in rows:
        each = {
            int(m[1]): v for k, v in row.items() if v is not None and (m := re.fullmatch(r"test\.accuracy_(\d+)", k))
        }
        found.append(dict(sorted(each.items())))
    return found
