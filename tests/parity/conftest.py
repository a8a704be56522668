"""Parity with other people's code: run by `make parity` in environments that hold it, where a skip is a failure."""

from __future__ import annotations

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"a parity test may not be skipped: {report.longrepr}"
    return report
