"""Reading run folders: whole, interrupted, damaged."""

from __future__ import annotations

import json

import pytest
from report_samples import MODELS, write_sample

from zoo.core.errors import UsageError
from zoo.report import load_runs
from zoo.report.groups import groups
from zoo.report.labels import labels
from zoo.statistics import t_interval


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


def test_equal_names_are_told_apart_by_settings_and_variants_by_their_recipe(tmp_path):
    for i, (seed, lr) in enumerate(((0, 1e-4), (1, 3e-2), (2, 1e-4))):
        write_sample(tmp_path / f"run-{i}", train={"lr": lr}, seed=seed)
    assert labels(load_runs([tmp_path])) == [
        "attention (lr=0.0001, seed 0)", "attention (lr=0.03, seed 1)", "attention (lr=0.0001, seed 2)",
    ]  # fmt: skip
    for recipe, pattern in (("h-lstm", "2*(lstm swiglu) gqa swiglu"), ("h-gru", "2*(gru swiglu) gqa swiglu")):
        write_sample(tmp_path / "v" / recipe / "base", name="base", model={"pattern": f"{pattern} {pattern}"})
    assert sorted(labels(load_runs([tmp_path / "v"]))) == ["h-gru/base", "h-lstm/base"]


def swept(folder, names="gqa"):
    """Nine runs: three learning rates, each with three seeds."""
    for lr, right in ((1e-3, (0.078, 0.08, 0.09)), (3e-3, (0.178, 0.2, 0.298)), (1e-2, (0.883, 0.9, 0.947))):
        for seed, accuracy in enumerate(right):
            own = names.format(seed=seed)
            train = {"lr": lr, "keep": 2 + seed, "checkpoint_seconds": 10.0 + seed, "seed": seed}
            write_sample(
                folder / f"{lr}-{seed}", name=own, train=train, seed=seed, test={"accuracy": accuracy, "n": 100}
            )
    return load_runs([folder])


@pytest.mark.parametrize("names", ["gqa", "hebb-s{seed}"])
def test_runs_are_grouped_by_all_of_their_config_but_name_folder_and_seed(tmp_path, names):
    found = groups(swept(tmp_path, names))
    assert [(len(group.runs), group.seeds) for group in found] == [(3, ["0", "1", "2"])] * 3
    which = "gqa" if names == "gqa" else "hebb-s0, hebb-s1, hebb-s2"
    assert sorted(group.label for group in found) == [f"{which} (lr={lr})" for lr in ("0.001", "0.003", "0.01")]
    best = next(group for group in found if "0.01" in group.label and "0.001" not in group.label)
    spread = best.over_seeds("accuracy")
    assert spread.interval == t_interval([0.883, 0.9, 0.947])
    assert spread.text() == (
        "accuracy 88.3% to 94.7% over 3 seeds, mean 91.0% (95% interval of Student's t 82.8% to 99.2%; "
        "each 88.3%, 90.0%, 94.7%)"
    )


def test_every_other_key_of_a_config_makes_a_group_of_its_own(tmp_path):
    write_sample(tmp_path / "same")
    for i, change in enumerate(
        (
            {"task": {"name": "mqar", "n_pairs": [2]}}, {"model": {"pattern": "mha"}}, {"train": {"steps": 9}},
            {"objective": {"name": "masked_diffusion"}}, {"train": {"steps": 9, "time_budget": 1.0}},
        )
    ):  # fmt: skip
        write_sample(tmp_path / str(i), seed=i, **change)
    found = groups(load_runs([tmp_path]))
    assert [len(group.runs) for group in found] == [1] * 6
    assert len({group.label for group in found}) == 6


def test_equal_values_of_all_seeds_have_no_interval(tmp_path):
    for seed in range(3):
        write_sample(tmp_path / str(seed), seed=seed, test={"accuracy": 0.0})
    (group,) = groups(load_runs([tmp_path]))
    assert group.over_seeds("accuracy").text() == "accuracy 0.0% in each of 3 seeds"


def test_one_seed_twice_is_one_value_and_what_has_not_ended_is_none(tmp_path):
    for i, (seed, accuracy) in enumerate(((0, 0.5), (0, 0.7), (1, 0.8))):
        write_sample(tmp_path / str(i), seed=seed, test={"accuracy": accuracy})
    write_sample(tmp_path / "cut", seed=2, test={"accuracy": 0.1}, status="interrupted")
    (group,) = groups(load_runs([tmp_path]))
    assert group.seeds == ["0", "1", "2"]
    assert sorted(group.over_seeds("accuracy").values) == pytest.approx([0.6, 0.8])


def test_names_are_printable_and_on_one_line(tmp_path):
    (run,) = load_runs([write_sample(tmp_path / "run", name="a\nb\x1b[31m")])
    assert run.name == "a b?[31m"


def assert_one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
