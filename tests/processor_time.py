"""What tests cost in processor seconds (those of their subprocesses too, and nothing that else runs here), at the end.

Processor seconds and not those of a clock, so that a busy machine changes little; a line at the end and no failure, so
that a slow machine fails nothing.
"""

from __future__ import annotations

import os
from collections import Counter

import forked
import pytest

WORD_BUDGET = 4.0
"""Processor seconds that all law tests of a word may take in `make test`."""
BUDGET = 550
"""Processor seconds of all that `make test` runs: below five minutes on two cores."""

_before = pytest.StashKey[float]()
_files: Counter[str] = Counter()
_words: Counter[str] = Counter()


def _seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system + forked.seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.stash[_before] = _seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("processor seconds", _seconds() - item.stash[_before]))
    return report


def pytest_runtest_logreport(report):
    seconds = dict(report.user_properties).get("processor seconds")
    if report.when != "teardown" or seconds is None:
        return
    file, _, test = report.nodeid.partition("::")
    _files[file] += seconds
    if file.endswith("test_laws.py") and test.startswith("test_law["):  # others are of backbones
        _words[test.removeprefix("test_law[").partition("-")[0]] += seconds


def pytest_terminal_summary(terminalreporter):
    total = sum(_files.values())
    if total < 30:
        return
    most = ", ".join(f"{file.removeprefix('tests/')} {seconds:.0f}" for file, seconds in _files.most_common(8))
    terminalreporter.write_line(f"Processor seconds: {total:.0f} (budget {BUDGET}), most in {most}.")
    if _words:
        above = [f"{word} {seconds:.1f}" for word, seconds in _words.most_common() if seconds > WORD_BUDGET]
        told = (
            f"above the budget of {WORD_BUDGET:.0f}: {', '.join(above)}" if above else f"none above {WORD_BUDGET:.0f}"
        )
        mean = sum(_words.values()) / len(_words)
        terminalreporter.write_line(f"Law tests, processor seconds a word: {mean:.1f} on average, {told}.")
