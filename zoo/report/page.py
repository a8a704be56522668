"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from zoo.core import yaml_text
from zoo.core.errors import UsageError
from zoo.core.files import check_page, write_output
from zoo.core.options import tuples
from zoo.report import bench, leaderboard, plots, units, words
from zoo.report.answers import answers
from zoo.report.charts import Chart, Row, describe
from zoo.report.labels import labels, task_names
from zoo.report.records import Record
from zoo.report.runs import Run, as_runs
from zoo.report.style import COLOURS, DASHES, SYMBOLS, Look, css_colours, css_dash, house_style, to_svg
from zoo.report.trials import Comparison, section
from zoo.report.units import printable

_FACTS = {"Machine": ["machine"], "Software": ["versions", "commit", "precision"], "Backends that ran": ["backends"]}
_GROUPS = ("machine", "versions", "backends")


class Picture(NamedTuple):
    """A chart's place on the page, which the script fills, and the chart in words."""

    chart: Chart
    words: str


class Fact(NamedTuple):
    """A setting of machine or software: its values, each with the runs that have it where these are not all."""

    name: str
    values: dict[str, list[str]]


class Example(NamedTuple):
    """An example of the task: as text, and as a picture where the task has one of its own."""

    text: str
    svg: str


def write_report(
    runs: Sequence[Run | str | Path] | str | Path,
    path: str | Path,
    measurements: Sequence[Record] = (),
    comparisons: Sequence[Comparison] = (),
    *,
    ask_models: bool = True,
    command: str = "zoo compare",
) -> Path:
    """Write the page, overwriting an older one, and return where it lies.

    Args:
        runs: what to compare, or the folders where it lies.
        path: where to.
        measurements: what `zoo bench` measured, shown below the runs.
        comparisons: of the trials of sweeps, shown above the runs.
        ask_models: whether the models of runs that hold weights answer an example.
        command: what the page says that it was made by.

    Raises:
        UsageError: no run, measurement or comparison, a name that is no page's, or no place to write to.
    """
    check_page(path)
    runs = as_runs(runs)
    if not runs and not measurements and not comparisons:
        raise UsageError("A report needs at least one run, sweep or measurement.")
    page = render(runs, measurements, comparisons, ask_models=ask_models, command=command)
    return write_output(path, page.encode())


def render(
    runs: Sequence[Run],
    measurements: Sequence[Record] = (),
    comparisons: Sequence[Comparison] = (),
    *,
    ask_models: bool = False,
    command: str = "zoo compare",
) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    runs = leaderboard.ordered(runs)
    columns, lines = leaderboard.lines(runs, page=True)
    layer_columns, subjects = bench.table(measurements)
    run_rows, layer_rows = plots.rows_of(runs), bench.rows_of(measurements)
    sections = [section.of(comparison, f"sweep{i or ''}") for i, comparison in enumerate(comparisons)]
    rows = [*run_rows, *layer_rows, *(row for each in sections for row in each.rows)]
    run_charts, layer_charts = plots.charts(runs), bench.charts(measurements)
    here = files("zoo.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: (here / name).read_text(encoding="utf-8")),
        autoescape=True,  # names, patterns and configs are the user's: nothing of them may act as markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    task = _common_task(runs)
    tasks_of_runs = task_names(runs)
    scripts = [get_plotlyjs(), (here / "page.js").read_text(encoding="utf-8")]
    data = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "charts": [
            chart.as_data() for chart in (*run_charts, *layer_charts, *(c for each in sections for c in each.charts))
        ],
        "looks": {"n_colours": len(COLOURS), "symbols": SYMBOLS, "dashes": [css_dash(dash) for dash in DASHES]},
        "csv": _csv(leaderboard.csv_lines(runs), run_rows),
    }
    return environment.get_template("page.html.jinja").render(
        title=_title(runs, measurements, sections, task),
        task_options=[f"{k} = {_plain(v)}" for k, v in task.items() if k != "name"],
        style=Markup((here / "page.css").read_text(encoding="utf-8") + css_colours()),
        scripts=[Markup(script) for script in scripts],
        hashes=[Markup(_hash(script)) for script in scripts],
        data=Markup(_json(data)),
        summary=_summary(runs, subjects, sections),
        sections=sections,
        highlights=words.highlights(runs) if task else [],
        spreads=words.spreads(runs),
        repeats=words.repeats(runs),
        caveats=[*(c for each in sections for c in each.caveats), *words.caveats(runs, measurements)],
        note=leaderboard.note(runs),
        columns=columns,
        lines=lines,
        run_rows=run_rows,
        tasks=tasks_of_runs,
        chosen_task=max(set(tasks_of_runs), key=tasks_of_runs.count, default="") if not task else "",
        objectives=_differing([str(run.section("objective").get("name") or "") for run in runs]),
        swatches={row.id: Markup(Look.of(row.look, row.variant).swatch()) for row in rows},
        csv=_data_link("text/csv", leaderboard.to_csv(runs)),
        pictures=[Picture(chart, describe(chart, rows)) for chart in run_charts],
        section_pictures=[[Picture(chart, describe(chart, rows)) for chart in each.charts] for each in sections],
        data_link=_data_link,
        layer_columns=layer_columns,
        subjects=subjects,
        layer_pictures=[Picture(chart, describe(chart, rows)) for chart in layer_charts],
        example=_example(task),
        answers=answers(runs, run_rows) if ask_models else [],
        markup=Markup,
        recipes=[_recipe(run, row.label) for run, row in zip(runs, run_rows, strict=True)],
        facts=_facts(runs, measurements, [trial for each in sections for trial in each.machines]),
        command=command,
    )


