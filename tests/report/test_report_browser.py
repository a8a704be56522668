"""The page in a real browser: everything appears, nothing complains, nothing is asked of the network."""

from __future__ import annotations

import pytest
from report_browser import CHROMIUM, browser
from report_samples import write_sample

from zoo.report import PLOTS, load_runs, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def tab():
    with browser() as page:
        yield page


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_opens_whole_and_silent(tab, sample_page, width):
    tab.open(sample_page, width=width)
    requests = [request["request"]["url"] for request in tab.told("Network.requestWillBeSent")]
    assert requests == [sample_page.resolve().as_uri()]
    for complaint in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
        assert tab.told(complaint) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for plot in PLOTS:
        box = f"document.querySelector('#{plot.name} svg').getBoundingClientRect()"
        assert tab.evaluate(f"{box}.width") > 0.6 * min(width, 480)
        assert tab.evaluate(f"{box}.height") > 100
        assert tab.evaluate(f"document.querySelectorAll('#{plot.name} svg path').length") > 5


def test_an_example_that_the_task_draws_is_a_picture(tab, tmp_path):
    write_sample(tmp_path / "run", task={"name": "maze"})
    tab.open(write_report(load_runs([tmp_path]), tmp_path / "report.html"))
    assert tab.evaluate("document.querySelector('#example figure svg').getBoundingClientRect().height") > 200
    assert tab.evaluate("document.querySelector('#example details pre').textContent.length") > 50
    assert tab.told("Log.entryAdded") == []


def test_keyboard_alone_reaches_and_opens_the_settings(tab, sample_page):
    tab.open(sample_page)
    for _ in range(40):
        for kind in ("rawKeyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        if tab.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    for kind in ("keyDown", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert tab.evaluate("document.querySelectorAll('details[open]').length") == 1
