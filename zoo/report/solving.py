"""A puzzle while it is solved: in a terminal, as a filmstrip, as an animation, and as parts of a page.

All draw the same scene: squares, strokes and words. Cells that are new, wrong or still to be found are distinguished by
marks as well as by colours, and the colours by their lightness too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import escape

from zoo.core.files import save_figure, write_output
from zoo.report.labels import labels
from zoo.report.runs import load_runs
from zoo.report.style import FAINT, INK, house_style
from zoo.tasks.sketch import Cell, Kind, Sketch
from zoo.training.checkpoint import is_checkpoint
from zoo.training.solving import RECORDED, Solving, Step, read, solve_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text as Styled

ANIMATED = ("gif", "webp")
MOST_MOMENTS = 60
"""Steps of an animation in a file."""
_EACH, _HOLD = 0.9, 2  # seconds of a moment on a page, and how much longer the last one stays, in moments

_WRONG, _STRIKE, _NEW, _THIN, _THICK = "#b3400a", "#f0a57c", "#e69f00", "#c3c8d1", "#1c2330"
_FILLS: dict[Kind, str] = {"given": "#e4e7ed", "right": "#ffffff", "wrong": "#fbe0d0", "hidden": "#f6f7f9"}
_WORDS: dict[Kind, str] = {"given": INK, "right": "#0063a0", "wrong": _WRONG}
_STYLES: dict[Kind, str] = {"given": "bold", "right": "blue", "wrong": "bold red", "hidden": "dim"}

_FRAME, _ALONE, _GAP, _TITLE = 130.0, 220.0, 18.0, 34.0  # pixels: of a frame among others, of one that has the room
_WIDTH, _LEAST_WIDTH = 760.0, 340.0  # of a scene
_LEAST_WITH_TEXT, _LEAST = 13.0, 4.0  # of a cell's side


class Named(NamedTuple):
    """A run's puzzle under the run's name."""

    name: str
    solving: Solving


def solve_runs(path: Path, overrides: Mapping[str, Any] | None = None, **which: Any) -> list[Named]:
    """An example solved by the model of each run at or below a folder, or by a checkpoint; every path of each.

    Args:
        path: a run folder, a folder of run folders, or a checkpoint of a run.
        overrides: of the task, or of how the objective answers, such as `{"objective.eval_steps": 32}`.
        **which: see `solve_run`.

    Raises:
        UsageError: no such run, or what `solve_run` refuses.
    """
    if is_checkpoint(path):
        named = {path.name: path}
    else:
        runs = load_runs([path])
        named = {label: run.path for label, run in zip(labels(runs), runs, strict=True)}
    return by_paths(Named(label, solve_run(folder, overrides, **which)) for label, folder in named.items())


def by_paths(named: Iterable[Named]) -> list[Named]:
    """Solutions with several paths as one for each path, the one that is taken first."""
    found = []
    for name, solving in named:
        for each in (solving._replace(others=()), *solving.others):
            found.append(Named(", ".join(part for part in (name, each.path) if part), each))
    return found


# ---- the scene


Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, width and height; of a line, from (x, y) to (x, y)."""


class Boxes(NamedTuple):
    """Filled boxes of one colour."""

    colour: str
    boxes: list[Box]


class Strokes(NamedTuple):
    """Lines of one look."""

    colour: str
    width: float
    lines: list[Box]


class Words(NamedTuple):
    """A text, whose left end or middle is at x and whose middle is at y."""

    x: float
    y: float
    text: str
    size: float
    colour: str = INK
    bold: bool = False
    centred: bool = False


class Scene(NamedTuple):
    """What is drawn, in the order of drawing, within width times height pixels."""

    width: float
    height: float
    marks: list[Boxes | Strokes | Words]


def new_cells(sketch: Sketch, before: Sketch | None) -> set[int]:
    """The answered cells that the sketch before did not show so; none where that is all of them."""
    answered = {i for i, cell in enumerate(sketch.cells) if cell.kind in ("right", "wrong")}
    same = before is not None and (before.width, len(before.cells)) == (sketch.width, len(sketch.cells))
    new = {i for i in answered if not same or before.cells[i] != sketch.cells[i]} if before is not None else set()
    return set() if new == answered and not sketch.count("hidden") else new


