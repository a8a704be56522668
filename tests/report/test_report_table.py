"""The table in all its forms, and the words about it."""

from __future__ import annotations

import csv
import io
import json

import pytest
from report_samples import write_sample
from rich.console import Console

from zoo import cli
from zoo.core.errors import UsageError
from zoo.report import (
    load_runs,
    markdown,
    pareto_front,
    rows,
    save_plots,
    table,
    to_csv,
    units,
    words,
    write_report,
)
from zoo.report.leaderboard import csv_lines
from zoo.report.page import render


def drawn(runs, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(runs))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_and_is_whole(sample_runs, width):
    text = drawn(sample_runs, width)
    assert all(len(line) <= width for line in text.splitlines())
    for part in ("99.9%", "60.6 s", "130 KiB", "2,890", "364 MiB", "412k", "gated-deltanet"):
        assert part in text
    assert "…" not in text


def test_the_table_survives_long_names_at_80_columns(tmp_path):
    write_sample(tmp_path / "a", name="a-name-that-is-much-longer-than-its-column", status="interrupted")
    text = drawn(load_runs([tmp_path]), 80)
    assert "364 MiB" in text
    assert "interrupted" in text


def test_rows_are_sorted_by_accuracy_then_time(tmp_path):
    for name, accuracy, seconds in (("slow", 0.9, 30), ("best", 0.95, 50), ("fast", 0.9, 20), ("never", 0.9, None)):
        write_sample(tmp_path / name, name=name, test={"accuracy": accuracy}, seconds_to_target=seconds)
    write_sample(tmp_path / "none", name="none", test=None, validation=None)
    (tmp_path / "none" / "metrics.jsonl").unlink()
    assert [row["name"] for row in rows(load_runs([tmp_path]))] == ["best", "fast", "slow", "never", "none"]


def test_rows_are_plain_data(sample_runs):
    data = rows(sample_runs)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    first = data[0]
    assert first["name"] == "attention"
    assert first["accuracy"] == 0.9991
    assert first["state_bytes"] == 133_120
    assert first["split"] == "test"


def test_markup_in_names_stays_text(tmp_path):
    write_sample(tmp_path / "a", name="[red]a[/red]")
    write_sample(tmp_path / "b", name="b|*c*<i>", model={"pattern": "(mamba2 | gqa) swiglu"})
    runs = load_runs([tmp_path])
    assert "[red]a[/red]" in drawn(runs)
    text = markdown(runs)
    assert r"b\|\*c\*&lt;i>" in text
    assert r"`(mamba2 \| gqa) swiglu`" in text
    cells = [line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(cells)) == 1


def test_columns_without_data_are_left_out_and_steps_stand_in_for_the_time_to_target(tmp_path):
    write_sample(tmp_path / "a", seconds_to_target=None, decode_tokens_per_second=None)
    head = markdown(load_runs([tmp_path])).splitlines()[0]
    assert "decode" not in head
    assert "time to target" not in head
    assert "steps" in head


def test_the_best_of_each_column_is_marked_and_equals_share_it(sample_runs):
    lines = {line.split("|")[1].strip(): line for line in markdown(sample_runs).splitlines() if line.startswith("| ")}
    assert "**99.9%**" in lines["attention"]  # 99.91% and 99.86% read alike
    assert "**99.9%**" in lines["gated-deltanet"]
    assert "**2 KiB**" in lines["lstm"]
    assert "**35.2k**" in lines["window"]
    assert "**" not in markdown(sample_runs[:1])


def test_csv_reads_back_as_the_rows(tmp_path):
    write_sample(tmp_path / "a", name='a "quoted", name')
    write_sample(tmp_path / "b", result=False)
    runs = load_runs([tmp_path])
    data = list(csv.DictReader(io.StringIO(to_csv(runs), newline="")))
    assert data == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows(runs)]


def test_pareto_front():
    points = [(4, 0.9), (1, 0.3), (2, 0.7), (3, 0.6), (8, 0.9), (2, 0.5), (4, 0.9)]
    assert [points[i] for i in pareto_front(points)] == [(1, 0.3), (2, 0.7), (4, 0.9), (4, 0.9)]
    assert pareto_front([]) == []

    def beaten(i):
        (x, y) = points[i]
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)

    assert sorted(pareto_front(points)) == [i for i in range(len(points)) if not beaten(i)]


def test_the_summary_names_the_best_the_soonest_and_the_smallest(sample_runs):
    assert words.summary(sample_runs) == (
        "attention and gated-deltanet answer best, with 99.9% right on 3,000 unseen test examples; the other 3 reach "
        "31.2% to 99.5%. attention is soonest at the target (60.6 s), and lstm carries the smallest state "
        "(2 KiB, at 31.2% accuracy)."
    )
    (alone,) = (run for run in sample_runs if run.name == "lstm")
    assert words.summary([alone]) == (
        "lstm answers 31.2% right on 3,000 unseen test examples. It carries a state of 2 KiB."
    )


def test_what_does_not_compare_is_said(tmp_path):
    write_sample(tmp_path / "a", name="a")
    write_sample(tmp_path / "b", name="b", task={"name": "sudoku"}, machine={"cpu": "another"})
    write_sample(tmp_path / "c", name="c", status="interrupted", test=None)
    text = " ".join(words.caveats(load_runs([tmp_path])))
    for part in ("different tasks", "different machines", "c: accuracy on validation", "c: interrupted"):
        assert part in text
    assert words.caveats(load_runs([tmp_path / "a"])) == []


