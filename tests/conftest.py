"""What every test starts from."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; before torch is imported, and for subprocesses too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import forked
import pytest
import torch

pytest_plugins = ["processor_time"]
ROOT = Path(__file__).resolve().parents[1]

torch.backends.cudnn.allow_tf32 = False  # by default cuDNN's recurrent layers round float32 to 10 bits of mantissa


@pytest.hookimpl(tryfirst=True)  # in the order of the files, and before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Of a product of values, `make test` takes those that differ from the first ones in one place at most."""
    first = {}
    for item in items:
        if crossed := item.get_closest_marker("crossed"):
            own = item.callspec.params
            values = first.setdefault(item.function, own)
            if sum(any(own[name] != values[name] for name in axis.split(", ")) for axis in crossed.args) > 1:
                item.add_marker(pytest.mark.slow)


gc.disable()  # until all tests are collected, which leaves a million objects that live to the end


def pytest_collection_finish():
    gc.freeze()  # a collection of garbage passes over them
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes a stack for CUDA at every call: a millisecond
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory (torch.empty and its kin) holds NaN, or the largest integer."""
    from zoo.laws import poisoned_memory  # not above: the environment comes first, and most tests need no law

    with poisoned_memory():
        yield


@pytest.fixture
def start_zoo():
    """Starts the real `zoo` command in the working folder."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from zoo.cli import main; main()", *arguments]
        return forked.start(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})

    return start