def _side(steps: Iterable[Step], room: float) -> float:
    """Of the cells of these steps, so that the largest fits into the room and text stays readable."""
    sketches = [step.sketch for step in steps]
    longest = max(max(sketch.width, sketch.height) for sketch in sketches)
    has_text = any(cell.text for sketch in sketches for cell in sketch.cells if cell.colour is None)
    return min(max(room / longest, _LEAST_WITH_TEXT if has_text else _LEAST), room / 4)


def _wide(step: Step, side: float) -> float:
    """Pixels that a step takes, its cells or its note."""
    return max(side * step.sketch.width, 6 * len(step.note))


def _grid(sketch: Sketch, new: set[int], x: float, y: float, side: float) -> Iterator[Boxes | Strokes | Words]:
    """A sketch with its left upper corner at (x, y)."""
    corners = [(x + side * (i % sketch.width), y + side * (i // sketch.width)) for i in range(len(sketch.cells))]
    places = list(zip(sketch.cells, corners, strict=True))
    fills: dict[str, list[Point]] = {}
    for cell, corner in places:
        if cell.kind != "outside":
            fills.setdefault(cell.colour or _FILLS[cell.kind], []).append(corner)
    yield from (Boxes(colour, _runs(squares, side)) for colour, squares in fills.items())
    dot = side / 7
    dots = [(a + (side - dot) / 2, b + (side - dot) / 2, dot, dot) for cell, (a, b) in places if cell.kind == "hidden"]
    yield Boxes("#8b93a3", dots)
    inside = [corner for cell, corner in places if cell.kind != "outside"]
    yield Strokes(_THIN, min(0.8, side / 14), _lattice(inside, side))
    if sketch.box is not None:
        yield Strokes(_THICK, 1.6, _thick_lines(sketch, sketch.box, x, y, side))
    width = max(1.2, side / 10)
    inset = [(a + width / 2, b + width / 2) for a, b in (corners[i] for i in sorted(new))]
    yield Strokes(_NEW, width, _outlines(inset, side - width))
    written, coloured = (
        [corner for cell, corner in places if cell.kind == "wrong" and bool(cell.colour) == has_colour]
        for has_colour in (False, True)
    )
    yield Strokes("#ffffff", max(2.4, side / 4), _crosses(coloured, side, 0.22))
    yield Strokes(_WRONG, max(1.2, side / 9), _crosses(coloured, side, 0.22))
    low, high = 0.1 * side, 0.9 * side
    struck = [(a + low, b + high, a + high, b + low) for a, b in written]
    yield Strokes(_STRIKE, max(1.0, side / 12), struck)  # below the text, which stays readable
    for cell, (a, b) in sorted(places, key=lambda place: place[0].kind):  # one look after another
        if cell.text and cell.kind != "outside":
            size = side * min(0.62, 1.3 / len(cell.text))
            colour = INK if cell.colour else _WORDS[cell.kind]
            bold = cell.kind != "right"
            yield Words(a + side / 2, b + side / 2, cell.text, size, colour, bold, centred=True)


def _outlines(corners: Iterable[Point], side: float) -> list[Box]:
    """The four sides of squares."""
    ends = [(x, y, x + side, y + side) for x, y in corners]
    return [line for x, y, a, b in ends for line in ((x, y, a, y), (a, y, a, b), (a, b, x, b), (x, b, x, y))]


def _runs(corners: Sequence[Point], side: float) -> list[Box]:
    """Boxes as boxes, neighbours in a row together."""
    boxes: list[Box] = []
    for x, y in sorted(corners, key=lambda corner: (corner[1], corner[0])):
        if boxes and boxes[-1][1] == y and abs(boxes[-1][0] + boxes[-1][2] - x) < side / 2:
            boxes[-1] = (boxes[-1][0], y, boxes[-1][2] + side, side)
        else:
            boxes.append((x, y, side, side))
    return boxes


def _lattice(corners: Sequence[Point], side: float) -> list[Box]:
    """The lines around and between squares, as long as they go on."""
    rows = _runs(corners, side)
    columns = _runs([(y, x) for x, y in corners], side)
    across = {(x, at, x + w, at) for x, y, w, h in rows for at in (y, y + h)}
    return sorted(across) + sorted({(at, x, at, x + w) for x, y, w, h in columns for at in (y, y + h)})


def _thick_lines(sketch: Sketch, box: tuple[int, int], x: float, y: float, side: float) -> list[Box]:
    right, bottom = x + side * sketch.width, y + side * sketch.height
    across = [y + side * i for i in range(0, sketch.height + 1, box[0])]
    down = [x + side * i for i in range(0, sketch.width + 1, box[1])]
    return [(x, at, right, at) for at in across] + [(at, y, at, bottom) for at in down]


def _crosses(corners: Iterable[Point], side: float, margin: float) -> list[Box]:
    low, high = margin * side, (1 - margin) * side
    return [
        line
        for x, y in corners
        for line in ((x + low, y + low, x + high, y + high), (x + low, y + high, x + high, y + low))
    ]


def _frame(step: Step, before: Sketch | None, x: float, y: float, side: float) -> Iterator[Boxes | Strokes | Words]:
    yield Words(x, y + 7, step.title, 12, bold=True)
    yield Words(x, y + 22, step.note, 10.5, FAINT)
    yield from _grid(step.sketch, new_cells(step.sketch, before), x, y + _TITLE, side)


_LEGEND = (
    (Cell("given", "3", ""), False, "given"),
    (Cell("right", "3", ""), False, "found"),
    (Cell("right", "3", ""), True, "new"),
    (Cell("wrong", "3", ""), False, "wrong"),
    (Cell("hidden", "", ""), False, "to find"),
)


def _legend(solvings: Iterable[Solving], x: float, y: float) -> Iterator[Boxes | Strokes | Words]:
    """What the marks mean, those that occur."""
    steps = [(s.steps[i].sketch, s.steps[i - 1].sketch) for s in solvings for i in range(1, len(s.steps))]
    cells = [cell for sketch, _ in steps for cell in sketch.cells]
    kinds = {cell.kind for cell in cells}
    coloured = any(cell.colour for cell in cells)
    some_new = any(new_cells(*pair) for pair in steps)
    for cell, new, word in _LEGEND:
        if cell.kind not in kinds or (new and not some_new) or (coloured and word in ("given", "found")):
            continue
        if coloured:
            cell = cell._replace(text="", colour=None if cell.kind == "hidden" else "#ffffff")
        yield from _grid(Sketch(1, (cell,)), {0} if new else set(), x, y, 16)
        yield Words(x + 22, y + 8, word, 10.5, FAINT)
        x += 34 + 6 * len(word)


def filmstrip(named: Sequence[Named]) -> Scene:
    """Frames in rows, run under run."""
    marks: list[Boxes | Strokes | Words] = []
    y, right = 6.0, 0.0
    for name, solving in named:
        if name:
            marks.append(Words(6, y + 8, f"{name}: {solving.example}", 14, bold=True))
            y += 26
        side = _side(solving.steps, _FRAME)
        wide = max(_FRAME - _GAP, *(_wide(step, side) for step in solving.steps)) + _GAP
        high = max(side * step.sketch.height for step in solving.steps) + _TITLE + _GAP
        n = len(solving.steps)
        columns = min(n, max(1, int(_WIDTH // wide)))
        columns = math.ceil(n / math.ceil(n / columns))  # rows of about the same length
        for i, step in enumerate(solving.steps):
            before = solving.steps[i - 1].sketch if i else None
            marks += _frame(step, before, 6 + wide * (i % columns), y + high * (i // columns), side)
        y += high * math.ceil(n / columns) + 6
        right = max(right, 6 + wide * columns)
    marks += _legend([solving for _, solving in named], 6, y)
    return Scene(max(right, _LEAST_WIDTH), y + 24, marks)


def moments(named: Sequence[Named]) -> list[Scene]:
    """The scenes of an animation: all runs side by side, each at the same step or at its end."""
    sides = [_side(solving.steps, _ALONE if len(named) == 1 else _FRAME) for _, solving in named]
    places = []
    x, y, high, right = 6.0, 6.0, 0.0, 0.0
    title = Words(6, 14, ", ".join(dict.fromkeys(solving.example for _, solving in named)), 12, FAINT)
    if any(name for name, _ in named):
        y += 24
    for (name, solving), side in zip(named, sides, strict=True):
        wide = max(_FRAME, 9 * len(name), *(_wide(step, side) for step in solving.steps)) + _GAP
        if x > 6 and x + wide > _WIDTH:
            x, y, high = 6.0, y + high, 0.0
        places.append((x, y))
        tall = max(side * step.sketch.height for step in solving.steps)
        x, high = x + wide, max(high, tall + _TITLE + _GAP + (24 if name else 0))
        right = max(right, x)
    scenes = []
    for moment in range(max(len(solving.steps) for _, solving in named)):
        marks: list[Boxes | Strokes | Words] = [title] if places[0][1] > 6 else []
        for (name, solving), side, (x, y) in zip(named, sides, places, strict=True):
            i = min(moment, len(solving.steps) - 1)
            before = solving.steps[i - 1].sketch if i and i == moment else solving.steps[i].sketch
            if name:
                marks.append(Words(x, y + 8, name, 13, bold=True))
            marks += _frame(solving.steps[i], before, x, y + (24 if name else 0), side)
        marks += _legend([solving for _, solving in named], 6, places[-1][1] + high)
        scenes.append(Scene(max(right, _LEAST_WIDTH), places[-1][1] + high + 24, marks))
    return scenes


# ---- files


def to_figure(scene: Scene) -> Figure:
    """A scene as a matplotlib figure, 96 pixels an inch."""
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(scene.width / 96, scene.height / 96))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.set_axis_off()
    for z, mark in enumerate(scene.marks):
        match mark:
            case Boxes(colour, boxes):
                corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
                axes.add_collection(PolyCollection(corners, facecolors=colour, linewidths=0, zorder=z))
            case Strokes(colour, width, lines):
                ends = [[(a, b), (c, d)] for a, b, c, d in lines]
                axes.add_collection(LineCollection(ends, colors=colour, linewidths=0.75 * width, zorder=z))
            case Words(x, y, text, size, colour, bold, centred):
                place, weight = "center" if centred else "left", "bold" if bold else "normal"
                look: dict[str, Any] = {"color": colour, "weight": weight, "fontsize": 0.75 * size, "zorder": z}
                height = "center_baseline" if centred else "center"
                axes.text(x, y, text, ha=place, va=height, parse_math=False, **look)
    return figure


def save(named: Sequence[Named], path: Path) -> None:
    """Write a filmstrip, or an animation into a .gif or .webp.

    Raises:
        UsageError: a format that cannot be written, or no place for the file.
        RunError: the file system refuses.
    """
    kind = path.suffix.lower().removeprefix(".")
    with house_style():
        if kind in ANIMATED:
            chosen = [Named(name, solving.shortened(MOST_MOMENTS)) for name, solving in named]
            write_output(path, _animated(moments(chosen), kind))
        else:
            chosen = [Named(name, solving.shortened(RECORDED)) for name, solving in named]
            save_figure(to_figure(filmstrip(chosen)), path)


def _animated(scenes: Sequence[Scene], kind: str) -> bytes:
    from PIL import Image

    pictures = []
    for scene in scenes:
        out = io.BytesIO()
        to_figure(scene).savefig(out, format="png", dpi=144)
        picture = Image.open(out).convert("RGB")
        pictures.append(picture.quantize(64, dither=Image.Dither.NONE) if kind == "gif" else picture)
    each = max(250, min(900, 12_000 // len(pictures)))
    times = [each] * (len(pictures) - 1) + [2500]
    out = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    pictures[0].save(out, format=kind, save_all=True, append_images=pictures[1:], duration=times, loop=0, **options)
    return out.getvalue()


# ---- parts of a page


def filmstrip_svg(run_folder: str | Path) -> str:
    """The steps of a run's recorded example as one SVG element; empty where the run has recorded none.

    Raises:
        UsageError: the record is damaged.
    """
    solving = read(Path(run_folder))
    if solving is None:
        return ""
    return _element(filmstrip(by_paths([Named("", solving)])), _described(solving), least=0.75)


def animation_html(run_folder: str | Path, name: str = "solving") -> str:
    """The same as an animation without any script, with buttons that stop it and show each step.

    It stands still at its end for readers whose system is set to less motion, and on paper.

    Args:
        run_folder: of the run.
        name: prefix of all ids and classes inside, another one for each animation on a page.

    Raises:
        UsageError: the record is damaged.
    """
    solving = read(Path(run_folder))
    if solving is None:
        return ""
    scenes = moments(by_paths([Named("", solving)]))
    buttons = [_button(name, "play", "play", "Play", checked=True), _button(name, "pause", "pause", "Pause")]
    longest = max((solving, *solving.others), key=lambda path: len(path.steps))
    for i, step in enumerate(longest.steps):  # "pass 7" is 7 on its button
        buttons.append(_button(name, f"still s{i}", step.title.split()[-1], step.title))
    groups = "".join(f'<g class="moment m{i}">{_shapes(scene)}</g>' for i, scene in enumerate(scenes))
    picture = _element(scenes[0], _described(solving), groups)
    return f'<div class="{name}"><style>{_rules(name, len(scenes))}</style>{"".join(buttons)}{picture}</div>'


def _rules(name: str, n: int) -> str:
    """The style of an animation of n moments."""
    total = _EACH * (n + _HOLD)
    ends = ("one", 100 / (n + _HOLD)), ("last", 100 * (1 + _HOLD) / (n + _HOLD))
    at_rest = f".{name} .moment {{ animation: none }} .{name} .m{n - 1} {{ opacity: 1 }}"
    return "\n".join(
        [
            "",
            *(f"@keyframes {name}-{k} {{ 0% {{ opacity: 1 }} {e:.3f}%, 100% {{ opacity: 0 }} }}" for k, e in ends),
            f".{name} .moment {{ opacity: 0; animation: {name}-one {total:.1f}s step-end infinite }}",
            f".{name} .m{n - 1} {{ animation-name: {name}-last }}",
            *(f".{name} .m{i} {{ animation-delay: {_EACH * i - total:.1f}s }}" for i in range(n)),
            f"@media print, (prefers-reduced-motion: reduce) {{ {at_rest} }}",
            f".{name} .pause:checked ~ svg .moment {{ animation-play-state: paused }}",
            f".{name} .still:checked ~ svg .moment {{ animation: none; opacity: 0 }}",
            *(f".{name} .s{i}:checked ~ svg .m{i}.moment {{ opacity: 1 }}" for i in range(n)),
            f".{name} input {{ position: absolute; opacity: 0 }}",
            f".{name} label {{ display: inline-block; min-width: 2em; padding: 2px 8px; margin: 0 4px 8px 0;"
            " border: 1px solid #c3cad6; border-radius: 8px; text-align: center; font-size: 14px; cursor: pointer }",
            f".{name} input:checked + label {{ background: #0063a0; color: white }}",
            f".{name} input:focus-visible + label {{ outline: 3px solid #56b4e9; outline-offset: 2px }}",
            f".{name} svg {{ display: block }}",
            "",
        ]
    )


def _button(name: str, kind: str, text: str, meaning: str, *, checked: bool = False) -> str:
    chosen = " checked" if checked else ""
    mark = f"{name}-{kind.split()[-1]}"
    return (
        f'<input type="radio" class="{kind}" name="{name}" id="{mark}" aria-label="{escape(meaning)}"{chosen}>'
        f'<label for="{mark}">{escape(text)}</label>'
    )


def _described(solving: Solving) -> str:
    """A picture in words."""
    last = solving.steps[-1]
    return f"{solving.example}, solved step by step; {last.title}: {last.note}"


def _element(scene: Scene, description: str, content: str | None = None, *, least: float = 0) -> str:
    """A scene, or what is drawn in its place, as an SVG element as wide as there is room, within bounds.

    Args:
        scene: of that size.
        description: read aloud instead of the picture.
        content: drawn instead of the scene's marks.
        least: share of the scene's width below which the element does not shrink, for a place that scrolls.
    """
    width, height = scene.width, scene.height
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}"'
        f' style="width: 100%; min-width: {least * width:g}px; max-width: {1.25 * width:g}px; height: auto"'
        f' font-family="system-ui, sans-serif">'
        f"{_shapes(scene) if content is None else content}</svg>"
    )


def _shapes(scene: Scene) -> str:
    parts = []
    for look, marks in groupby(scene.marks, key=_look):
        shapes = "".join(map(_shape, marks))
        parts.append(f"<g {look}>{shapes}</g>" if look else shapes)
    return "".join(parts)


def _look(mark: Boxes | Strokes | Words) -> str:
    """What a text has in common with others. Those outside the cells have the page's colour, dark or light."""
    if not isinstance(mark, Words):
        return ""
    colour = mark.colour if mark.centred else "currentColor"
    style = ' font-weight="bold"' if mark.bold else ""
    style += ' text-anchor="middle"' if mark.centred else ' fill-opacity="0.7"' if mark.colour == FAINT else ""
    return f'font-size="{_n(mark.size)}" fill="{colour}"{style}'


def _shape(mark: Boxes | Strokes | Words) -> str:
    match mark:
        case Boxes(colour, boxes) if boxes:
            path = "".join(f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h{_n(-w)}z" for x, y, w, h in boxes)
            return f'<path fill="{escape(colour)}" d="{path}"/>'
        case Strokes(colour, width, lines) if lines:
            path = "".join(f"M{_n(a)} {_n(b)}L{_n(c)} {_n(d)}" for a, b, c, d in lines)
            return f'<path stroke="{colour}" stroke-width="{_n(width)}" d="{path}"/>'
        case Words(x, y, text, size):
            return f'<text x="{_n(x)}" y="{_n(y + 0.35 * size)}">{escape(text)}</text>'
    return ""


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


# ---- a terminal


def in_terminal(named: Named, width: int) -> Iterator[Styled]:
    """Lines with the steps beside each other, as many as fit the width; the last tells what the marks mean."""
    from rich.text import Text

    name, solving = named
    shown = solving.shortened(RECORDED)
    yield Text(f"{name}: {solving.example}", style="bold underline")
    yield from (Text(line) for line in solving.question.splitlines())
    columns = [_column(step, shown.steps[i - 1].sketch if i else None) for i, step in enumerate(shown.steps)]
    wide = max(line.cell_len for column in columns for line in column) + 3
    fit = max(1, (width + 3) // wide)
    for first in range(0, len(columns), fit):
        for line in zip_longest(*columns[first : first + fit], fillvalue=Text()):
            padded = [part + Text(" " * (wide - part.cell_len)) for part in line]
            whole = Text().join(padded)
            whole.rstrip()
            yield whole
        yield Text()
    yield Text("+ new   ! wrong", style="dim")


def _column(step: Step, before: Sketch | None) -> list[Styled]:
    from rich.text import Text

    sketch, new = step.sketch, new_cells(step.sketch, before)
    lines = [Text(step.title, style="bold"), Text(step.note, style="dim")]
    boxes = sketch.box
    for y in range(sketch.height):
        line = Text()
        for x in range(sketch.width):
            at = y * sketch.width + x
            if at == len(sketch.cells):
                break
            if boxes and x and x % boxes[1] == 0:
                line.append("| ")
            cell = sketch.cells[at]
            mark = "!" if cell.kind == "wrong" else "+" if at in new else cell.ink[-1]
            line.append(cell.ink[:-1] + mark, style=_STYLES.get(cell.kind, ""))
        if boxes and y and y % boxes[0] == 0:
            lines.append(Text("-" * line.cell_len))
        lines.append(line)
    return lines
