"""Trials to compare: those of sweeps, and ordinary runs, in the same three tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from numpy.typing import NDArray

from zoo.core.errors import UsageError, closest, quoted
from zoo.core.run_files import dotted
from zoo.report.labels import ASIDE
from zoo.report.runs import ENDED, Run
from zoo.report.units import number
from zoo.sweeps.defaults import with_defaults
from zoo.sweeps.store import COLUMNS, Store, joined, read_sweep, table

SEEDS = ("train.seed", "seed")
CHOOSE = "choose"
"""The stage whose trials choose a value; they read no test row."""
_LISTED = 24  # keys named in an error


class RowFigures(NamedTuple):
    """The scores of a trial's test rows.

    Attributes:
        problem: (n,) the problem of each.
        figures: of each figure that is known of the rows, such as accuracy, their values, (n,).
    """

    problem: NDArray[Any]
    figures: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Trials:
    """Trials with their curves and the scores of their test rows.

    Attributes:
        name: where they come from, in a word or two.
        frames: the tables `trials`, `curves` and `problems`, with the columns of `zoo.sweeps.store`. `trials` also has
            `sweep`, where each comes from.
        swept: keys that a sweep varied, in its order.
        chosen: keys of which a sweep chose the best value in trials of their own.
        sources: the text of each sweep's sweep.yaml, by its folder.
        missing: trials of sweeps that have not been started.
    """

    name: str
    frames: Mapping[str, pl.DataFrame]
    swept: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    sources: Mapping[str, str] | None = None
    missing: int = 0

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The table `trials`, a mapping a row."""
        return self.frames["trials"].to_dicts()

    @cached_property
    def keys(self) -> list[str]:
        """All keys that distinguish trials: swept ones first, then those of configs, then columns."""
        columns = self.frames["trials"].columns
        config = [c.removeprefix("config.") for c in columns if c.startswith("config.")]
        plain = [c for c in columns if "." not in c]
        return list(dict.fromkeys([*self.swept, *config, *plain]))

    def check(self, key: str, option: str) -> str:
        """A key as trials have it.

        Raises:
            UsageError: no trial has it.
        """
        if key in self.keys:
            return key
        ending = [known for known in self.keys if known.endswith(f".{key}")]
        if len(ending) == 1:  # `lr` for `train.lr`
            return ending[0]
        known = list(dict.fromkeys([*self.swept, *self.varied]))
        listed = ", ".join(known[:_LISTED]) or "none"
        hint = f" Did you mean {ending[0]!r}?" if ending else closest(key, self.keys)
        raise UsageError(f"{option} {quoted(key)} is no key of these trials.{hint} They differ in: {listed}.")

    @cached_property
    def varied(self) -> list[str]:
        """The keys of configs in which trials differ, but for those that change nothing that is learned."""
        return varying(self.rows)

    def tests(self, trial: int) -> RowFigures | None:
        """The scores of a trial's test rows, None where they are unknown."""
        found = self._tests.get((trial,))
        if found is None:
            return None
        aside = ("trial", "row", "problem")
        known = [
            c for c in found.columns if c not in aside and found[c].dtype.is_numeric() and not found[c].has_nulls()
        ]
        return RowFigures(found["problem"].to_numpy(), {name: found[name].to_numpy() for name in known})

    @cached_property
    def _tests(self) -> dict[tuple[Any, ...], pl.DataFrame]:
        return self.frames["problems"].partition_by("trial", as_dict=True)

    @cached_property
    def curves(self) -> dict[int, pl.DataFrame]:
        """The curves of each trial, by its number."""
        parts = self.frames["curves"].partition_by("trial", as_dict=True)
        return {int(key[0]): part for key, part in parts.items()}


def value(row: Mapping[str, Any], key: str) -> Any:
    """What a trial has for a key: as it was swept, else as its config has it, else the column of that name."""
    for column in (f"set.{key}", f"config.{key}", key):
        if (found := row.get(column)) is not None:
            return found
    return None