def test_seeds_are_counted_within_one_config_and_lone_seeds_are_named(tmp_path):
    for lr in (1e-3, 1e-2):
        for seed, accuracy in enumerate((0.9, 0.92)):
            write_sample(tmp_path / f"{lr}-{seed}", "lstm", train={"lr": lr}, seed=seed, test={"accuracy": accuracy})
    runs = load_runs([tmp_path])
    assert len(words.spreads(runs)) == 2
    assert all("over 2 seeds" in text for text in words.spreads(runs))
    assert words.repeats(runs) == ""
    write_sample(tmp_path / "alone", "window")
    runs = load_runs([tmp_path])
    assert words.repeats(runs) == "window: one seed: small differences may be luck"
    assert words.repeats(load_runs([tmp_path / "alone"])) == ""
    assert words.repeats([run for run in runs if run.seed == 0 or run.name == "window"]).startswith("One seed each")
    best, *_ = words.highlights([run for run in runs if run.name == "lstm"])
    assert best.value == "91.0%"  # the mean over seeds, and not the luckiest of them
    assert "mean of 2 seeds" in best.remark


def test_runs_that_the_clock_stopped_are_shown_as_such(tmp_path):
    write_sample(tmp_path / "a", "lstm", status="time_budget")
    write_sample(tmp_path / "b", "attention")
    runs = load_runs([tmp_path])
    assert "lstm (stopped by the clock)" in markdown(runs)
    assert "stopped by the" in drawn(runs)
    assert "lstm: stopped by the clock" in " ".join(words.caveats(runs))


def test_threads_of_one_machine_are_not_different_machines(tmp_path):
    for n in (1, 2):
        write_sample(tmp_path / str(n), name=str(n), machine={"cpu": "one", "threads": n})
    assert words.caveats(load_runs([tmp_path])) == [
        "The runs are from one machine with different numbers of threads (1, 2): compare no times."
    ]
    write_sample(tmp_path / "3", name="3", machine={"cpu": "two", "threads": 2})
    assert any("different machines" in text for text in words.caveats(load_runs([tmp_path])))


def test_one_model_under_two_names_is_said(tmp_path):
    for name, pattern in (("a", "2*(mha swiglu)"), ("b", "2*(mqa swiglu)"), ("c", "2*(mha(n_heads=4) swiglu)")):
        sizes = {"n_parameters": 1, "state_bytes": 2, "flops_per_token": 3}
        write_sample(tmp_path / name, name=name, model={"pattern": pattern, "d_model": 64}, **sizes)
    assert words.caveats(load_runs([tmp_path])) == ["a and b are the same layers under other names."]


def test_rows_problems_and_the_interval_over_them_are_shown(tmp_path):
    certain = {"accuracy": 0.9, "exact": 0.5, "n_rows": 2000, "n_problems": 15, "exact_low": 0.41, "exact_high": 0.6}
    write_sample(tmp_path / "a", test=certain)
    runs = load_runs([tmp_path])
    assert "(2,000 rows, 15 problems up to the task's symmetry)" in markdown(runs)
    assert "50.0% (41.0 to 60.0)" in markdown(runs)
    assert "41.0 to 60.0" in drawn(runs, 80)
    assert {k: rows(runs)[0][k] for k in certain} == certain


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\r", "\n"])
def test_a_pattern_with_any_end_of_a_line_is_one_line_of_the_csv(tmp_path, mark):
    write_sample(tmp_path / "a", model={"pattern": f"mha{mark}swiglu"})
    write_sample(tmp_path / "b", "lstm")
    runs = load_runs([tmp_path])
    assert len(csv_lines(runs)) == 3
    assert "".join(csv_lines(runs)) == to_csv(runs)
    assert "leaderboard" in render(runs)


def test_what_takes_runs_takes_their_folders(tmp_path):
    write_sample(tmp_path / "a")
    runs = load_runs([tmp_path])
    for function in (markdown, rows, to_csv):
        assert function([tmp_path]) == function(str(tmp_path)) == function(runs)
    assert save_plots([str(tmp_path)], tmp_path / "pictures", formats=["svg"])
    assert write_report([tmp_path], tmp_path / "report.html", ask_models=False).exists()
    with pytest.raises(UsageError, match="nothing at"):
        save_plots([tmp_path / "none"], tmp_path / "pictures")


def test_compare_warns_in_the_terminal_as_the_page_does(tmp_path, capsys):
    write_sample(tmp_path / "a", name="a", task={"name": "mqar", "n_pairs": 4})
    write_sample(tmp_path / "b", name="b", task={"name": "mqar", "n_pairs": 6}, test=None, status="time_budget")
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", str(tmp_path), *more])
        assert ended.value.code in (0, None)
        shown = capsys.readouterr()
        for told in words.caveats(load_runs([tmp_path])):
            assert told in shown.err.splitlines()
        assert "One seed each: small differences may be luck." in shown.err
        assert not more or json.loads(shown.out)
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "a"), "--no-answers"])
    assert "(1 run)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.percent(1.0), "100.0%"), (units.percent(0.99996), ">99.9%"), (units.percent(0.0001), "<0.1%"),
        (units.percent(0), "0.0%"), (units.count(9_999), "9,999"), (units.count(999_999), "1M"),
        (units.count(1_234_567), "1.23M"), (units.count(0.5), "0.5"), (units.size(0), "0 B"),
        (units.size(1024), "1 KiB"), (units.size(1023.9 * 1024), "1 MiB"), (units.size(68_608), "67 KiB"),
        (units.size(1000), "1000 B"), (units.duration(0.123), "0.123 s"), (units.duration(119), "119 s"),
        (units.duration(120), "2 min"), (units.duration(9000), "2.5 h"),
    ],
)  # fmt: skip
def test_units(text, expected):
    assert text == expected
