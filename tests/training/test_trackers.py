"""Trackers where their packages are missing, or unknown; with their packages: tests/parity/tracking."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from zoo.cli import main
from zoo.core.errors import UsageError
from zoo.training.tracking import TRACKERS


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("found", [None, ModuleType("a folder of earlier runs")], ids=["missing", "a folder"])
def test_a_missing_package_is_named_before_anything_is_written(recipe, monkeypatch, capsys, name, found, tmp_path):
    monkeypatch.setitem(sys.modules, name, found)
    told = f"needs the package {name}: pip install 'sequence-zoo[{name}]'."
    with pytest.raises(UsageError) as error:
        TRACKERS[name]()
    assert str(error.value).endswith(told)
    with pytest.raises(SystemExit) as ended:
        main(["train", recipe, "--track", name])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"{told}\n")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker_is_refused(recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", recipe, "--track", "mlflwo"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "zoo: Unknown tracker 'mlflwo'. Did you mean 'mlflow'? Available: wandb, mlflow.\n"
    )
