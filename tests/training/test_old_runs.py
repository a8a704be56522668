"""Runs of earlier versions are read, scored and resumed as when they were made; see `tests/data/runs/README.md`."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from old_runs import EXPECTED, KINDS, RUNS, TEXT, answers, config_of, files, machine, names, zoo_says

import zoo

OBJECTIVES = {"deep_supervision", "masked_diffusion", "next_token"}
"""Those of the version that the first runs are of."""

TIMES = ("seconds", "tokens_per_second")
BY_SCIPY = ("exact_low", "exact_high")
"""Edges of intervals, whose last bits differ between scipy's versions."""


WEIGHTS = [json.loads(line) for line in (RUNS.parent / "weights.jsonl").read_text().splitlines()]
"""Models of every word and option that adds weights, each with the names and shapes of its weights."""


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Copies an old run and its twin into a working folder of their own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(RUNS / TEXT, TEXT)
    return lambda name: Path(shutil.copytree(RUNS / name, name))


@pytest.fixture(params=names())
def run(request, copied) -> Path:
    return copied(request.param)


@functools.cache  # the folder is another for each test, and what is said the same
def said_by(run: Path, kind: str) -> dict[str, Any]:
    return answers(run / kind)


def expected(run: Path) -> dict[str, Any]:
    return json.loads((run / EXPECTED).read_text())


def needs_machine_of(run: Path) -> None:
    now, then = machine(), expected(run)["machine"]
    if other := [name for name, value in then.items() if now.get(name) != value]:
        pytest.skip(f"the bits may differ on a machine of another {', '.join(other)}")


def assert_close(now: Any, then: Any, where: str, bound: float = 1e-5) -> None:
    """Equal, numbers with a point to within rounding."""
    if isinstance(then, dict):
        assert set(now) >= set(then), where  # figures may be added
        for key, value in then.items():
            assert_close(now[key], value, f"{where}.{key}", max(bound, 1e-12) if key in BY_SCIPY else bound)
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for i, value in enumerate(then):
            assert_close(now[i], value, f"{where}[{i}]", bound)
    elif isinstance(then, float):
        assert math.isclose(now, then, rel_tol=bound, abs_tol=bound), f"{where}: {now}, not {then}"
    else:
        assert now == then, f"{where}: {now}, not {then}"


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in (run / "checkpoints").glob("step_*"))


