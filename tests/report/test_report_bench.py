"""What `zoo bench` measured, read back, tabled and plotted; and what is found where."""

from __future__ import annotations

import json

import pytest
from report_samples import LAYERS, figure, record, write_measurements, write_sample

from zoo.core.errors import UsageError
from zoo.report import bench, gather, load_records
from zoo.report.charts import HeatMap, describe


def written(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def chart(measurements, name):
    (found,) = [chart for chart in bench.charts(measurements) if chart.name == name]
    return found


def test_every_benchmark_is_plotted_and_described(sample_measurements):
    rows = bench.rows_of(sample_measurements)
    assert [row.label for row in rows] == list(LAYERS)
    names = [c.name for c in bench.charts(sample_measurements)]
    assert names == [
        "bench-throughput", "bench-memory", "bench-decode", "bench-long-context", "bench-effective-length",
        "bench-depth", "bench-mad",
    ]  # fmt: skip
    for each in bench.charts(sample_measurements):
        assert "mamba2" in describe(each, rows) or each.name == "bench-depth"


def test_points_come_with_their_spread_and_with_how_they_came_about(sample_measurements):
    training, _ = chart(sample_measurements, "bench-throughput").panels
    first = training.series[0]
    assert (training.title, first.x) == ("training", [256, 1024, 4096])
    assert all(low < y < high for low, y, high in zip(first.low, first.y, first.high, strict=True))
    _, state = chart(sample_measurements, "bench-memory").panels
    assert state.series[0].notes == ["", "", "formula"]
    (step,) = chart(sample_measurements, "bench-decode").panels
    assert set(step.series[1].notes) == {"random cache"}


def test_figures_of_other_settings_are_not_in_one_plot(tmp_path):
    settings = [{"width": w, "length": n, "direction": "train"} for w in (64, 128) for n in (256, 512)]
    lines = [record("throughput", "mha", s, {"tokens_per_second": figure(100.0)}) for s in settings]
    found = load_records([written(tmp_path / "a.jsonl", *lines, lines[0] | {"precision": "bfloat16"})])
    panels = chart(found, "bench-throughput").panels
    assert [len(panel.series[0].x) for panel in panels] == [2, 2, 1]
    assert [panel.title for panel in panels] == [
        "training, width 64, precision float32",
        "training, width 128, precision float32",
        "training, width 64, precision bfloat16",
    ]


def test_maps_of_length_and_depth(sample_measurements):
    (lengths,) = chart(sample_measurements, "bench-long-context").panels
    assert isinstance(lengths, HeatMap)
    assert (lengths.columns, lengths.trained) == (["64", "128", "256"], 1)
    assert lengths.lines == ["layer-0", "layer-1", "layer-2"]
    depths = chart(sample_measurements, "bench-depth").panels
    assert [panel.row for panel in depths] == lengths.lines
    assert depths[0].lines == ["0", "0.5"]
    assert depths[0].values[0] == lengths.values[0]


def test_the_table_shows_each_column_in_the_setting_that_most_layers_share(sample_measurements):
    columns, subjects = bench.table(sample_measurements)
    by_name = {s.row.label: dict(zip([c.title for c in columns], s.cells, strict=True)) for s in subjects}
    train = columns[0]
    assert train.help.startswith("width 64, length 1024, direction train")  # at 4096 the peer has no figure
    assert by_name["torch.nn.LSTM"]["train\ntok/s"].value == 50_000
    assert by_name["mamba2"]["train\ntok/s"].best
    assert by_name["torch.nn.LSTM"]["MAD"].value is None
    assert [s.is_peer for s in subjects] == list(LAYERS.values())
    assert subjects[-1].remarks == ["throughput: over budget (90 s), 2 settings"]


def test_layers_that_are_one_at_a_width_are_one_row(tmp_path):
    """From their patterns, for records that do not say it themselves too."""

    def at(width, name, value, **more):
        setting = {"width": width, "length": 256, "direction": "train"}
        return record("throughput", name, setting, {"tokens_per_second": figure(value)}, **more)

    lines = [at(64, name, value) for name, value in (("mha", 1.0), ("swa", 9.0), ("gqa", 3.0), ("mqa", 2.0))]
    lines += [at(512, name, 1.0) for name in ("mha", "gqa")]
    lines += [
        at(64, "dsa", 1.0, same=["mla"], layer="dsa(n_heads=4)"),
        at(64, "unheard-of", 1.0),
        at(64, "x", 1.0, peer=True),
    ]
    found = load_records([written(tmp_path / "a.jsonl", *lines)])
    assert [r.title for r in found] == ["mha = gqa = mqa", "swa", "mha", "gqa", "dsa = mla", "unheard-of", "x"]
    assert (found[0].value("tokens_per_second"), found[0].value("tokens_per_second", "n")) == (2.0, 15)
    assert found[0].value("tokens_per_second", "high") == pytest.approx(3.15)


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "retention(expand_v=1e308)", "mha(n_heads=10000000000000000000000)", "99999*(mha)", "", "mha\0"],
)
def test_patterns_that_cannot_be_built_are_rows_of_their_own(tmp_path, text):
    at = {"width": 64, "length": 256, "direction": "train"}
    lines = [record("throughput", name, at, {"tokens_per_second": figure(1.0)}) for name in (text, "mha")]
    assert len(load_records([written(tmp_path / "a.jsonl", *lines)])) == 2


