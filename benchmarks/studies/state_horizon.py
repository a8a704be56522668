"""State tracking and the length at which it ends: the sweep `state-horizon`.

    python -m zoo.benchmarks.studies.state_horizon

makes the page from the store `state-horizon`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from zoo.benchmarks.studies.harness import table
from zoo.benchmarks.studies.sweep_study import Read, Stored, SweepStudy, by_position, by_slice, code
from zoo.benchmarks.studies.sweep_study import Row as Trial
from zoo.report.charts import Axis, Chart, Panel, Row, Series
from zoo.report.static import svg
from zoo.report.trials.figures import figure
from zoo.statistics import t_interval

STORE, KEY = "state-horizon", "words.mixer"
TASKS = {"parity": "Parity", "s3": "Products in S3", "modular": "Sums and products modulo 3", "s5": "Products in S5"}
CHANCE = {"parity": 1 / 2, "s3": 1 / 6, "modular": 1 / 3, "s5": 1 / 120}
LEARNED = 0.9
"""Accuracy at the lengths of training from which on a seed has learned, and at a longer one follows the state."""
NONLINEAR = ("lstm", "gru", "slstm", "m2rnn")

ABOUT = """
Trained on 40 elements, tested on 512 (expressions modulo 3: trained on up to 40 tokens, tested on 40 to 512).
One mixer of width 64, then a perceptron. The learning rate is the better of two on validation (128 elements),
at a seed of its own. Training ends at 0.999 of scaled accuracy on validation, or after 1,500 steps of 64
rows.
"""
COLUMNS = """
Columns of lengths have the accuracy at positions from half of that length up to it (modulo 3: of expressions
of up to that length), the mean over all seeds, those that did not learn too. A seed has learned if this
accuracy is {learned} or more at the first length that reaches 32. The horizon is the largest length up to
which every column is {learned} or more; nothing is said of lengths beyond 512. `scaled` is (accuracy -
chance) / (1 - chance) of all test answers: its mean and Student's t interval.
"""
FACTORS = """
The factors: a state that is a nonlinear function of the one before (`lstm`, `slstm`, `m2rnn`), or an affine
one; of affine ones, eigenvalues from 0 to 1 or from -1 to 1 (`allow_neg_eigval`, by default on in
`deltaproduct`). Affine states are proven to track for a finite length only (arXiv 2605.07755).
"""


class Line(NamedTuple):
    """What is known of a mixer on a task.

    Attributes:
        mixer: its text.
        rate: the learning rate that was chosen.
        seeds: how many have ended.
        learned: how many of them learned the lengths of training.
        curve: accuracy by length, the mean over seeds.
        scaled: of each seed, (accuracy - chance) / (1 - chance) of all test answers.
        horizon: the largest length up to which the mean accuracy is at least `LEARNED`; 0 if there is none.
    """

    mixer: str
    rate: float
    seeds: int
    learned: int
    curve: dict[int, float]
    scaled: list[float]
    horizon: int


def lines_of(read: Read, task: str) -> list[Line]:
    """The mixers of a task that have results, the farthest horizon first."""
    stored = read[STORE]
    found = []
    for point in stored.planned():
        rows = stored.results(point) if point["variant"] == task else []
        if rows:
            found.append(_line(stored, task, point[KEY], rows))
    return sorted(found, key=lambda line: (-bool(line.learned), -line.horizon, -fmean(line.scaled)))


def _line(stored: Stored, task: str, mixer: str, rows: Sequence[Trial]) -> Line:
    assert stored.trials is not None
    each = by_slice(stored.trials, rows, "length") if task == "modular" else by_position(rows)
    lengths = [n for n in each[0] if n > 8]
    first = next(n for n in lengths if n >= 32)  # a stretch of the lengths of training
    curve = {n: fmean(one[n] for one in each) for n in lengths}
    learned = sum(one[first] >= LEARNED for one in each)
    horizon = 0
    for n in lengths:
        if curve[n] < LEARNED:
            break
        horizon = n
    scaled = [figure(row, "test", "scaled") or 0.0 for row in rows]
    return Line(mixer, rows[0]["set.train.lr"], len(rows), learned, curve, scaled, horizon)


def sections(read: Read) -> dict[str, list[str]]:
    return {title: _section(lines_of(read, task), task, title) for task, title in TASKS.items()}


def _section(found: list[Line], task: str, title: str) -> list[str]:
    if not found:
        return []
    picture = [f"![Accuracy by length: {title}](state_horizon-{task}.svg)", ""]
    lengths = list(found[0].curve)
    scaled = f"scaled (chance {CHANCE[task]:.2g} is 0)"
    head = ["mixer", "state", "learned", "rate", *map(str, lengths), "horizon", scaled]
    rows = [_cells(line, lengths) for line in found]
    return [*(picture if any(line.learned for line in found) else []), *table(head, rows)]


def _cells(line: Line, lengths: Sequence[int]) -> list[str]:
    kind = "nonlinear" if line.mixer.startswith(NONLINEAR) else "affine"
    kind = "all tokens" if line.mixer.startswith("mha") else kind
    start = [code(line.mixer), kind, f"{line.learned} of {line.seeds}", f"{line.rate:g}"]
    if not line.learned:
        return [*start, "not learned", *[""] * (len(lengths) + 1)]
    interval = t_interval(line.scaled)
    spread = f" ({max(interval.low, -1):.2f} to {min(interval.high, 1):.2f})" if interval else ""
    figures = [f"{line.curve[n]:.2f}" for n in lengths]
    return [*start, *figures, str(line.horizon or "none"), f"{fmean(line.scaled):.2f}{spread}"]


def pictures(read: Read) -> dict[str, str]:
    found = {}
    for task in TASKS:
        learned = [line for line in lines_of(read, task) if line.learned]
        if not learned:
            continue
        rows = [Row(f"g-{i}", line.mixer, i) for i, line in enumerate(learned)]
        series = [
            Series(row.id, [float(n) for n in line.curve], list(line.curve.values()))
            for row, line in zip(rows, learned, strict=True)
        ]
        panel = Panel("lines", Axis("length", "length", log=True), Axis("accuracy", "percent"), series, trained=40)
        found[f"state_horizon-{task}"] = svg(Chart(f"state_horizon-{task}", "", "", [panel]), rows)
    return found


STUDY = SweepStudy(
    "state_horizon",
    __doc__,
    (Stored(STORE, "zoo sweep state-horizon"),),
    "State tracking: the length at which it ends",
    (ABOUT, COLUMNS.format(learned=LEARNED), FACTORS),
    sections,
    pictures,
)

if __name__ == "__main__":
    STUDY.main()
