"""Which mixer for which need: the table at the head of `docs/results/README.md`, a line for each need.

    python -m zoo.benchmarks.studies.needs

writes the lines between the marks of that page, from the stores of the studies and from nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from zoo.benchmarks.studies import ablations, recall_state, state_horizon
from zoo.benchmarks.studies.harness import RESULTS
from zoo.benchmarks.studies.sweep_study import SweepStudy, code
from zoo.report.trials.groups import Group
from zoo.report.units import percent, size

BEGIN, END = "<!-- needs -->", "<!-- /needs -->"
NOT_YET = "not measured yet"
MOST_NAMED = 4


class Need(NamedTuple):
    """A line of the table.

    Attributes:
        need: what somebody needs.
        answer: of the folder of the results, what is known.
        study: whose page has the numbers, None for one that is planned.
    """

    need: str
    answer: Callable[[Path], str]
    study: SweepStudy | None


def recall(folder: Path) -> str:
    """The patterns that recalled, the smallest state first."""
    comparison = recall_state.compared(recall_state.STUDY.read(folder), 64)
    groups = [] if comparison is None else [g for g in comparison.groups if g.learning.n and not g.learning.failed]
    if not groups:
        return NOT_YET
    groups.sort(key=lambda group: group.middle("state_bytes") or 0)
    more = len(groups) - MOST_NAMED
    parts = [_recalled(group) for group in groups[:MOST_NAMED]]
    tried = sum(group.learning.n > 0 for group in comparison.groups) if comparison else 0
    head = f"of {tried} patterns measured, those of which every seed learned, smallest state first"
    return f"{head}: {'; '.join(parts)}{f'; and {more} more' if more > 0 else ''}"


def _recalled(group: Group) -> str:
    assert group.estimate is not None
    assert group.scores is not None
    interval = group.estimate.interval
    spread = "" if interval is None else f", {percent(max(interval.low, 0))} to {percent(min(interval.high, 1))}"
    state, n = size(group.middle("state_bytes") or 0), len(group.scores.seeds)
    return f"{code(group.label)} ({percent(group.estimate.mean)}{spread}, {n} seeds; {state})"


def tracking(task: str) -> Callable[[Path], str]:
    """The mixers of which every seed learned a task, and which follow the state farthest."""

    def answer(folder: Path) -> str:
        found = state_horizon.lines_of(state_horizon.STUDY.read(folder), task)
        if not found:
            return NOT_YET
        every = [line for line in found if line.learned == line.seeds and line.horizon]
        if not every:
            return f"of {len(found)} mixers measured, none of which every seed learned it"
        far = max(line.horizon for line in every)
        best = [line for line in every if line.horizon == far]
        named = "; ".join(f"{code(b.mixer)} ({fmean(b.scaled):.2f} scaled, {b.seeds} seeds)" for b in best[:MOST_NAMED])
        more = f"; and {len(best) - MOST_NAMED} more" if len(best) > MOST_NAMED else ""
        return f"of {len(found)} mixers measured, to {far} from 40: {named}{more}"

    return answer


def parts(folder: Path) -> str:
    """How many of the changes of a layer have a difference to its base."""
    read = ablations.STUDY.read(folder)
    found = [c for patterns in ablations.GROUPS.values() if (c := ablations.compared(read, patterns))]
    gaps = [gap for comparison in found for gap in comparison.gaps]
    if not gaps:
        return NOT_YET
    clear = [gap for gap in gaps if gap.p is not None and gap.p < 0.05]
    names = ", ".join(code(gap.group.label) for gap in clear) or "none"
    return f"of {len(gaps)} changes, those that changed recall (p < 0.05, corrected by group): {names}"


def later(folder: Path) -> str:
    """Of a study that has no store yet."""
    return NOT_YET


NEEDS = (
    Need("recall of 4, 8 or 16 pairs, in little memory", recall, recall_state.STUDY),
    Need("parity, beyond the lengths of training", tracking("parity"), state_horizon.STUDY),
    Need("products in S3, beyond the lengths of training", tracking("s3"), state_horizon.STUDY),
    Need("sums and products modulo 3, beyond the lengths of training", tracking("modular"), state_horizon.STUDY),
    Need("products in S5, beyond the lengths of training", tracking("s5"), state_horizon.STUDY),
    Need("which part of a layer matters for recall", parts, ablations.STUDY),
    Need("a needle in 32,000 tokens", later, None),
    Need("speed at long lengths", later, None),
    Need("puzzles", later, None),
    Need("recall and state tracking at once (hybrids)", later, None),
    Need("irregular time steps", later, None),
)


def block(folder: Path) -> str:
    """The lines between the marks."""
    rows = []
    for need in NEEDS:
        link = f"[{need.study.name}.md]({need.study.name}.md)" if need.study else ""
        rows.append([need.need, need.answer(folder), link])
    cells = [["need", "what was measured", "page"], ["---"] * 3, *rows]
    return "\n".join([BEGIN, "", *(f"| {' | '.join(row)} |" for row in cells), "", END])


def rewritten(text: str, folder: Path) -> str:
    """The page with its lines made again."""
    before, _, rest = text.partition(BEGIN)
    return before + block(folder) + rest.partition(END)[2]


def main() -> None:
    """Run the command line of this process."""
    parser = argparse.ArgumentParser(prog="python -m zoo.benchmarks.studies.needs", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results, by default {RESULTS}")
    page = parser.parse_args().out / "README.md"
    page.write_text(rewritten(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
