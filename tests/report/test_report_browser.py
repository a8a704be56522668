"""The page in a real browser: everything appears, works by hand and by keyboard, and asks nothing of the network."""

from __future__ import annotations

import csv
import io
import json
from urllib.parse import unquote

import pytest
from report_browser import CHROMIUM, browser
from report_samples import OF_ERRORS, write_sample

from zoo.report import PLOTS, bench, load_runs, pareto_front, rows, write_report
from zoo.report.charts import TEXT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
NAMES = "[...document.querySelectorAll('#leaderboard tbody tr')].filter((r) => !r.hidden).map((r) => r.querySelector('.name').textContent)"  # noqa: E501
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
TEXTS = {"Enter": "\r", " ": " "}


@pytest.fixture(scope="module")
def tab():
    with browser() as page:
        yield page


@pytest.fixture
def opened(tab, sample_page):
    tab.open(sample_page)
    yield tab
    assert [event for complaint in COMPLAINTS for event in tab.told(complaint)] == []


def press(tab, key: str, times: int = 1) -> None:
    typed = {"text": TEXTS[key]} if key in TEXTS else {}
    for _ in range(times):
        for kind in ("keyDown" if typed else "rawKeyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key], **typed)


def do(tab, script: str) -> None:
    """Run a script, and wait until the page has followed."""
    tab.evaluate(script)
    tab.evaluate(SETTLED)


def drawn(tab, plot: str) -> list[str]:
    """Rows that a plot's first panel draws."""
    div = f"document.querySelector('#{plot}-0 .plot')"
    if plot.endswith(("length", "long-context")) and "effective" not in plot:
        return tab.evaluate(f"{div}.layout.yaxis.ticktext")
    return tab.evaluate(f"{div}.data.map((t) => t.meta).filter((m) => m !== 'front')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_opens_whole_and_silent(tab, sample_page, sample_measurements, width, scheme):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.open(sample_page, width=width)
    requests = [request["request"]["url"] for request in tab.told("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [sample_page.resolve().as_uri()]
    assert [event for complaint in COMPLAINTS for event in tab.told(complaint)] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for name in (
        *(plot.name for plot in PLOTS if plot.name not in OF_ERRORS),
        *(chart.name for chart in bench.charts(sample_measurements)),
    ):
        box = f"document.querySelector('#{name}-0 .plot .main-svg').getBoundingClientRect()"
        assert tab.evaluate(f"{box}.width") > 0.6 * min(width, 480)
        assert tab.evaluate(f"{box}.height") > 100
        marks = f"document.querySelectorAll('#{name}-0 .plot :is(path.js-line, path.point, .point path, .hm image)')"
        assert tab.evaluate(f"{marks}.length") > 0, name
    tab.call("Emulation.setEmulatedMedia", features=[])


def test_nothing_on_the_page_offers_to_send_it_away(opened):
    buttons = opened.evaluate("[...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert {"Download as PNG", "Download as SVG"} <= set(buttons) <= {
        "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Download as PNG", "Download as SVG",
    }  # fmt: skip


def test_a_heading_sorts_and_says_so(opened, sample_runs):
    known = {row["name"]: row for row in rows(sample_runs)}
    for title, key in (("params", "n_parameters"), ("state", "state_bytes"), ("accuracy", "accuracy")):
        head = (
            f"[...document.querySelectorAll('#leaderboard thead th')].find((h) => h.textContent.trim() === '{title}')"
        )
        for _ in range(2):
            do(opened, f"{head}.querySelector('button').click()")
            names = opened.evaluate(NAMES)
            order = opened.evaluate(f"{head}.ariaSort")
            values = [known[name][key] for name in names]
            assert values == sorted(values, reverse=order == "descending")
    assert opened.evaluate("document.querySelectorAll('#leaderboard th[aria-sort$=ending]').length") == 1
    do(opened, "document.querySelector('#leaderboard thead button').click()")
    assert opened.evaluate(NAMES) == sorted(known)


def test_what_has_no_figure_is_sorted_last(opened):
    head = "[...document.querySelectorAll('#leaderboard thead button')].find((b) => b.title.includes('target'))"
    for _ in range(2):
        do(opened, f"{head}.click()")
        assert set(opened.evaluate(NAMES)[-2:]) == {"lstm", "window"}


def test_a_filter_leaves_the_rows_that_hold_its_words(opened):
    for words, names in (("SHORT_CONV  mha", {"attention"}), ("lstm", {"lstm"}), ("nothing", set())):
        do(opened, f"f = document.querySelector('#leaderboard .filter'); f.value = {words!r};"
                   "f.dispatchEvent(new Event('input'))")  # fmt: skip
        assert set(opened.evaluate(NAMES)) == names
        assert (
            opened.evaluate("document.querySelector('#leaderboard .shown').textContent") == f"{len(names)} of 5 shown"
        )
    assert opened.evaluate("document.querySelector('#plots .chart').hidden")


def test_a_hidden_row_is_hidden_in_every_plot_and_in_its_table_only_grey(opened, sample_runs):
    (best, *rest) = rows(sample_runs)
    do(opened, "document.querySelector('#leaderboard tbody input').click()")
    assert opened.evaluate(NAMES)[0] == best["name"]
    for plot in (plot for plot in PLOTS if plot.name not in OF_ERRORS):
        left = drawn(opened, plot.name)
        assert len(left) == 4
        assert not {"run-0", best["name"]} & set(left)
    front = opened.evaluate(
        "document.querySelector('#accuracy-by-state-0 .plot').data.find((t) => t.meta === 'front').x"
    )
    points = [(row["state_bytes"], row["accuracy"]) for row in rest]
    assert set(front[:-1]) == {points[i][0] for i in pareto_front(points)}
    marked = opened.evaluate(
        "[...document.querySelectorAll('#leaderboard tr:has(.best)')].map((r) => r.dataset.row).includes('run-0')"
    )
    assert not marked
    do(opened, "document.querySelector('#leaderboard [data-all=show]').click()")
    assert len(drawn(opened, "loss")) == 5


def test_a_hidden_layer_is_hidden_in_every_plot_of_layers(opened, sample_measurements):
    do(opened, "document.querySelector('#layers tbody input').click()")
    for chart in bench.charts(sample_measurements):
        if chart.name != "bench-depth":
            assert not {"layer-0", "mamba2"} & set(drawn(opened, chart.name)), chart.name
    assert opened.evaluate("document.querySelector('#bench-depth-0').hidden")
    assert not opened.evaluate("document.querySelector('#bench-depth-1').hidden")
    assert len(drawn(opened, "loss")) == 5


def test_the_csv_of_the_rows_shown_holds_them_in_their_order(opened, sample_runs):
    do(opened, "document.querySelectorAll('#leaderboard tbody input')[1].click();"
               "document.querySelector('#leaderboard thead button').click()")  # fmt: skip
    link = opened.evaluate("document.querySelector('.csv-shown').href")
    found = list(csv.DictReader(io.StringIO(unquote(link.split(",", 1)[1]), newline="")))
    known = {row["name"]: row for row in rows(sample_runs)}
    hidden = rows(sample_runs)[1]["name"]
    assert [line["name"] for line in found] == sorted(known.keys() - {hidden})
    assert all(float(line["accuracy"]) == known[line["name"]]["accuracy"] for line in found)


def test_arrow_keys_go_from_point_to_point_and_say_where(opened):
    opened.evaluate("document.querySelector('#accuracy-by-state-0 .plot').focus()")
    press(opened, "ArrowDown")
    said = opened.evaluate("document.getElementById('live').textContent")
    assert said == "gated-deltanet, accuracy 99.9%, state of one sequence 67 KiB"
    assert opened.evaluate("document.querySelectorAll('#accuracy-by-state-0 .hovertext').length") == 1
    opened.evaluate("document.querySelector('#accuracy-by-length-0 .plot').focus()")
    press(opened, "ArrowRight")
    assert opened.evaluate("document.getElementById('live').textContent").startswith("attention, distance 16, ")


def test_keyboard_alone_sorts_and_hides(opened):
    focused = "document.activeElement"
    for what in (f"{focused}.title === 'Number of trained weights.'", f"{focused}.className === 'show'"):
        for _ in range(30):
            press(opened, "Tab")
            if opened.evaluate(what):
                break
        press(opened, " ")
    assert opened.evaluate("document.querySelector('#leaderboard th[aria-sort=ascending]').textContent") == "params"
    assert opened.evaluate("document.querySelectorAll('#leaderboard input.show:not(:checked)').length") == 1
    opened.evaluate(SETTLED)
    assert len(drawn(opened, "loss")) == 4


def test_a_keyboard_need_not_go_through_the_plots_to_reach_the_settings(opened):
    press(opened, "Tab", 2)
    press(opened, "Enter")
    press(opened, "Tab")
    press(opened, "Enter")
    assert opened.evaluate("document.querySelectorAll('#reproduce details[open]').length") == 1


def test_a_row_leads_to_its_settings_and_they_can_be_copied(opened, sample_page):
    do(opened, "document.querySelector('#leaderboard a.settings').click()")
    opened.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert opened.evaluate("document.querySelector('#settings-run-0').open")
    opened.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    opened.call("Page.bringToFront")
    do(opened, "document.querySelector('#settings-run-0 [data-copy=command-run-0]').click()")
    opened.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert opened.evaluate("document.getElementById('live').textContent") == "Copied."


def test_the_button_changes_between_light_and_dark(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('#loss-0 .plot').layout.font.color"
    before = opened.evaluate(f"[{ground}, {ink}]")
    do(opened, "document.getElementById('theme').click()")
    after = opened.evaluate(f"[{ground}, {ink}]")
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_numbers_read_on_the_page_as_they_do_in_the_table(opened):
    values = [0, 0.0002, 0.37, 0.9996, 1, 7.25, 41.234, 99.96, 120, 999.6, 1024, 9999, 10_000, 65_536, 123_456, 2e9]
    for unit, text in TEXT.items():
        known = [v for v in values if unit not in ("percent", "plain") or v <= 1]
        if unit == "percent" or unit == "plain":
            known = [v for v in known if v in (0, 0.37, 0.9996, 1)]
        said = opened.evaluate(f"JSON.stringify({known}.map(zoo.text.{unit}))")
        assert json.loads(said) == [text(v) for v in known], unit


def test_an_example_that_the_task_draws_is_a_picture(tab, tmp_path):
    write_sample(tmp_path / "run", task={"name": "maze"})
    tab.open(write_report(load_runs([tmp_path]), tmp_path / "report.html"))
    assert tab.evaluate("document.querySelector('#example figure svg').getBoundingClientRect().height") > 200
    assert tab.evaluate("document.querySelector('#example details pre').textContent.length") > 50
    assert tab.told("Log.entryAdded") == []


def test_names_that_look_like_markup_act_as_text_in_plots(tab, tmp_path):
    name = '<b onclick="x()">bold</b> & <a href="https://example.org">%{x}</a>'
    write_sample(tmp_path / "a", name=name)
    write_sample(tmp_path / "b", "lstm")
    tab.open(write_report(load_runs([tmp_path]), tmp_path / "report.html"))
    labels = tab.evaluate("[...document.querySelectorAll('#throughput-0 .ytick text')].map((t) => t.textContent)")
    assert labels[0].startswith("<b onclick")
    assert tab.evaluate("document.querySelectorAll('.plot a, .plot b, [onclick]').length") == 0
    assert [event for complaint in COMPLAINTS for event in tab.told(complaint)] == []


def test_tasks_are_shown_one_at_a_time(tab, tmp_path):
    for i in range(3):
        write_sample(tmp_path / f"a{i}", "lstm", name=f"a{i}")
    write_sample(tmp_path / "b", name="b", task={"name": "maze"})
    tab.open(write_report(load_runs([tmp_path]), tmp_path / "report.html"))
    assert set(tab.evaluate(NAMES)) == {"a0", "a1", "a2"}
    do(tab, "s = document.querySelector('.task'); s.value = ''; s.dispatchEvent(new Event('input'))")
    assert len(tab.evaluate(NAMES)) == len(drawn(tab, "loss")) == 4
