"""Run folders, read back: whole ones, interrupted ones, and a clear word about damaged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from zoo.core.errors import UsageError, closest
from zoo.core.readers import check_path
from zoo.core.run_files import as_written_now, is_run, read_config, read_metrics, read_result
from zoo.report.units import number, printable

DEPTH = 3
"""How many levels of folders below a given one may lie between it and its runs."""

EXPECTED = "expected a run folder (with config.yaml, as `zoo train` writes it) or a folder of run folders"
Say = Callable[[str], object]
"""Hears of what is left out, a line each."""
T = TypeVar("T")
ENDED = {"finished": "", "target": "", "time_budget": "stopped by the clock"}
"""What is said of a run that ended by its steps, by its target or by its budget of seconds."""
_OF_SCORES = frozenset({"accuracy", "exact", "bits_per_byte", "n_rows", "n_problems", "exact_low", "exact_high"}) | {
    *("mse", "mse_ratio", "trivial_mse", "mse_low", "mse_high")
}
_LIVE = {"steps": "step", "tokens": "tokens", "seconds": "seconds"}  # in metrics.jsonl while there is no result


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        name: what to call it, printable and on one line.
        config: `config.yaml`.
        result: `result.json`, empty where the run has none yet.
        metrics: lines of `metrics.jsonl`, in order.
    """

    path: Path
    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def status(self) -> str:
        """How the run ended; `unfinished` where it has not said so."""
        return str(self.result.get("status") or "unfinished")

    @property
    def has_ended(self) -> bool:
        """Whether it ran to an end of its own, so that its figures are its last word."""
        return self.status in ENDED

    @property
    def ending(self) -> str:
        """What is to be said of how it ended, in words; empty where its steps or its target ended it."""
        return ENDED.get(self.status, printable(self.status))

    @property
    def pattern(self) -> str:
        """The layers as text, empty if unknown."""
        model = self.section("model")
        return str(model.get("pattern") or model.get("family") or "")

    @property
    def seed(self) -> Any:
        """The seed, None if unknown."""
        return self.result.get("seed", self.config.get("seed"))

    def section(self, key: str) -> dict[str, Any]:
        """A mapping of the result, else of the config, else empty: `task`, `model`, `machine`."""
        for source in (self.result, self.config):
            if isinstance(source.get(key), Mapping):
                return dict(source[key])
        return {}

    @property
    def is_bound(self) -> bool:
        """Whether its loss, and bits a byte with it, is only an upper bound."""
        return bool(self.result.get("loss_is_bound"))

    def scores(self) -> tuple[dict[str, Any], str]:
        """The figures to compare and the split they are of: test, else validation, else the last one while training."""
        for split in ("test", "validation"):
            figures = self.result.get(split)
            if isinstance(figures, dict) and _scored(figures):
                return figures, split
        for line in reversed(self.metrics):
            if line.get("split") == "validation" and _scored(line):
                return line, "validation"
        return {}, ""

    def figure(self, key: str) -> float | None:
        """A figure of the result by its key there; of an unfinished run, what its metrics tell. None if unknown."""
        if key in _OF_SCORES:
            return number(self.scores()[0].get(key))
        value = number(self.result.get(key))
        if value is None and key in _LIVE:
            known = [v for line in self.metrics if (v := number(line.get(_LIVE[key]))) is not None]
            value = max(known, default=None)
        if value is None and key == "tokens_per_second":
            rates = [v for line in self.metrics if (v := number(line.get(key))) is not None]
            value = median(rates) if rates else None
        return value

    def series(self, split: str, x: str, y: str) -> tuple[list[float], list[float]]:
        """Two figures of a split over training. A step that was run twice, as after a resume, counts once: the last."""
        points: dict[Any, tuple[float, float]] = {}
        for line in self.metrics:
            at, value = number(line.get(x)), number(line.get(y))
            if line.get("split") == split and at is not None and value is not None:
                points[line.get("step", at)] = (at, value)
        ordered = sorted(points.values())
        return [p[0] for p in ordered], [p[1] for p in ordered]


def _scored(figures: Mapping[str, Any]) -> bool:
    """Whether there is a score to compare: of right answers, or of errors."""
    return any(number(figures.get(key)) is not None for key in ("accuracy", "mse"))


def load_runs(
    paths: Sequence[str | Path], say: Say | None = None, *, aside: Callable[[Path], bool] = lambda folder: False
) -> list[Run]:
    """The runs at `paths`, each once.

    Args:
        paths: run folders, or folders of run folders (up to `DEPTH` levels down).
        say: called with a line for each run folder that is damaged or belongs to another program; it is skipped.
        aside: whether a folder, with all in it, is left aside.

    Raises:
        UsageError: nothing given, nothing there, not a run folder; without `say`, a damaged file.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        raise UsageError(f"No run was given: {EXPECTED}.")
    folders: dict[Path, Path] = {}
    for given in paths:
        for folder in _find(check_path(given), aside):
            folders.setdefault(folder.resolve(), folder)
    return [run for folder in folders.values() if (run := tolerant(_load, folder, say)) is not None]


def tolerant(read: Callable[[Path], T], path: Path, say: Say | None) -> T | None:
    """What `read` gives; where it raises a UsageError, `say` hears of it, if there is one, and None."""
    try:
        return read(path)
    except UsageError as error:
        if say is None:
            raise
        say(f"Left out: {error}")
        return None


def as_runs(runs: Sequence[Run | str | Path] | str | Path) -> list[Run]:
    """Runs as they are, and those that lie at paths.

    Raises:
        UsageError: what `load_runs` raises.
    """
    given = [runs] if isinstance(runs, str | Path) else list(runs)
    found: list[Run] = []
    for run in given:
        found += [run] if isinstance(run, Run) else load_runs([run])
    return found


def _find(given: Path, aside: Callable[[Path], bool]) -> list[Path]:
    """The run folders at or below `given`."""
    if given.is_file():
        hint = f" Did you mean {str(given.parent)!r}, the folder that holds it?" if is_run(given.parent) else ""
        raise UsageError(f"{str(given)!r} is a file: {EXPECTED}.{hint}")
    if not given.is_dir():
        siblings = [p.name for p in given.parent.iterdir() if p.is_dir()] if given.parent.is_dir() else []
        raise UsageError(f"There is nothing at {str(given)!r}: {EXPECTED}.{closest(given.name, siblings)}")
    found = list(_search(given, DEPTH, aside))
    if not found:
        raise UsageError(f"{str(given)!r} holds no run: {EXPECTED}; none is here or up to {DEPTH} levels below.")
    return found


def _search(folder: Path, depth: int, aside: Callable[[Path], bool]) -> Iterator[Path]:
    if aside(folder):
        return
    if is_run(folder):  # its checkpoints are its own affair
        yield folder
    elif depth:
        for child in subfolders(folder):
            yield from _search(child, depth - 1, aside)


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, but for hidden ones; none where it may not be read."""
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except PermissionError:
        return []


def _load(folder: Path) -> Run:
    config, result = read_config(folder), as_written_now(read_result(folder))
    name = result.get("name") or config.get("name") or folder.resolve().name
    return Run(folder, printable(name), config, result, read_metrics(folder))
