"""Processes that share one sequence, each with a piece of its steps: the gradients and losses of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from several import ended, start, train

from zoo.core.errors import UsageError
from zoo.models.create import model_config
from zoo.objectives.base import create_objective
from zoo.tasks import create_task
from zoo.training.processes import Processes, check_shared
from zoo.training.train import train as train_one
from zoo.training.train_options import TrainConfig

MODEL = model_config("gqa swiglu", d_model=16, vocab_size=32)
SEVERAL = str(Path(__file__).with_name("several.py"))


def compare(n: int, jobs: dict[str, dict[str, object]], folder: Path) -> None:
    """Train each kind with these options in n processes, and in one process without them."""
    given = [",".join([k, f"{k}-n", *(f"{o}={json.dumps(v)}" for o, v in more.items())]) for k, more in jobs.items()]
    for status, _, err in ended(start(n, SEVERAL, *given, cwd=folder)):
        assert status == 0, err
    for kind in jobs:
        alone = train(kind, folder / f"{kind}-1")
        first, *others = [torch.load(folder / f"{kind}-n.{rank}.pt") for rank in range(n)]
        size = torch.cat([g.flatten() for g in alone]).norm()
        for ours, theirs in zip(first, alone, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * size, kind
        assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))
        ours, theirs = (
            [json.loads(line) for line in (folder / f"{kind}-{run}/metrics.jsonl").read_text().splitlines()]
            for run in ("n", 1)
        )
        for line, expected in zip(ours, theirs, strict=True):
            for key in {"loss", "accuracy", "exact", "grad_norm", "step", "tokens"} & expected.keys():
                assert line[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12), (kind, key)


def test_two_processes_that_share_sequences_train_as_one(tmp_path):
    compare(2, {"next_token": {"sequence_processes": 2}}, tmp_path)


@pytest.mark.slow
def test_pieces_of_sequences_beside_rows_of_the_batch(tmp_path):
    two = {"sequence_processes": 2}
    kinds = ("next_token", "fill_in", "muon", "experts", "recompute", "masked_diffusion", "uniform_diffusion")
    jobs = dict.fromkeys(kinds, two)
    compare(4, {**jobs, "fill_in": {"sequence_processes": 4}, "muon": {**two, "parallel": "fsdp"}}, tmp_path)


def test_a_later_training_without_cuts_has_whole_sequences():
    group = object.__new__(Processes)
    group.rank, group.size, group._data = 1, 2, None
    group.cut_sequences(2)
    assert group.pieces is not None
    assert group.rows(8) == slice(0, 8)
    group.cut_sequences(1)
    assert group.pieces is None
    assert group.rows(8) == slice(4, 8)


@pytest.mark.parametrize(
    ("size", "options", "told"),
    [
        (1, {"sequence_processes": 2}, "train.sequence_processes=2: start several processes: --processes 2"),
        (4, {"sequence_processes": 3}, "4 processes cannot be divided into groups that share a sequence"),
        (4, {"sequence_processes": 2, "batch_size": 5}, "cannot be divided among 2 groups of 2 processes"),
        (16, {"sequence_processes": 16}, "a sequence has 12 tokens, and every process needs one"),
    ],
)
def test_groups_that_do_not_fit_are_refused(size, options, told):
    objective = create_objective("next_token", create_task("mqar", vocab_size=32, seq_len=12, n_pairs=2))
    with pytest.raises(UsageError, match=told):
        check_shared(size, TrainConfig(device="cpu", **options), objective, MODEL)


def test_what_reads_whole_sequences_is_refused():
    objective = create_objective("classification", create_task("digits"))
    with pytest.raises(UsageError, match="the objective classification reads the sequences of digits whole"):
        check_shared(2, TrainConfig(device="cpu", sequence_processes=2), objective, MODEL)
    with pytest.raises(UsageError, match=r"sequence_processes=2: train\.compile is not allowed with it"):
        TrainConfig(sequence_processes=2, compile=True)


def test_the_refusal_of_one_process_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="start several processes: --processes 2"):
        train_one("mqar", {"train.sequence_processes": 2}, quiet=True)
