"""Callbacks: what they are called with, that they change nothing, and how their errors end a run."""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.core.errors import RunError, UsageError
from zoo.core.run_files import read_metrics, read_result
from zoo.training import checkpoints
from zoo.training.stopping import Interrupted


class Spy(zoo.Callback):
    """Writes down every call; does its worst to the random states and to what it is given."""

    def __init__(self, fail_in: str | None = None):
        self.calls: list[tuple[str, dict]] = []
        self.fail_in = fail_in

    def _called(self, method: str, record: dict) -> None:
        self.calls.append((method, dict(record)))
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        record.clear()
        if method == self.fail_in:
            raise ZeroDivisionError("a slip\nof the pen")

    def on_start(self, run):
        self._called("on_start", run)

    def on_log(self, record):
        self._called("on_log", record)

    def on_evaluation(self, record):
        self._called("on_evaluation", record)

    def on_checkpoint(self, checkpoint):
        self._called("on_checkpoint", checkpoint)

    def on_end(self, result):
        self._called("on_end", result)

    def of(self, method: str) -> list[dict]:
        return [record for name, record in self.calls if name == method]


def test_a_callback_sees_the_whole_run_and_changes_no_bit(recipe, outcome_of):
    zoo.train(recipe, {"out": "alone"}, quiet=True)
    spy, idle = Spy(), zoo.Callback()
    result = zoo.train(recipe, {"out": "watched"}, quiet=True, callbacks=[spy, idle])
    assert outcome_of("watched") == outcome_of("alone")
    [start], [end] = spy.of("on_start"), spy.of("on_end")
    assert (start["step"], start["resumed"], start["folder"], start["name"]) == (0, False, "watched", "small")
    assert start["config"]["train"]["steps"] == 40
    assert end == result.data
    records = read_metrics(Path("watched"))
    assert spy.of("on_log") == [line for line in records if line["split"] == "train"]
    assert spy.of("on_evaluation") == [line for line in records if line["split"] != "train"]
    saved = spy.of("on_checkpoint")
    assert saved[-1]["path"] == "watched/checkpoints/step_40"
    assert result.data["best_step"] == [each["step"] for each in saved if each["is_best"]][-1]
    assert [name for name, _ in spy.calls][:: len(spy.calls) - 1] == ["on_start", "on_end"]


class Stopper(zoo.Callback):
    """Sends this process a real signal at one record."""

    def __init__(self, step: int):
        self.step = step

    def on_log(self, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_resumed_run_starts_at_its_step(recipe, outcome_of):
    zoo.train(recipe, {"out": "alone"}, quiet=True)
    first, second, third = Spy(), Spy(), Spy()
    with pytest.raises(Interrupted):
        zoo.train(recipe, {"out": "cut"}, quiet=True, callbacks=[first, Stopper(15)])
    assert first.of("on_end")[0]["status"] == "interrupted"
    zoo.train(recipe, {"out": "cut"}, quiet=True, callbacks=[second])
    assert (second.of("on_start")[0]["step"], second.of("on_start")[0]["resumed"]) == (15, True)
    steps = [[record["step"] for record in spy.of("on_log")] for spy in (first, second)]
    assert steps == [[5, 10, 15], [20, 25, 30, 35, 40]]
    assert outcome_of("cut") == outcome_of("alone")
    zoo.train(recipe, {"out": "cut"}, quiet=True, callbacks=[third])  # ended already
    assert third.calls == []


@pytest.mark.parametrize(
    ("method", "step"), [("on_start", None), ("on_log", 5), ("on_evaluation", 10), ("on_checkpoint", 7), ("on_end", 40)]
)
def test_an_exception_ends_the_run_with_a_checkpoint(recipe, outcome_of, method, step):
    spy, other = Spy(fail_in=method), Spy()
    told = re.escape(f"The callback Spy failed in {method} (ZeroDivisionError: a slip of the pen).")
    with pytest.raises(RunError, match=rf"^{told}[^\n]*$") as error:
        zoo.train(recipe, {"out": "cut"}, quiet=True, callbacks=[spy, other])
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    kept = checkpoints.steps(Path("cut/checkpoints"))
    assert (kept[-1] if kept else None) == step
    assert read_result(Path("cut"))["status"] == ("finished" if method == "on_end" else "failed")
    assert len(other.of("on_end")) == (method != "on_start")
    assert f"checkpoints/step_{step}" in str(error.value) or method in ("on_start", "on_end")
    if method == "on_evaluation":  # the best weights so far were not saved yet
        zoo.train(recipe, {"out": "alone"}, quiet=True)
        zoo.train(recipe, {"out": "cut"}, quiet=True)
        assert outcome_of("cut") == outcome_of("alone")


@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        ([print], r"callbacks\[0\] is <built-in function print>: it should be an object of a class derived from"),
        ([zoo.Callback(), Spy], r"callbacks\[1\] is the class Spy"),
        (zoo.Callback(), r"callbacks should be a list, such as \[MyCallback\(\)\]"),
        (3, "callbacks should be a list"),
    ],
)
def test_what_is_no_callback_is_refused(recipe, callbacks, told, tmp_path):
    with pytest.raises(UsageError, match=rf"^{told}[^\n]*$"):
        zoo.train(recipe, callbacks=callbacks)
    assert not (tmp_path / "runs").exists()


def test_wrong_input_that_a_callback_finds_stays_wrong_input(recipe):
    class Picky(zoo.Callback):
        def on_start(self, run):
            raise UsageError("No such project.")

    with pytest.raises(UsageError, match=r"^No such project\.$"):
        zoo.train(recipe, callbacks=[Picky()], quiet=True)
