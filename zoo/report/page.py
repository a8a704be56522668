"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml

from tasks.registry import UsageError
from zoo.report import leaderboard, words
from zoo.report.files import write_atomically
from zoo.report.plots import PLOTS
from zoo.report.runs import Run, labels
from zoo.report.style import Look, house_style, to_svg


class Picture(NamedTuple):
    """A plot, ready for the page."""

    name: str
    title: str
    caption: str
    svg: str


class Fact(NamedTuple):
    """A setting of machine or software: one value, or where the runs differ one for each."""

    name: str
    value: str
    by_run: list[tuple[str, str]]


class Example(NamedTuple):
    """An example of the task: as text, and as a picture where the task has one of its own."""

    text: str
    svg: str


def write_report(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the page, overwriting an older one, and return where it lies.

    Raises:
        UsageError: no run, or no place to write to.
    """
    if not runs:
        raise UsageError("A report needs at least one run.")
    return write_atomically(path, render(runs).encode())


def render(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    runs = leaderboard.ordered(runs)
    columns, lines = leaderboard.lines(runs, page=True)
    here = files("zoo.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: (here / name).read_text(encoding="utf-8")),
        autoescape=True,  # names, patterns and configs are the user's: nothing of them may act as markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    task = runs[0].section("task")
    return environment.get_template("page.html.jinja").render(
        title=_title(runs, task),
        task_options=[f"{k} = {_plain(v)}" for k, v in task.items() if k != "name"],
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        summary=words.summary(runs),
        highlights=words.highlights(runs),
        caveats=words.caveats(runs),
        note=leaderboard.note(runs),
        columns=columns,
        lines=lines,
        is_partial=leaderboard.is_partial,
        swatches=[Markup(Look.of(i).swatch()) for i in range(len(runs))],
        csv=_data_link("text/csv", leaderboard.to_csv(runs)),
        pictures=[p._replace(svg=Markup(p.svg)) for p in _pictures(runs)],
        example=_example(task),
        recipes=[_recipe(run, label) for run, label in zip(runs, labels(runs), strict=True)],
        facts=_facts(runs),
    )


def _title(runs: Sequence[Run], task: Mapping[str, Any]) -> str:
    names = {str(run.section("task").get("name", "")) for run in runs}
    about = str(task.get("name", "")) if len(names) == 1 else ""
    models = "1 model" if len(runs) == 1 else f"{len(runs)} models"
    return f"{about}: {models} compared" if about else f"{models} compared"


def _pictures(runs: Sequence[Run]) -> list[Picture]:
    pictures = []
    for plot in PLOTS:
        figure = plot.draw(runs)
        if figure is not None:
            pictures.append(Picture(plot.name, plot.title, plot.caption, to_svg(figure, plot.name, plot.describe(runs))))
    return pictures


def _example(task: dict[str, Any]) -> Example | None:
    """One training example; None where this version of the tasks no longer knows the run's task or options."""
    import tasks

    if "name" not in task:
        return None
    try:
        drawn = tasks.create_task(task)
        batch = drawn.sample(1, split="train", seed=0)
    except UsageError:
        return None
    text = drawn.render(batch)
    if type(drawn).draw is tasks.Task.draw:  # the default picture is the same text
        return Example(text, "")
    from markupsafe import Markup

    with house_style():
        figure = drawn.draw(batch)
    return Example(text, Markup(to_svg(figure, "example", f"An example of {drawn.name}, drawn.")))


def _recipe(run: Run, label: str) -> dict[str, str]:
    """What it takes to train a run again: its config, as text and as a file to save, and the command."""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
    file = "".join(c if c.isalnum() or c in "-_." else "-" for c in label).strip("-.") or "experiment"
    return {
        "label": label,
        "file": f"{file}.yaml",
        "command": f"zoo train {file}.yaml",
        "config": text,
        "link": _data_link("application/yaml", text),
        "status": run.status,
    }


def _facts(runs: Sequence[Run]) -> list[Fact]:
    """Machine, versions and backends, each stated once where all runs agree."""
    each = [dict(_flat({k: run.result.get(k) for k in ("machine", "versions", "backends", "precision", "commit")})) for run in runs]
    found = []
    for key in dict.fromkeys(key for facts in each for key in facts):
        values = [(label, facts[key]) for label, facts in zip(labels(runs), each, strict=True) if key in facts]
        agree = len({value for _, value in values}) == 1
        found.append(Fact(key, values[0][1] if agree else "", [] if agree else values))
    return found


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            items += _flat(value, f"{prefix}{key} ")
        elif value is not None:
            items.append((f"{prefix}{key}".replace("_", " "), _plain(value)))
    return items


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _data_link(kind: str, text: str) -> str:
    return f"data:{kind};charset=utf-8,{quote(text)}"
