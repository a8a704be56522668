"""The section of a sweep on the report page: what it holds, that it stays small and readable, and that it works."""

from __future__ import annotations

import csv
import html
import io
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from report_browser import CHROMIUM, browser
from report_samples import write_sample
from report_trials import BEST_LR, write_sweep

from zoo.cli import main
from zoo.report.page import render
from zoo.report.trials import compare, from_sweep
from zoo.report.trials.charts import charts, rows_of

COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "study", ("gqa", "lstm"), (1e-3, BEST_LR), (0, 1, 2))
    return compare(from_sweep(folder), ["words.mixer"], best=["train.lr"], baseline="lstm")


@pytest.fixture(scope="module")
def page(comparison) -> str:
    return render([], [], [comparison])


def test_the_section_holds_table_differences_plots_and_source(page):
    for part in (
        "Trials of study",
        "Difference in accuracy to lstm",
        "(chance 5.0%)",
        "for each seed chosen on",
        "Holm",
    ):
        assert part in html.unescape(page)
    for chart in ("means", "curves", "cost", "choice", "map"):
        assert f'id="sweep-{chart}"' in page
    assert "zoo sweep sweep.yaml" in page
    link = re.search(r'href="data:text/csv;charset=utf-8,([^"]+)"', page)
    rows = list(csv.DictReader(io.StringIO(unquote(html.unescape(link[1])))))
    assert [row["words.mixer"] for row in rows] == ["gqa", "lstm"]
    assert float(rows[0]["low"]) < float(rows[0]["mean"]) < float(rows[0]["high"])


def test_one_colour_a_word_whatever_the_rate(tmp_path):
    folder = write_sweep(tmp_path / "s", ("gqa", "lstm"), (1e-3, BEST_LR), (0, 1))
    comparison = compare(from_sweep(folder))
    rows = rows_of(comparison, "x")
    looks: dict[str, set[int]] = {}
    for row, group in zip(rows, comparison.groups, strict=True):
        looks.setdefault(group.names[0], set()).add(row.look)
    assert all(len(each) == 1 for each in looks.values())
    assert looks["gqa"] != looks["lstm"]
    assert len({(row.look, row.variant) for row in rows}) == 4


def test_points_bars_and_bands(comparison):
    found = {chart.name: chart.panels for chart in charts(comparison, rows_of(comparison, "x"))}
    (means,) = found["x-means"]
    first = means.series[0]
    assert first.each == comparison.groups[0].scores.figures.tolist()
    assert (first.low[0], first.high[0]) == comparison.groups[0].estimate.interval
    assert means.mark == comparison.chance
    (curves,) = found["x-curves"]
    assert curves.band
    assert len(curves.series) == 2  # a group each, no line a run
    assert all(low <= y <= high for s in curves.series for low, y, high in zip(s.low, s.y, s.high, strict=True))
    (heat,) = found["x-map"]
    assert heat.columns == ["0.001", "0.003"]
    assert found["x-cost"][0].front


def test_markup_in_names_is_text(tmp_path):
    folder = write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], (0, 1), config={"name": "x"})
    text = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(text + "note: '<script>alert(1)</script>'\n")
    page = render([], [], [compare(from_sweep(folder))])
    assert "<script>alert(1)" not in page


def test_zoo_report_has_a_section_for_each_sweep(tmp_path, capsys):
    write_sweep(tmp_path / "runs" / "one", ["gqa"], [BEST_LR], (0, 1))
    write_sweep(tmp_path / "runs" / "two", ["lstm"], [BEST_LR], (0, 1))
    write_sample(tmp_path / "runs" / "lone")
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "runs"), "--no-answers"])
    assert end.value.code in (0, None)
    assert "(1 run, 2 sweeps)" in capsys.readouterr().out
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "Trials of one" in page
    assert "Trials of two" in page
    assert "Leaderboard" in page


@pytest.mark.slow
def test_three_hundred_trials_give_a_page_of_the_same_size(tmp_path):
    folder = write_sweep(tmp_path / "s", lrs=(1e-3, BEST_LR, 1e-2, 3e-2, 1e-1), seeds=range(10))
    comparison = compare(from_sweep(folder), ["words.mixer"], best=["train.lr"])
    assert sum(len(group.every) for group in comparison.groups) == 300
    small = compare(from_sweep(write_sweep(tmp_path / "t", seeds=(0, 1))), ["words.mixer"], best=["train.lr"])
    assert len(render([], [], [comparison])) - len(render([], [], [small])) < 100_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_in_a_browser(page, tmp_path):
    path = Path(tmp_path / "page.html")
    path.write_text(page)
    with browser() as tab:
        for width in (1200, 360):
            tab.open(path, width)
            assert [event for complaint in COMPLAINTS for event in tab.told(complaint)] == []
            assert not [
                e
                for e in tab.told("Network.requestWillBeSent")
                if not e["request"]["url"].startswith(("file:", "data:", "blob:"))
            ]
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.open(path, 1200)
        dots = "document.querySelector('#sweep-means-0 .plot')"
        assert tab.evaluate(f"{dots}.data.filter((t) => t.meta !== 'front').length") == 2
        assert tab.evaluate(f"{dots}.data.filter((t) => t.meta === 'front')[0].x.length") == 3  # a point a seed
        assert (
            tab.evaluate(
                "document.querySelector('#sweep-curves-0 .plot').data.filter((t) => t.fill === 'toself').length"
            )
            == 2
        )
        tab.evaluate("document.querySelector('#sweep input.show').click()")
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert tab.evaluate(f"{dots}.data.filter((t) => t.meta !== 'front').length") == 1
