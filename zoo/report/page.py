"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml

from tasks.registry import UsageError
from zoo.report import leaderboard, units, words
from zoo.report.files import write_atomically
from zoo.report.plots import PLOTS
from zoo.report.runs import Run, labels
from zoo.report.style import Look, house_style, to_svg

_FACTS = {"Machine": ["machine"], "Software": ["versions", "commit", "precision"], "Backends that ran": ["backends"]}
_GROUPS = ("machine", "versions", "backends")


class Picture(NamedTuple):
    """A plot, ready for the page."""

    name: str
    title: str
    caption: str
    svg: str


class Fact(NamedTuple):
    """A setting of machine or software: its values, each with the runs that have it where these are not all."""

    name: str
    values: dict[str, list[str]]


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
    task = _common_task(runs)
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


def _common_task(runs: Sequence[Run]) -> dict[str, Any]:
    """The task of all runs; empty where they differ."""
    first, *rest = (run.section("task") for run in runs)
    return first if all(task == first for task in rest) else {}


def _title(runs: Sequence[Run], task: Mapping[str, Any]) -> str:
    subject = f"{len(runs)} models compared" if len(runs) > 1 else runs[0].name
    return f"{task['name']}: {subject}" if "name" in task else subject


def _pictures(runs: Sequence[Run]) -> list[Picture]:
    pictures = []
    for plot in PLOTS:
        figure = plot.draw(runs)
        if figure is not None:
            pictures.append(
                Picture(plot.name, plot.title, plot.caption, to_svg(figure, plot.name, plot.describe(runs)))
            )
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
    }


def _facts(runs: Sequence[Run]) -> dict[str, list[Fact]]:
    """Machine, versions and backends, each value stated once."""
    told = [(label, run.result) for run, label in zip(runs, labels(runs), strict=True) if run.result]
    groups: dict[str, list[Fact]] = {}
    for title, keys in _FACTS.items():
        each = [
            (label, dict(_flat({k: v for k in keys if (v := result.get(k)) is not None}))) for label, result in told
        ]
        for name in dict.fromkeys(name for _, facts in each for name in facts):
            values: dict[str, list[str]] = {}
            for label, facts in each:
                if name in facts:
                    values.setdefault(facts[name], []).append(label)
            if [len(holders) for holders in values.values()] == [len(told)]:
                values = {value: [] for value in values}
            groups.setdefault(title, []).append(Fact(name, values))
    return groups


def _flat(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names and values; what lies in a mapping of the result goes by its own name."""
    for key, value in data.items():
        name = f"{above} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, "" if not above and key in _GROUPS else name)
        elif name.endswith(" bytes") and units.number(value) is not None:
            yield name.removesuffix(" bytes"), units.size(value)
        elif value is not None:
            yield name, _plain(value)


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _data_link(kind: str, text: str) -> str:
    return f"data:{kind};charset=utf-8,{quote(text)}"
