"""Tables of records, and the lines below them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from zoo.benchmarks.cells import CLOCK, NO_AVERAGE, NOT_LEARNED, OVER
from zoo.benchmarks.subjects import HEADS
from zoo.core.errors import UsageError
from zoo.pattern import Word, parse, to_text
from zoo.report.benchmark import Table
from zoo.report.records import MIXER, OK, Record
from zoo.report.units import MISSING

ENDED = {CLOCK: "its budget of seconds", NOT_LEARNED: "its steps"}
MARKS = {"formula": "†", "random cache": "*"}
ABOVE = (
    "‡ above 100 %: counted are the products of the reference form, three times over for training, and compared with "
    "the rate of one large product, measured by itself. A layer that does fewer products than that, or does "
    "them in better shapes or at a quieter moment, comes out above."
)


def pivot(
    title: str,
    found: Iterable[Record],
    column: Callable[[Record], Any],
    text: Callable[[Record], str],
    label: Callable[[Any], str] = str,
) -> Table:
    """A row for each subject and a column for each value of `column`, in order of appearance."""
    cells: dict[str, dict[Any, str]] = {}
    columns: dict[Any, None] = {}
    for r in found:
        columns[column(r)] = None
        cells.setdefault(r.label, {})[column(r)] = shown(r, text)
    head = ["", *map(label, columns)]
    return Table(title, head, [[name, *(row.get(c, MISSING) for c in columns)] for name, row in cells.items()])


def shown(r: Record, text: Callable[[Record], str]) -> str:
    """A cell: its text with the mark of its source, or why there is none."""
    if r.status != OK:
        return r.status
    marks = {MARKS.get(f.get("how", ""), "") for f in r.figures.values()}
    return text(r) + "".join(sorted(marks))


def spread(r: Record, key: str, text: Callable[[float], str]) -> str:
    """A figure as text, of several values with its quartiles."""
    figure = r.figures[key]
    if figure.get("n", 1) == 1:
        return text(figure["value"])
    return f"{text(figure['value'])} ({text(figure['low'])} to {text(figure['high'])})"


def chance_in(found: Iterable[Record]) -> str:
    """What chance gives, for the head of a column of accuracies; empty where it is unknown or not one figure."""
    known = {r.chance for r in found if r.chance is not None}
    return f"chance {known.pop():.0%}" if len(known) == 1 else ""


def notes(found: Sequence[Record]) -> list[str]:
    """Lines below the tables: what the marks mean, which words had their heads settled, why cells are empty."""
    hows = {f.get("how", "") for r in found for f in r.figures.values()}
    lines = {
        "formula": "† said by the layer, not measured.",
        "random cache": "* measured on a cache of keys and values filled with random numbers, not by a prefill.",
    }
    told = [line for how, line in lines.items() if how in hows]
    if any((r.value("matmul_share") or 0) > 1 for r in found):
        told.append(ABOVE)
    untaught = [status for status in (CLOCK, NOT_LEARNED) if any(r.status == status for r in found)]
    if untaught:
        ends = " or ".join(ENDED[status] for status in untaught)
        told.append(f"{' and '.join(untaught)}: below 85 % when {ends} ended; the records say how far each had come.")
    empty: dict[str, None] = {}
    for r in found:
        if r.status not in (OK, OVER, CLOCK, NOT_LEARNED, NO_AVERAGE):
            empty[f"{r.label}: {r.status}: {r.why.rstrip('.')}."] = None
    return told + settled(found) + list(empty)


def settled(found: Iterable[Record]) -> list[str]:
    """Lines that say which layers have several names, and which options were filled in."""
    several = dict.fromkeys(f"{r.label} (width {r.setting['width']})" for r in found if r.same)
    lines = [f"One layer under several names, measured once: {', '.join(several)}."] if several else []
    built: dict[int, dict[str, Word]] = {}
    for r in found:
        built.setdefault(r.setting["width"], {}).update(_filled_in(r))
    for width, words in built.items():
        if words:
            told = f"At width {width}, where no number of heads is given: {', '.join(words)}."
            few = any(getattr(word.config, "n_heads", HEADS) < HEADS for word in words.values())
            lines.append(told + (f" zoo bench now gives attention {HEADS} at least." if few else ""))
    return lines


def _filled_in(r: Record) -> dict[str, Word]:
    """The words of a record's layer in which something was filled in, by their texts."""
    asked = str(r.setting.get("layers") or MIXER).replace(MIXER, r.name)
    try:
        pairs = zip(parse(asked).words(), parse(r.layer).words(), strict=True)
        return {to_text(word): word for before, word in pairs if before != word}
    except (UsageError, ValueError):  # a peer, or a mixer that is not registered here
        return {}


def short(n: int) -> str:
    """1024 as 1K, 2**20 as 1M."""
    for unit, size in (("M", 2**20), ("K", 1024)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"


def distinct(found: Iterable[Record], key: str) -> list[Any]:
    """The values of a setting, in order of appearance."""
    return list(dict.fromkeys(r.setting[key] for r in found if key in r.setting))
