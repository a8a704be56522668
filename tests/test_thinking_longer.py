"""The benchmark of thinking longer measures what evaluation does, and the page holds what was measured."""

from __future__ import annotations

import pytest

from zoo.benchmarks.studies import thinking_longer
from zoo.core.errors import UsageError
from zoo.training.evaluation import evaluate_run
from zoo.training.train import train

EXPERIMENT = {
    # Two answers, so that a model that knows nothing gets some right.
    "task": {"name": "formal_language", "max_length": 8},
    "model": {"pattern": "token_mlp swiglu", "d_model": 32, "causal": False, "placement": "post"},
    "train": {"steps": 3, "batch_size": 16, "eval_rows": 16, "test_rows": 24, "threads": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "trm"
    model = {**EXPERIMENT["model"], "recursion": {"cycles": 1, "updates": 1, "max_steps": 2}}
    train({**EXPERIMENT, "model": model, "objective": "deep_supervision", "out": str(out)}, quiet=True)
    return out


@pytest.fixture(scope="module")
def report(run):
    return thinking_longer.measured(run, 24, [1, 4], [1, 2, 3])


@pytest.mark.parametrize(
    ("steps", "starts", "vote"), [(1, 1, "halt"), (4, 1, "halt"), (4, 3, "halt"), (4, 2, "settled")]
)
def test_figures_are_those_of_evaluation(run, report, steps, starts, vote):
    options = {"objective.eval_steps": steps, "objective.starts": starts, "objective.vote": vote}
    expected = evaluate_run(run, options, split="test")["exact"]
    (row,) = (row for row in report["rows"] if (row["steps"], row["starts"]) == (steps, starts))
    assert row["exact"]["own" if starts == 1 else vote] == expected


def test_votes_lie_between_none_and_any(report):
    exact = [row["exact"] for row in report["rows"]]
    assert any(0 < share < 1 for shares in exact for share in shares.values())
    for shares in exact:
        assert max(shares.values()) <= shares.get("any", 1)
    assert "settled" not in report["rows"][1]["exact"]  # after a single step
    times = {(row["steps"], row["starts"]): row["ms_per_puzzle"] for row in report["rows"]}
    assert 0 < times[1, 1] < times[4, 1]
    assert times[4, 2] < times[4, 3]


def test_another_objective_is_refused(tmp_path):
    out = tmp_path / "plain"
    train({**EXPERIMENT, "model": {"pattern": "mlp", "d_model": 16}, "out": str(out)}, quiet=True)
    with pytest.raises(UsageError, match="was taught by next_token: thinking longer is for runs of deep_supervision"):
        thinking_longer.measured(out, 8, [1], [1])
