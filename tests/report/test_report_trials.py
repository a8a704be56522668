"""Trials compared: groups, choice of a best value, differences, what enters a mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import polars as pl
import pytest
from report_samples import write_sample
from report_trials import BEST_LR, PROBLEMS, write_sweep

from zoo.cli import main
from zoo.core.errors import UsageError
from zoo.report import gather
from zoo.report.trials import board, charts, compare, from_runs, from_sweep, together, words
from zoo.report.trials.charts import over_seeds
from zoo.report.trials.groups import row_values
from zoo.report.trials.source import RowFigures, Trials, varying
from zoo.statistics import Scores, binomial_interval, difference, estimate, holm, t_interval
from zoo.statistics.scores import Rows
from zoo.sweeps.defaults import with_defaults
from zoo.sweeps.store import table

LRS, SEEDS = (1e-3, BEST_LR), (0, 1, 2)


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep") / "grid", ("gqa", "lstm", "hgrn2"), LRS, SEEDS)


@pytest.fixture(scope="module")
def trials(grid) -> Trials:
    return from_sweep(grid)


def row_of(trials: Trials, word: str, lr: float, seed: int):
    return next(
        row
        for row in trials.rows
        if (row["set.words.mixer"], row["set.train.lr"], row["seed"]) == (word, lr, seed) and row["stage"] != "choose"
    )


def of(comparison, *names):
    return next(group for group in comparison.groups if group.names == names)


def test_a_group_is_the_repeats_of_one_configuration(trials):
    comparison = compare(trials)
    assert comparison.by == ("words.mixer", "train.lr")  # all that was swept but the seed
    assert len(comparison.groups) == 6
    group = of(comparison, "gqa", "0.003")
    figures = [row_of(trials, "gqa", BEST_LR, seed)["test.accuracy"] for seed in SEEDS]
    assert group.scores.figures.tolist() == pytest.approx(figures)
    assert group.estimate.mean == pytest.approx(fmean(figures))
    assert group.estimate.over == "seeds and problems"
    assert group.scores.n_problems == PROBLEMS
    assert group.split == "test"
    means = [g.estimate.mean for g in comparison.groups if not g.learning.none]
    assert means == sorted(means, reverse=True)


def test_what_is_no_repeat_is_never_called_one(trials):
    """Three seeds at two rates are no six seeds: a group in which anything else differs is refused, by its name."""
    with pytest.raises(UsageError, match=r"differ in train\.lr too.*--by words\.mixer,train\.lr.*--best train\.lr"):
        compare(trials, ["words.mixer"])


def test_every_seed_chooses_on_the_others(tmp_path):
    """Seed 0 looks best at 0.001 to itself alone; the others, that decide for it, are best at 0.003."""
    changes = {
        ("gqa", 1e-3, 0): {"validation.accuracy": 0.999},
        ("gqa", BEST_LR, 0): {"validation.accuracy": 0.0},  # with its own figures, even the mean of all would be lower
    }
    trials = from_sweep(write_sweep(tmp_path / "s", ["gqa"], LRS, SEEDS, changes=changes))
    (group,) = compare(trials, ["words.mixer"], best=["train.lr"]).groups
    assert group.choice.how == "the other seeds"
    assert group.choice.n == 2
    assert group.choice.values[0] == "0.003"
    own = [row_of(trials, "gqa", float(group.choice.values[seed]), seed)["test.accuracy"] for seed in SEEDS]
    assert group.scores.figures.tolist() == pytest.approx(own)


def test_test_figures_choose_nothing(tmp_path):
    """A rate that is best on test, and worst on validation, is not taken."""
    changes = {("gqa", 1e-3, seed): {"test.accuracy": 1.0, "validation.accuracy": 0.0} for seed in SEEDS}
    trials = from_sweep(write_sweep(tmp_path / "s", ["gqa"], LRS, SEEDS, changes=changes))
    (group,) = compare(trials, best=["lr"]).groups  # `lr` for `train.lr`
    assert set(group.choice.values.values()) == {"0.003"}
    assert group.estimate.mean < 1


def test_one_seed_says_that_its_choice_is_not_independent(tmp_path):
    comparison = compare(from_sweep(write_sweep(tmp_path / "s", ["gqa"], LRS, [0])), best=["train.lr"])
    assert comparison.groups[0].choice.how == "the same seed"
    assert any("not independent" in note for note in words.notes(comparison))
    assert any("one seed" in caveat.lower() for caveat in words.caveats(comparison))
    assert comparison.groups[0].estimate.over == "problems"


def test_a_stage_of_choice_has_seeds_of_its_own(tmp_path):
    trials = from_sweep(write_sweep(tmp_path / "s", ["gqa", "lstm"], LRS, SEEDS, choose_seeds=(100, 101)))
    comparison = compare(trials)
    assert comparison.by == ("words.mixer",)
    assert comparison.best == ("train.lr",)  # as the sweep says
    group = of(comparison, "gqa")
    assert set(group.scores.seeds) == set(SEEDS)
    assert (group.choice.n, group.choice.how) == (2, "seeds of its own")
    assert any("seeds of its own (100, 101)" in note for note in words.notes(comparison))


def test_sweeps_that_chose_differently_have_no_common_mean(trials, tmp_path):
    chosen = write_sweep(tmp_path / "s", ["gqa", "lstm", "hgrn2"], LRS, SEEDS, choose_seeds=(100, 101))
    with pytest.raises(UsageError, match=r"Seed 0 has results at several values of train\.lr \(0\.001, 0\.003\)"):
        compare(together([from_sweep(chosen), trials]), ["words.mixer"])


def test_a_smaller_loss_is_better(trials):
    comparison = compare(trials, best=["train.lr"], metric="loss")
    assert comparison.lower
    means = [g.estimate.mean for g in comparison.groups]
    assert means == sorted(means)
    assert comparison.groups[0].estimate.over == "seeds"  # of a loss no rows are known
    assert comparison.groups[0].split == "validation"


def test_trials_that_did_not_end_enter_no_mean(tmp_path):
    changes = {
        ("gqa", BEST_LR, 1): {"status": "pruned", "validation.accuracy": 0.9},
        ("gqa", BEST_LR, 2): {"status": "failed", "reason": "out of memory", "validation.accuracy": None},
    }
    trials = from_sweep(write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], range(5), changes=changes))
    comparison = compare(trials)
    group = comparison.groups[0]
    assert list(group.scores.seeds) == [0, 3, 4]
    assert list(compare(trials, metric="loss").groups[0].scores.seeds) == [0, 3, 4]  # of which a stopped one has one
    assert group.endings == {"steps": 3, "stopped by ASHA": 1, "failed": 1}
    told = words.caveats(comparison)
    assert "1 of 5 trials were stopped by ASHA, and enter no mean." in told
    assert "1 of 5 trials failed, and enter no mean (out of memory)." in told


def test_a_seed_whose_choice_did_not_end_is_named(tmp_path):
    changes = {("gqa", BEST_LR, 1): {"status": "failed", "reason": "x"}}
    comparison = compare(from_sweep(write_sweep(tmp_path / "s", ["gqa"], LRS, SEEDS, changes=changes)), best=["lr"])
    assert comparison.groups[0].choice.lost == (1,)
    assert any("no figure of seed 1" in caveat for caveat in words.caveats(comparison))


def test_seeds_that_did_not_learn_are_a_share_and_stay_in_the_mean(tmp_path):
    changes = {("gqa", BEST_LR, 1): {"test.accuracy": 0.05}}
    changes |= {("hgrn2", BEST_LR, seed): {"state_bytes": 1} for seed in SEEDS}
    trials = from_sweep(write_sweep(tmp_path / "s", ["gqa", "hgrn2"], [BEST_LR], SEEDS, changes=changes))
    group = of(compare(trials, ["words.mixer"], learned="0.5"), "gqa")
    assert group.learning.text == "1 of 3"
    assert 0.05 in group.scores.figures
    never = of(compare(trials, ["words.mixer"]), "hgrn2")  # by the interval over problems, against chance
    assert never.learning.none
    last = board.lines(compare(trials, ["words.mixer"]))[1][-1]
    assert (last[0].value, last[0].text) == (None, "not learned")  # no score, and the last place
    assert not any(cell.best for cell in last)  # nor is the smallest state its merit


def test_a_seed_that_diverged_counts_as_not_learned(tmp_path):
    failed = {"status": "failed", "reason": "The loss became nan by step 3: try more. None.", "diverged": True}
    changes = {("gqa", BEST_LR, 1): failed, ("gqa", BEST_LR, 2): {**failed, "diverged": False}}
    changes |= {("lstm", BEST_LR, seed): failed for seed in SEEDS}
    trials = from_sweep(write_sweep(tmp_path / "s", ["gqa", "lstm"], [BEST_LR], SEEDS, changes=changes))
    comparison = compare(trials, ["words.mixer"], baseline="gqa")
    assert of(comparison, "gqa").learning.text == "1 of 2"  # of seed 2 it is not known
    assert of(comparison, "lstm").learning.text == "3 of 3"
    assert board.lines(comparison)[1][1][0].text == "not learned"
    assert "4 of these diverged: such a seed counts as one that did not learn." in words.caveats(comparison)
    assert "(The loss became nan by step 3: try more)" in " ".join(words.caveats(comparison))


def test_a_group_that_has_not_learned_has_no_difference(trials):
    comparison = compare(trials, ["words.mixer"], best=["train.lr"], baseline="hgrn2")
    assert all(board.gap_cells(comparison, gap)[:2] == ["baseline\nnot learned", "—"] for gap in comparison.gaps)
    comparison = compare(trials, ["words.mixer"], best=["train.lr"], baseline="gqa")
    texts = {gap.group.names: board.gap_cells(comparison, gap)[0] for gap in comparison.gaps}
    assert texts[("hgrn2",)] == "not learned"
    assert texts[("lstm",)].startswith("-")


def test_trials_that_were_not_started_are_counted(tmp_path):
    folder = write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], SEEDS)
    with (folder / "sweep.yaml").open("a") as file:
        file.write("trials: 8\n")
    assert "5 of 8 trials have not been started." in words.caveats(compare(from_sweep(folder)))


def test_a_share_of_exact_answers_has_a_chance_too(tmp_path):
    zero = {("gqa", BEST_LR, seed): {"test.exact": 0.0} for seed in SEEDS}
    trials = from_sweep(write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], SEEDS, changes=zero))
    wrong = trials.frames["problems"].with_columns(exact=pl.lit(0.0))
    comparison = compare(Trials("s", {**trials.frames, "problems": wrong}, trials.swept), metric="exact")
    assert comparison.chance == 0
    assert of(comparison, "gqa", f"{BEST_LR:g}").learning.none


def test_equal_answers_prove_no_equality():
    rows = Rows(np.ones((3, 50)), np.arange(50))
    same = difference(Scores([0, 1, 2], np.ones(3), rows), Scores([0, 1, 2], np.ones(3), rows))
    most = binomial_interval(0, 50).high
    assert (same.mean, same.p, same.interval) == (0, 1, (-most, most))


def test_stopped_by_the_clock_is_no_score(tmp_path):
    changes = {("hgrn2", BEST_LR, seed): {"status": "time_budget"} for seed in SEEDS}
    comparison = compare(from_sweep(write_sweep(tmp_path / "s", ["hgrn2"], [BEST_LR], SEEDS, changes=changes)))
    assert board.lines(comparison)[1][0][0].text == "stopped by\nthe clock"
    assert any("stopped by the clock" in caveat for caveat in words.caveats(comparison))


def test_chance_is_of_the_task_where_trials_do_not_have_it(tmp_path):
    changes = {("gqa", BEST_LR, seed): {"chance": None} for seed in SEEDS}
    task = {"task.name": "mqar", "task.vocab_size": 64, "task.seq_len": 32, "task.n_pairs": "[2, 4]"}
    folder = write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], SEEDS, config=task, changes=changes)
    comparison = compare(from_sweep(folder))
    assert comparison.chance == pytest.approx(1 / 32, abs=0.02)  # values are the upper half of 64 tokens
    assert comparison.groups[0].learning.text == "0 of 3"


def test_without_chance_nothing_is_said_of_learning(tmp_path):
    changes = {("gqa", BEST_LR, seed): {"chance": None, "config.task.name": "gone"} for seed in SEEDS}
    comparison = compare(from_sweep(write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], SEEDS, changes=changes)))
    assert comparison.groups[0].learning.n == 0
    assert comparison.chance is None
    assert any("--learned" in note for note in words.notes(comparison))


def test_differences_are_paired_and_corrected(trials):
    comparison = compare(trials, ["words.mixer"], best=["train.lr"], baseline="lstm")
    assert [gap.baseline.names for gap in comparison.gaps] == [("lstm",)] * 2
    gqa, lstm = of(comparison, "gqa"), of(comparison, "lstm")
    gap = next(gap for gap in comparison.gaps if gap.group is gqa)
    expected = difference(gqa.scores, lstm.scores, 0.975)  # two differences: 0.05 / 2
    assert gap.difference == expected
    assert gap.difference.paired == ("seed", "problem")
    assert gap.p == holm([each.difference.p for each in comparison.gaps])[comparison.gaps.index(gap)]
    assert comparison.baseline is lstm


def with_errors(trials: Trials) -> Trials:
    """The trials with squared errors, whose differences are those of the shares of wrong answers."""
    errors = trials.frames["problems"].with_columns(mse=1 - pl.col("accuracy"), trivial_mse=pl.lit(0.5))
    errors = errors.with_columns(accuracy=pl.lit(None, pl.Float64), exact=pl.lit(None, pl.Float64))
    means = errors.group_by("trial").agg(
        pl.mean("mse").alias("test.mse"), pl.mean("trivial_mse").alias("test.trivial_mse")
    )
    rows = (
        trials.frames["trials"]
        .join(means, "trial", "left")
        .with_columns((pl.col("test.mse") / 0.5).alias("test.mse_ratio"))
    )
    return Trials("errors", {**trials.frames, "trials": rows, "problems": errors}, trials.swept)


def test_errors_are_paired_by_problem_as_accuracy_is(trials):
    errors = with_errors(trials)
    right, wrong, ratio = (
        compare(given, ["words.mixer"], best=["train.lr"], baseline="lstm", metric=metric).gaps[0].difference
        for given, metric in ((trials, "accuracy"), (errors, "mse"), (errors, "mse_ratio"))
    )
    assert wrong.paired == ratio.paired == ("seed", "problem")
    assert wrong.n_problems == PROBLEMS
    assert wrong.p == pytest.approx(right.p)
    assert ratio.p == pytest.approx(right.p)
    assert wrong.interval == pytest.approx([-right.interval.high, -right.interval.low], abs=0.02)
    assert ratio.interval == pytest.approx([2 * edge for edge in wrong.interval])


def test_a_ratio_of_errors_varies_as_the_trivial_ones_do():
    random = np.random.default_rng(0)
    trivial = random.uniform(0.1, 2, 400)
    values = row_values(RowFigures(np.arange(400), {"mse": 0.3 * trivial, "trivial_mse": trivial}), "mse_ratio")
    assert values == pytest.approx(0.3)  # a model that removes the same share of every error: nothing is uncertain
    errors = random.uniform(0, 1, 400)
    values = row_values(RowFigures(np.arange(400), {"mse": errors, "trivial_mse": trivial}), "mse_ratio")
    assert values.mean() == pytest.approx(errors.mean() / trivial.mean())
    drawn = random.integers(400, size=(4000, 400))
    ratios = errors[drawn].mean(1) / trivial[drawn].mean(1)
    assert values.std() / 20 == pytest.approx(ratios.std(), rel=0.1)


def test_an_error_is_learned_below_the_trivial_predictor_and_ends_at_0(trials):
    comparison = compare(with_errors(trials), ["words.mixer"], best=["train.lr"], metric="mse")
    assert comparison.chance == 0.5
    assert "trivial 0.5" in board.columns(comparison)[0].title
    assert of(comparison, "gqa").learning.text == "0 of 3"
    assert of(comparison, "hgrn2").learning.none
    assert comparison.groups[-1].names == ("hgrn2",)
    wild = Scores([0, 1, 2], np.array([0.4, 0.4, 1.2]))
    assert estimate(wild, share=False, positive=True).interval.low == 0 > estimate(wild, share=False).interval.low


def test_a_baseline_among_two_keys_is_met_at_the_same_other_value(trials):
    comparison = compare(trials, baseline="lstm")
    assert len(comparison.gaps) == 4
    assert all(gap.group.names[1] == gap.baseline.names[1] for gap in comparison.gaps)
    assert comparison.baseline is None


def test_layers_that_are_one_are_one_row(tmp_path):
    """At width 64 mha, gqa and mqa have one head each."""
    sizes = {"parameters": 5, "state_bytes": 6, "flops_per_token": 7}
    changes = {(word, BEST_LR, seed): sizes for word in ("gqa", "mha", "lstm") for seed in SEEDS}
    folder = write_sweep(tmp_path / "s", ["gqa", "mha", "lstm"], [BEST_LR], SEEDS, changes=changes)
    comparison = compare(from_sweep(folder), ["words.mixer"], baseline="mha")
    assert {group.label for group in comparison.groups} == {"gqa = mha", "lstm"}
    assert [gap.group.label for gap in comparison.gaps] == ["lstm"]
    assert len(of(comparison, "gqa = mha").scores.seeds) == 3  # of each seed the mean of both


def test_rows_that_differ_from_seed_to_seed_leave_the_interval_over_seeds(trials):
    shifted = trials.frames["problems"].with_columns(problem=pl.col("problem") + pl.col("trial"))
    other = Trials(trials.name, {**trials.frames, "problems": shifted}, trials.swept)
    group = compare(other, ["words.mixer"], best=["train.lr"]).groups[0]
    assert group.estimate.over == "seeds"
    assert group.estimate.interval == pytest.approx(np.clip(t_interval(group.scores.figures), 0, 1))


def test_several_sweeps_are_one_comparison(grid, tmp_path):
    other = write_sweep(tmp_path / "other", ["gla"], LRS, SEEDS)
    both = together([from_sweep(grid), from_sweep(other)])
    assert len(both.rows) == 24
    comparison = compare(both, ["words.mixer"], best=["train.lr"])
    alone = compare(from_sweep(other), best=["train.lr"])
    assert of(comparison, "gla").scores.figures.tolist() == alone.groups[0].scores.figures.tolist()
    assert of(comparison, "gla").scores.n_problems == PROBLEMS


def test_different_tasks_are_told(tmp_path):
    folders = [write_sweep(tmp_path / str(n), ["gqa"], [BEST_LR], SEEDS, config={"task.n_pairs": n}) for n in (4, 6)]
    both = together([from_sweep(folder) for folder in folders])
    with pytest.raises(UsageError, match=r"differ in task\.n_pairs"):
        compare(both, ["words.mixer"])
    told = words.caveats(compare(both, ["task.n_pairs"]))
    assert told[0].startswith("The trials are of different tasks")


def test_ordinary_runs_compare_by_any_key(tmp_path):
    for seed in SEEDS:
        for like in ("attention", "lstm"):
            folder = write_sample(tmp_path / f"{like}-{seed}", like, seed=seed)
            path = folder / "config.yaml"
            path.write_text(path.read_text().replace("seed: 0", f"seed: {seed}"))
    found = gather([tmp_path], print)
    comparison = compare(from_runs(found.runs), ["model.pattern"])
    assert [len(group.scores.seeds) for group in comparison.groups] == [3, 3]
    assert comparison.groups[0].estimate.over == "seeds"
    assert compare(from_runs(found.runs)).by == ("name",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": ["words.mixr"]}, "Did you mean 'words.mixer'"),
        ({"by": ["train.seed"]}, "means over seeds"),
        ({"best": ["train.lrs"]}, "Did you mean 'train.lr'"),
        ({"by": ["words.mixer", "train.lr"], "best": ["train.lr"]}, "told apart by it"),
        ({"best": ["train.seed"]}, "a seed is no setting"),
        ({"baseline": "gqqa"}, "Did you mean 'gqa'"),
        ({"metric": "acuracy"}, "Did you mean 'accuracy'"),
        ({"learned": "well"}, "chance"),
    ],
)
def test_wrong_input_is_one_line(trials, arguments, message):
    with pytest.raises(UsageError, match=message) as refused:
        compare(trials, **arguments)
    assert "\n" not in str(refused.value)


def test_a_mean_curve_keeps_those_that_met_their_target():
    def curve(steps, values):
        return pl.DataFrame(
            {"split": "validation", "step": steps, "tokens": [10 * s for s in steps], "accuracy": values}
        )

    early, late = curve([1, 2], [0.5, 1.0]), curve([1, 2, 3], [0.1, 0.2, 0.4])
    met = over_seeds([(early, True), (late, False)], "accuracy")
    assert [(x, y) for x, y, _ in met] == [(10, pytest.approx(0.3)), (20, pytest.approx(0.6)), (30, pytest.approx(0.7))]
    assert met[-1][2] == pytest.approx(t_interval([1.0, 0.4]))
    assert [x for x, _, _ in over_seeds([(early, False), (late, False)], "accuracy")] == [10, 20]
    assert over_seeds([], "accuracy") == []


# ---- through the command


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_command_prints_a_row_a_group(capsys, grid, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, grid, "--by", "words.mixer", "--best", "train.lr", "--baseline", "lstm")
    assert status == 0
    assert max(len(line) for line in out.splitlines() if not line.endswith(".")) <= 80  # all but sentences
    assert "(chance 5.0%)" in out
    assert "not learned" in out
    assert "for each seed chosen on the other seeds" in out
    assert "paired by seed and problem" in out
    assert err == ""
    for part in ("words.mixer", "params", "state", "KiB"):
        assert part in out


def test_the_command_as_json(capsys, grid):
    status, out, _ = run(capsys, grid, "--by", "words.mixer", "--best", "train.lr", "--baseline", "lstm", "--json")
    found = json.loads(out)
    first = found["groups"][0]
    assert status == 0
    assert first["words.mixer"] == "gqa"
    assert len(first["figures"]) == len(first["seeds"]) == 3
    assert first["low"] < first["mean"] < first["high"]
    assert first["best"] == dict.fromkeys("012", "0.003")
    assert found["differences"][0]["baseline"] == ["lstm"]


def test_the_command_answers_sql(capsys, grid):
    pytest.importorskip("duckdb")
    text = 'select "set.words.mixer" word, count(*) n from trials group by word order by word'
    status, out, _ = run(capsys, grid, "--sql", text)
    assert status == 0
    assert "lstm" in out
    _, out, _ = run(capsys, grid, "--sql", text, "--json")
    assert json.loads(out)[0] == {"word": "gqa", "n": 6}
    status, _, err = run(capsys, grid, "--sql", "copy trials to 'x.csv'")
    assert (status, err.count("\n")) == (2, 1)
    status, _, err = run(capsys, grid, "--sql", "select 1", "--by", "words.mixer")
    assert (status, err.count("\n")) == (2, 1)


def test_a_folder_of_runs_and_a_sweep(capsys, grid, tmp_path):
    """The trials of a sweep, run folders as they are, are not listed one by one."""
    trial = write_sample(tmp_path / "sweep" / "trials" / "00000")
    assert trial.is_dir()
    write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], SEEDS)
    (tmp_path / "s" / "sweep.yaml").rename(tmp_path / "sweep" / "sweep.yaml")
    (tmp_path / "s" / "store").rename(tmp_path / "sweep" / "store")
    write_sample(tmp_path / "lone")
    found = gather([tmp_path], print)
    assert [run.path.name for run in found.runs] == ["lone"]
    assert [trials.name for trials in found.sweeps] == ["sweep"]
    status, out, _ = run(capsys, tmp_path)
    assert status == 0
    assert "3 trials in 1 group" in out
    assert "attention" in out


def test_warnings_are_told_in_the_terminal(capsys, tmp_path):
    """Of runs of two tasks, of which one has no test figures, on two machines."""
    one = write_sample(tmp_path / "one")
    two = write_sample(tmp_path / "two", "lstm", test=None, machine={"cpu": "another CPU", "threads": 2})
    result = two / "result.json"
    result.write_text(result.read_text().replace('"vocab_size": 256', '"vocab_size": 64'))
    _, _, err = run(capsys, one, two)
    assert "different tasks" in err
    assert "validation" in err
    assert "different machines" in err


def test_a_damaged_store_is_one_line(capsys, grid, tmp_path):
    folder = write_sweep(tmp_path / "s", ["gqa"], [BEST_LR], SEEDS)
    (folder / "store" / "trials.parquet").write_bytes(b"no parquet")
    status, _, err = run(capsys, folder)
    assert status == 2
    assert all(line.startswith(("Left out: ", "zoo: ")) for line in err.splitlines())


def test_scores_of_trials_are_those_of_the_store(trials):
    row = row_of(trials, "gqa", BEST_LR, 0)
    tests = trials.tests(row["trial"])
    assert tests.figures["accuracy"].mean() == pytest.approx(row["test.accuracy"])
    scores = Scores([0], np.array([row["test.accuracy"]]), Rows(tests.figures["accuracy"][None], tests.problem))
    assert scores.n_problems == PROBLEMS


def test_the_plots_of_an_error_do_not_go_below_0_and_name_no_front(trials):
    comparison = compare(trials, ["words.mixer"], best=["train.lr"], metric="loss")
    drawn = {chart.name: chart for chart in charts.charts(comparison, charts.rows_of(comparison, "t"))}
    assert min(low for series in drawn["t-curves"].panels[0].series for low in series.low) >= 0
    assert "Pareto" not in str(drawn.get("t-cost", ""))
    shares = compare(trials, ["words.mixer"], best=["train.lr"])
    assert any("Pareto" in str(chart) for chart in charts.charts(shares, charts.rows_of(shares, "t")))


def test_a_trial_of_an_earlier_version_has_the_defaults_of_options_that_came_later():
    earlier = {"config.objective.name": "next_token", "config.task.name": "mqar", "config.task.n_pairs": 4}
    later = earlier | {"config.train.cuda_graphs": False, "config.task.n_passes": 1, "config.model.causal": True}

    def differ(*rows):
        return varying(with_defaults(table(rows, {})).to_dicts())

    assert differ(earlier, later) == []
    assert differ(earlier, later | {"config.train.cuda_graphs": True}) == ["train.cuda_graphs"]
    assert differ(earlier, later | {"config.task.n_passes": 2}) == ["task.n_passes"]
    given = {"config.train.threads": 1}  # where nothing is given, this may have been given
    assert differ(earlier, earlier | given) == differ(earlier | {"config.train.threads": None}, earlier | given)
    assert differ(earlier, earlier | given) == ["train.threads"]