def test_a_column_says_of_how_many_values_it_is(sample_measurements):
    columns, _ = bench.table(sample_measurements)
    assert all(column.help.endswith("medians of 5 values") for column in columns)


def test_what_was_not_learned_has_no_figure_no_place_and_no_rank(tmp_path):
    trained = {"task": "niah", "width": 64, "layers": "{mixer} swiglu", "train_length": 64}
    lines = [
        record("long-context", name, trained | {"length": n}, {key: figure(value, spread=0)}, chance=0.125, **more)
        for name, more in (("gru", {}), ("mha", {}), ("lstm", {"status": "stopped by the clock", "why": "below 85%"}))
        for n, key, value in ((64, "accuracy", 0.9), (0, "effective_length", 64.0))
    ]
    found = load_records([written(tmp_path / "a.jsonl", *lines)])
    _, subjects = bench.table(found)
    by_name = {s.row.label: s for s in subjects}
    assert [cell.value for cell in by_name["lstm"].cells] == [None]
    assert by_name["lstm"].remarks == ["long-context: stopped by the clock (below 85%), 2 settings"]
    (lengths,) = chart(found, "bench-long-context").panels
    assert len(lengths.lines) == 2
    assert lengths.title == "niah (chance 12%)"


def test_the_later_of_two_measurements_counts(tmp_path):
    setting = {"width": 64, "length": 256, "direction": "train"}
    lines = [record("throughput", "mha", setting, {"tokens_per_second": figure(v)}) for v in (1.0, 2.0)]
    (found,) = load_records([written(tmp_path / f"{i}.jsonl", line) for i, line in enumerate(lines)])
    assert found.value("tokens_per_second") == 2


def test_measurements_of_odd_shapes_make_no_plot_and_no_traceback(tmp_path):
    odd = [
        record("throughput", "a", {"length": "long", "direction": "train"}, {"tokens_per_second": figure(1.0)}),
        record("throughput", "b", {"length": 64, "direction": "train"}, {"seconds": figure(1.0)}),
        record("memory", "c", {"length": [64], "part": "state"}, {"state_bytes": {"value": float("nan")}}),
        record("mad", "d", {"task": "average"}, {}, slices={"depth": {"0": {"accuracy": 1.0}}}),
        record("unheard-of", "e", {}, {"x": figure(1.0)}),
    ]
    found = load_records([written(tmp_path / "odd.jsonl", *odd)])
    assert bench.charts(found) == []
    assert len(bench.table(found)[1]) == 5


ODD = {"figures": {"accuracy": 3}}, {"figures": {"accuracy": {"value": None}}}, {"slices": {"task": [1]}}, {"own": 1}


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"benchmark": "mad"}', "12", "[" * 9999, *(json.dumps(record("mad", "a", {}, {}) | o) for o in ODD)],
    ids=range(9),
)
def test_a_damaged_file_is_told_with_its_line(tmp_path, line):
    path = written(tmp_path / "a.jsonl", record("mad", "a", {}, {}))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match=r"a\.jsonl' is damaged at line 2: expected what `zoo bench` writes"):
        load_records([path])


def test_runs_and_measurements_are_found_together(tmp_path):
    write_sample(tmp_path / "runs" / "lstm", "lstm")
    (tmp_path / "bench").mkdir()
    write_measurements(tmp_path / "bench" / "x.jsonl")
    (tmp_path / "bench" / "other.jsonl").write_text('{"text": "a data set"}\n')
    told: list[str] = []
    runs, measurements, _ = gather([tmp_path], told.append)
    assert ([run.name for run in runs], told) == (["lstm"], [])
    again = gather([tmp_path / "runs" / "lstm", tmp_path / "bench" / "x.jsonl", tmp_path / "bench"], told.append)
    assert len(measurements) == len(again[1]) > 0
    assert len(again[0]) == 1


def test_what_is_damaged_or_foreign_is_left_out_with_a_line(tmp_path):
    write_sample(tmp_path / "good", "lstm")
    write_sample(tmp_path / "cut").joinpath("result.json").write_text('{"name": ')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("services: {web: 1}\n")
    bad = written(tmp_path / "bad.jsonl", record("mad", "a", {}, {}))
    bad.write_text(bad.read_text() + "{\n")
    told: list[str] = []
    runs, measurements, _ = gather([tmp_path], told.append)
    assert ([run.name for run in runs], measurements) == (["lstm"], [])
    assert len(told) == 3
    for line, says in zip(sorted(told), ("bad.jsonl", "cut/result.json", "foreign/config.yaml"), strict=True):
        assert line.startswith("Left out: ")
        assert says in line
        assert "\n" not in line


def test_nothing_left_to_compare_is_said(tmp_path):
    write_sample(tmp_path / "cut").joinpath("result.json").write_text("{")
    told: list[str] = []
    with pytest.raises(UsageError, match="Nothing is left to compare"):
        gather([tmp_path], told.append)
    assert len(told) == 1
    with pytest.raises(UsageError, match="There is nothing at"):
        gather([tmp_path / "none"], told.append)
    with pytest.raises(UsageError, match="the folder that holds it"):
        gather([write_sample(tmp_path / "run") / "metrics.jsonl"], told.append)
