"""Sample runs and their page, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_samples import write_measurements, write_samples

from zoo.report import Record, Run, load_records, load_runs, write_report


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_samples(folder)
    return folder


@pytest.fixture(scope="session")
def sample_runs(sample_folder: Path) -> list[Run]:
    return load_runs([sample_folder])


@pytest.fixture(scope="session")
def sample_measurements(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return load_records([write_measurements(tmp_path_factory.mktemp("bench") / "all.jsonl")])


@pytest.fixture(scope="session")
def sample_page(
    sample_runs: list[Run], sample_measurements: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_report(sample_runs, tmp_path_factory.mktemp("page") / "report.html", sample_measurements)