def weights_of(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    found = sorted((run / f"checkpoints/step_{step}").glob("*.safetensors"))
    return {path.name: safetensors.torch.load_file(path) for path in found}


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kept = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return [{k: round(v, 12) if k in BY_SCIPY and v is not None else v for k, v in line.items()} for line in kept]


def go_on(run: Path) -> None:
    """Resume a run to its end; what it had recorded by its checkpoint stays as it was written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= steps_of(run)[-1]]
    assert len(lines) > len(kept) > 0  # some were written after the checkpoint
    assert zoo.train(run, resume=True, quiet=True).status == "finished"
    assert path.read_text().splitlines()[: len(kept)] == kept


def assert_same_weights(now: dict[str, torch.Tensor], then: dict[str, torch.Tensor]) -> None:
    assert set(now) == set(then)
    for name, weight in then.items():
        assert torch.equal(now[name], weight), name


def assert_same_outcome(now: Path, then: Path) -> None:
    assert records(now) == records(then)
    assert steps_of(now) == steps_of(then)
    for step in steps_of(then):
        files_now, files_then = weights_of(now, step), weights_of(then, step)
        assert set(files_now) == set(files_then)
        for file in files_then:
            assert_same_weights(files_now[file], files_then[file])


def stop_in_update(monkeypatch, number: int) -> None:
    """Ctrl-C in the given update from now."""
    original, seen = torch.Tensor.backward, []

    def backward(self, *args, **kwargs):
        seen.append(self)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


def test_every_objective_has_runs():
    kept = {config_of(RUNS / name / kind)["objective"]["name"] for name in names() for kind in KINDS}
    assert kept >= OBJECTIVES
    assert set(zoo.list_objectives()) >= OBJECTIVES
    for name in names():
        assert (RUNS / name / "finished/result.json").exists()
        assert not (RUNS / name / "interrupted/result.json").exists()
        assert config_of(RUNS / name / "finished") == config_of(RUNS / name / "interrupted")


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_run_is_loaded_and_says_what_it_said(run, kind):
    assert_close(said_by(run, kind), expected(run)[kind], str(run / kind))
    for which in ("best", "last"):
        assert said_by(run, kind)[which]["weights"] == expected(run)[kind][which]["weights"]
    last = weights_of(run / kind, steps_of(run / kind)[-1])
    kept = last.get("average.safetensors", last["weights.safetensors"])
    assert_same_weights(zoo.load(run / kind, "last").state_dict(), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_run_says_the_same_bits(run, kind):
    needs_machine_of(run)
    assert_close(said_by(run, kind), expected(run)[kind], str(run / kind), bound=0.0)


def test_a_finished_run_stays_as_it_is(run):
    finished = run / "finished"
    before = {
        path: path.read_bytes() for path in files(finished) if path.name != "config.yaml"
    }  # which may gain options
    result = zoo.train(finished, resume=True, quiet=True)
    assert result.status == "finished"
    assert result.data == json.loads((finished / "result.json").read_text())
    assert {path: path.read_bytes() for path in before} == before


def test_an_interrupted_run_comes_to_the_end_of_the_finished_one(run):
    go_on(run / "interrupted")
    coarse = config_of(run / "finished")["train"]["optimizer"] == "muon"  # whose bfloat16 steps make much of a rounding
    for now, then in zip(records(run / "interrupted"), records(run / "finished"), strict=True):
        if coarse:
            then = {k: then[k] for k in ("step", "split", "tokens", "lr", "loss")}
        assert_close(now, then, f"{run} step {then['step']}", 1e-3 if coarse else 1e-5)
    for step in {steps_of(run / kind)[-1] for kind in KINDS}:
        now, then = (weights_of(run / kind, step) for kind in ("interrupted", "finished"))
        assert set(now) == set(then)
        for file in then:
            bound = {"rtol": 1e-2, "atol": 1e-2} if coarse else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(now[file], then[file], **bound)


def test_old_runs_are_compared_and_shown(copied):
    runs = [copied(name) for name in names()]
    told = json.loads(zoo_says("compare", *(str(run / kind) for run in runs for kind in KINDS), "--json"))
    rows = {row["path"]: row for row in told}
    assert len(rows) == len(runs) * len(KINDS)
    for run in runs:
        then = json.loads((run / "finished/result.json").read_text())
        row = rows[str(run / "finished")]
        assert [row[k] for k in ("steps", "n_parameters")] == [then[k] for k in ("steps", "n_parameters")]
        assert [row[k] for k in ("accuracy", "exact")] == [then["test"][k] for k in ("accuracy", "exact")]
        assert rows[str(run / "interrupted")]["status"] == "unfinished"
        if (run / "finished/solving.json").exists():
            assert "validation example 0" in zoo_says("show", str(run / "finished"))


def test_an_interrupted_run_comes_to_the_bits_of_the_finished_one(run):
    needs_machine_of(run)
    go_on(run / "interrupted")
    assert_same_outcome(run / "interrupted", run / "finished")


def test_an_old_run_interrupted_once_more_comes_to_the_same_bits(run, monkeypatch):
    straight = Path(shutil.copytree(run / "interrupted", run / "straight"))
    go_on(straight)
    with monkeypatch.context() as patch:
        stop_in_update(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="Go on with: zoo train"):
            zoo.train(run / "interrupted", resume=True, quiet=True)
    assert zoo.train(run / "interrupted", resume=True, quiet=True).status == "finished"
    assert_same_outcome(run / "interrupted", straight)


@pytest.mark.parametrize("line", WEIGHTS, ids=lambda line: line["model"]["pattern"])
def test_an_old_models_weights_have_their_names(line):
    model = zoo.create_model(line["model"])
    assert {name: list(weight.shape) for name, weight in model.state_dict().items()} == line["weights"]