def _json(data: Any) -> str:
    """JSON that can stand in a page: no tag ends or begins in it."""
    text = json.dumps(_rounded(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _rounded(data: Any) -> Any:
    """Floats in six digits, which is more than a plot shows."""
    if isinstance(data, float):
        return float(f"{data:.6g}")
    if isinstance(data, dict):
        return {k: _rounded(v) for k, v in data.items()}
    return [_rounded(v) for v in data] if isinstance(data, list | tuple) else data


def _hash(script: str) -> str:
    """A script as the page's policy names it: only those of ours run."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _csv(lines: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """A CSV with its lines by row, so that those shown can be had alone."""
    head, *body = lines
    return {"head": head, "lines": {row.id: line for row, line in zip(rows, body, strict=True)}}


def _differing(values: list[str]) -> list[str]:
    """The values where they differ, else empty texts."""
    return values if len(set(values)) > 1 else [""] * len(values)


def _common_task(runs: Sequence[Run]) -> dict[str, Any]:
    """The task of all runs; empty where they differ."""
    first, *rest = (run.section("task") for run in runs) if runs else [{}]
    return first if all(task == first for task in rest) else {}


def _summary(runs: Sequence[Run], subjects: Sequence[Any], sections: Sequence[section.Section]) -> str:
    """Of sweeps where there are any, else of runs, else of measurements."""
    if sections:
        return " ".join(each.summary for each in sections[:2])
    return words.summary(runs) if runs else f"{len(subjects)} layers measured by zoo bench."


def _title(
    runs: Sequence[Run], measurements: Sequence[Record], sections: Sequence[section.Section], task: Mapping[str, Any]
) -> str:
    if sections:
        return sections[0].title if len(sections) == 1 else f"{len(sections)} sweeps compared"
    if not runs:
        return f"{len({r.title for r in measurements})} layers measured"
    subject = f"{len(runs)} models compared" if len(runs) > 1 else runs[0].name
    return f"{task['name']}: {subject}" if "name" in task else subject


def _example(task: dict[str, Any]) -> Example | None:
    """One training example; None where this version of the tasks no longer knows the run's task or options."""
    from zoo import tasks

    if "name" not in task:
        return None
    try:
        drawn = tasks.create_task(tuples(task))
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
    text = yaml_text.dump(run.config, width=100)
    file = "".join(c if c.isalnum() or c in "-_." else "-" for c in label).strip("-.") or "experiment"
    return {
        "label": label,
        "file": f"{file}.yaml",
        "folder": str(run.path),
        "commit": printable(run.result.get("commit") or ""),
        "command": f"zoo train {file}.yaml",
        "config": text,
        "link": _data_link("application/yaml", text),
    }


def _facts(
    runs: Sequence[Run], measurements: Sequence[Record], trials: Sequence[tuple[str, dict[str, Any]]]
) -> dict[str, list[Fact]]:
    """Machine, versions and backends, each value stated once."""
    told = [(label, run.result) for run, label in zip(runs, labels(runs), strict=True) if run.result]
    told += [
        (f"zoo bench {r.benchmark}", {k: v for k, v in vars(r).items() if k != "backends" and v}) for r in measurements
    ]
    told += trials
    groups: dict[str, list[Fact]] = {}
    for title, keys in _FACTS.items():
        each = [
            (label, dict(_flat({k: v for k in keys if (v := result.get(k)) is not None}))) for label, result in told
        ]
        for name in dict.fromkeys(name for _, facts in each for name in facts):
            values: dict[str, list[str]] = {}
            for label, facts in each:
                if name in facts:
                    holders = values.setdefault(facts[name], [])
                    if label not in holders:
                        holders.append(label)
            if len(values) == 1 and all(name in facts for _, facts in each):
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