def varying(rows: Sequence[Mapping[str, Any]], but: Iterable[str] = ()) -> list[str]:
    """Keys of configs in which trials differ, those aside that change nothing that is learned, and seeds."""
    aside = {*ASIDE, *but}
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c.startswith("config.")]
    return [
        key
        for column in columns
        if (key := column.removeprefix("config.")) not in aside and len({_text(row.get(column)) for row in rows}) > 1
    ]


def from_sweep(folder: Path) -> Trials:
    """The trials of a sweep.

    Raises:
        UsageError: it is no sweep, or a file of it is damaged.
    """
    data, store = read_sweep(folder), Store(folder)
    trials = store.trials().with_columns(sweep=pl.lit(folder.resolve().name))
    swept = [c.removeprefix("set.") for c in trials.columns if c.startswith("set.")]
    choose = data.get("choose")
    key = choose.get("key") if isinstance(choose, Mapping) else None
    chosen = (key,) if isinstance(key, str) else tuple(k for k in key or () if isinstance(k, str))
    frames = {"trials": trials, "curves": store.curves(), "problems": store.problems()}
    text = (folder / "sweep.yaml").read_text(encoding="utf-8")
    planned = data.get("trials")
    missing = max(planned - len(trials), 0) if isinstance(planned, int) else 0
    return Trials(folder.resolve().name, frames, tuple(swept), chosen, {str(folder): text}, missing)


def from_runs(runs: Sequence[Run]) -> Trials:
    """Ordinary runs as trials."""
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        rows.append(_row(i, run))
        curves += [{"trial": i, **_numbers(line), "split": line.get("split")} for line in run.metrics]
    frames = {
        "trials": with_defaults(table(rows, {**COLUMNS["trials"], "sweep": pl.String})),
        "curves": table(curves, COLUMNS["curves"]),
        "problems": pl.DataFrame(schema=COLUMNS["problems"]),
    }
    return Trials(f"{len(runs)} runs", frames)


def together(parts: Sequence[Trials]) -> Trials:
    """Several sources as one, their trials numbered anew."""
    if len(parts) == 1:
        return parts[0]
    frames: dict[str, list[pl.DataFrame]] = {name: [] for name in COLUMNS}
    first = 0
    for part in parts:
        for name, frame in part.frames.items():
            frames[name].append(frame.with_columns(pl.col("trial") + first))
        first += int(part.frames["trials"]["trial"].max() or 0) + 1  # type: ignore[arg-type]
    return Trials(
        ", ".join(part.name for part in parts),
        {name: joined(each, COLUMNS[name]) for name, each in frames.items()},
        tuple(dict.fromkeys(key for part in parts for key in part.swept)),
        tuple(dict.fromkeys(key for part in parts for key in part.chosen)),
        {folder: text for part in parts for folder, text in (part.sources or {}).items()},
        sum(part.missing for part in parts),
    )


def _row(i: int, run: Run) -> dict[str, Any]:
    result = run.result
    figures = {
        f"{split}.{key}": figure
        for split in ("validation", "test")
        if isinstance(result.get(split), Mapping)
        for key, given in result[split].items()
        if (figure := number(given)) is not None
    }
    machine = result.get("machine")
    return {
        "trial": i,
        "id": str(run.path),
        "sweep": str(run.path.parent),
        "stage": "grid",
        "status": run.status if run.status in ENDED or run.status == "interrupted" else "running",
        "seed": run.seed if isinstance(run.seed, int) else None,
        **{key: number(result.get(key)) for key in ("steps", "seconds", "state_bytes", "flops_per_token")},
        "parameters": number(result.get("n_parameters")),
        "peak_memory": number(result.get("peak_memory_bytes")),
        "tokens_per_second": number(result.get("tokens_per_second")),
        "config.name": run.name,
        **{key: _cell(given) for key, given in dotted(run.config, "config.") if key != "config.name"},
        **figures,
        **{k: _cell(v) for k, v in dotted(machine if isinstance(machine, Mapping) else {}, "machine.")},
    }


def _cell(given: Any) -> Any:
    """A value as a cell of a table: what has parts as JSON text."""
    return json.dumps(given, default=str) if isinstance(given, list | tuple | Mapping) else given


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: figure for key, given in line.items() if (figure := number(given)) is not None}


def _text(given: Any) -> str:
    return json.dumps(given, default=str)
