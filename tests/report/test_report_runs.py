"""Reading run folders: whole, interrupted, damaged."""

from __future__ import annotations

import json

import pytest
from report_samples import MODELS, write_sample

from tasks.registry import UsageError
from zoo.report import load_runs
from zoo.report.runs import labels


def test_a_folder_of_runs_and_single_runs_give_each_run_once(sample_folder):
    runs = load_runs([sample_folder, sample_folder / "lstm", str(sample_folder / "lstm" / "..")])
    assert sorted(run.name for run in runs) == sorted(MODELS)


def test_runs_some_levels_down_are_found_and_run_folders_are_not_searched(tmp_path):
    write_sample(tmp_path / "a" / "b" / "deep")
    write_sample(tmp_path / "a" / "b" / "deep" / "checkpoints" / "not-a-run")
    write_sample(tmp_path / ".trash" / "old")
    assert [run.path.name for run in load_runs([tmp_path])] == ["deep"]


def test_a_run_holds_what_its_files_say(sample_folder):
    (run,) = load_runs([sample_folder / "attention"])
    assert (run.name, run.status, run.pattern, run.seed) == ("attention", "target", "2*(short_conv mha swiglu)", 0)
    assert run.scores()[1] == "test"
    assert run.figure("accuracy") == 0.9991
    steps, losses = run.series("train", "step", "loss")
    assert steps == sorted(steps)
    assert len(steps) == len(losses) == sum(line["split"] == "train" for line in run.metrics)


def test_a_run_without_result_tells_from_its_metrics(tmp_path):
    (run,) = load_runs([write_sample(tmp_path / "run", "mamba2", result=False)])
    assert (run.name, run.status, run.scores()[1]) == ("mamba2", "unfinished", "validation")
    last = [line for line in run.metrics if line["split"] == "validation"][-1]
    assert run.figure("accuracy") == last["accuracy"]
    assert run.figure("steps") == last["step"]
    assert run.figure("tokens_per_second") == pytest.approx(MODELS["mamba2"]["rate"], rel=0.02)
    assert run.figure("state_bytes") is None


def test_a_run_that_has_only_started_is_a_run(tmp_path):
    folder = write_sample(tmp_path / "run", result=False)
    (folder / "metrics.jsonl").unlink()
    (run,) = load_runs([folder])
    assert run.metrics == []
    assert run.figure("accuracy") is None


def test_a_half_written_last_line_is_left_out(tmp_path):
    folder = write_sample(tmp_path / "run", result=False)
    whole = load_runs([folder])[0].metrics
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99')
    assert load_runs([folder])[0].metrics == whole


def test_figures_that_are_no_finite_numbers_are_missing(tmp_path):
    strange = {"n_parameters": "many", "steps": True, "peak_memory_bytes": float("nan"), "test": None, "task": None}
    (run,) = load_runs([write_sample(tmp_path / "run", **strange)])
    assert run.figure("n_parameters") is None
    assert run.figure("peak_memory_bytes") is None
    assert run.scores()[1] == "validation"
    assert run.section("task")["name"] == "mqar"  # the config knows


def test_a_step_run_twice_counts_once(tmp_path):
    folder = write_sample(tmp_path / "run", result=False)
    lines = [(10, 1.0, 3.0), (20, 2.0, 2.0), (20, 2.5, 1.5), (30, 3.5, 1.0)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "split": "train", "seconds": s, "loss": loss}) + "\n" for n, s, loss in lines)
    )
    (run,) = load_runs([folder])
    assert run.series("train", "seconds", "loss") == ([1.0, 2.5, 3.5], [3.0, 1.5, 1.0])


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("result.json", b'{"name": "x", ', ["result.json", "damaged", "line 1", "resume"]),
        ("result.json", b"[]", ["result.json", "one JSON object", "list"]),
        ("result.json", b"\xff\xfe\x00", ["result.json", "UTF-8"]),
        ("metrics.jsonl", b'{"step": 1}\nnonsense\n{"step": 2}\n', ["metrics.jsonl", "line 2"]),
        ("metrics.jsonl", b"17\n", ["metrics.jsonl", "line 1", "JSON object"]),
        ("config.yaml", b"task: [unclosed\n", ["config.yaml", "damaged"]),
        ("config.yaml", b"just words", ["config.yaml", "mapping"]),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, file, content, says):
    folder = write_sample(tmp_path / "run")
    (folder / file).write_bytes(content)
    with pytest.raises(UsageError) as error:
        load_runs([folder])
    assert_one_line(error, *says)


def test_what_is_no_run_is_said_with_what_is_expected(tmp_path):
    folder = write_sample(tmp_path / "attention")
    (tmp_path / "empty").mkdir()
    for given, says in {
        "atention": ["atention", "nothing at", "Did you mean 'attention'"],
        "empty": ["empty", "holds no run", "config.yaml"],
        "attention/result.json": ["is a file", f"Did you mean {str(folder)!r}"],
    }.items():
        with pytest.raises(UsageError) as error:
            load_runs([tmp_path / given])
        assert_one_line(error, *says)
    with pytest.raises(UsageError, match="No run was given"):
        load_runs([])


def test_equal_names_are_told_apart_by_seed_or_by_folder(tmp_path):
    def names(*changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for i, change in enumerate(changes):
            write_sample(folder / f"run-{i}", **change)
        return labels(load_runs([folder]))

    assert names({"name": "a"}, {"name": "b"}) == ["a", "b"]
    assert names({"seed": 0}, {"seed": 1}) == ["attention (seed 0)", "attention (seed 1)"]
    assert names({}, {}) == ["attention (run-0)", "attention (run-1)"]


def test_names_are_printable_and_on_one_line(tmp_path):
    (run,) = load_runs([write_sample(tmp_path / "run", name="a\nb\x1b[31m")])
    assert run.name == "a b?[31m"


def assert_one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
