"""`zoo bench`: every benchmark on small sizes, what its records hold, and what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
import re
import sys

import pytest
import torch

import zoo
from zoo import cli
from zoo.benchmarks import (
    cells,
    command,
    long_context,
    mad,
    memory,
    options,
    states,
    subjects,
    tables,
    throughput,
    training,
)
from zoo.benchmarks.page import markdown
from zoo.core.errors import UsageError, UsageWarning
from zoo.core.options import Options
from zoo.laws.order import causality
from zoo.mixers.attention_parts import AttentionWord
from zoo.pattern import list_mixers
from zoo.protocol import mixers
from zoo.report import bench as drawing
from zoo.report import benchmark, records
from zoo.report.benchmark import benchmarks
from zoo.report.chance import chance_of
from zoo.states import tree_bytes

SMALL = {
    "throughput": ["--width", "16", "--length", "8,16", "--tokens", "16", "--repeats", "2"],
    "memory": [
        "--width",
        "16",
        "--length",
        "128",
        "--no-peers",
        "--context",
        "1K,16K",
        "--repeats",
        "1",
        "--budget",
        "60",
    ],
    "decode": ["--width", "16", "--context", "16,64", "--drift", "120", "--repeats", "3"],
    "long-context": ["--width", "16", "--length", "16", "--times", "1,4", "--rows", "8", "--layers", "{mixer}"],
    "mad": [
        "--width",
        "16",
        "--share",
        "1e-5",
        "--layers",
        "{mixer}",
        "--task",
        "memorization",
        "--task",
        "compression",
    ],
}
MORE = {
    "long-context": ["--seeds", "2", "--train", "steps=2", "--train", "eval_rows=8", "--train", "test_rows=8"],
    "mad": ["--seeds", "2", "--train", "eval_rows=8", "--train", "test_rows=8"],
}
FIGURES = {
    "throughput": {"tokens_per_second", "seconds", "matmul_share"},
    "memory": {"peak_bytes", "bytes_per_token", "state_bytes"},
    "decode": {"tokens_per_second", "seconds", "error", "state_error", "rounding", "grown_bytes"},
    "long-context": {"accuracy", "exact", "seconds", "effective_length", "train_seconds", "train_steps", "learned"},
    "mad": {"accuracy", "train_seconds", "share_reached"},
}


HUGE = str(10**20)


def kind(name: str):
    """The benchmark of a command's name."""
    return benchmarks[name.replace("-", "_")]


def measured(name: str, asked: cells.Request, **options):
    """The records of a benchmark with these options."""
    cls = kind(name)
    return cls(cls.Config(**options)).cells(asked)


def bench(*arguments: str) -> int:
    """The exit status of `zoo bench`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    return ended.value.code


def benched(benchmark: str, *words: str, out) -> list[records.Record]:
    """The records of a small run that ends well."""
    assert bench(benchmark, *words, *SMALL[benchmark], *MORE.get(benchmark, []), "--out", str(out), "--json") == 0
    return records.read(out / f"{benchmark}.jsonl")


@pytest.mark.parametrize("benchmark", SMALL)
def test_every_benchmark_writes_whole_records(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "ENOUGH", 0.0)  # as if two steps of training were enough
    monkeypatch.setattr(long_context, "ENOUGH", 0.0)
    found = benched(benchmark, "min_gru", "swa swiglu" if benchmark == "throughput" else "gqa", out=tmp_path)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [dataclasses.asdict(r) for r in found]
    assert {name for r in found for name in r.figures} == FIGURES[benchmark]
    assert len({r.key for r in found}) == len(found)
    for r in found:
        assert r.benchmark == benchmark
        assert r.machine["cpu"]
        assert r.versions["torch"] == torch.__version__
        assert r.threads == torch.get_num_threads()
        assert r.commit is None or len(r.commit) >= 40
        assert (r.status == records.OK) == bool(r.figures) == (not r.why)
        assert r.conditions["budget"] > 0
        assert (r.chance is not None) == (benchmark in MORE and r.setting.get("task") != "average")
        for f in r.figures.values():
            assert f["n"] >= 1
            assert f["how"] in ("measured", *tables.MARKS)
        if r.figures and not r.peer and r.setting.get("task") != "average":
            assert r.laws == ["chunk consistency", "causality"]
            if benchmark in MORE:
                assert {f["n"] for f in r.figures.values()} == {2}
    page = (tmp_path / f"{benchmark}.md").read_text()
    for table in kind(benchmark).tables(found):
        assert table.title in page
        assert all(len(row) == len(table.head) for row in table.rows)
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert f"{benchmark}.svg" in pictures
    assert {path.name for path in tmp_path.glob("*.svg")} == set(pictures)
    for name in pictures:
        assert (tmp_path / name).read_text().startswith("<?xml")


def test_an_average_says_of_which_tasks_of_mad(tmp_path):
    """Of one it is not shown, and one of some does not take the place of that of all."""

    def record(task, value, **setting):
        at = {"task": task, "variation": "baseline", "share": 0.1, "width": 16, "layers": "{mixer}", **setting}
        return records.Record("mad", "gqa", at, figures={"accuracy": records.figure(value)})

    one, two = record("compression", 0.5), record("memorization", 0.7)
    of_one, of_two = record("average", 0.5, of="compression"), record("average", 0.6, of="compression, memorization")
    whole = record("average", 0.9)
    heads = [
        mad.MAD.tables(found)[0].head for found in ([one, of_one], [one, two, of_two], [one, of_one, whole, of_two])
    ]
    named = "average of compression, memorization"
    assert heads == [
        ["", "compression"],
        ["", "compression", "memorization", named],
        ["", "compression", "average", named],
    ]
    assert len({r.key for r in (of_one, of_two, whole)}) == 3
    (drawn,) = drawing.charts([whole, one, of_one])
    scores, averages = drawn.panels
    assert (scores.columns, scores.values, averages.series[0].x) == (["compression"], [[0.5]], [0.9])


def test_attention_decodes_from_a_random_cache_and_recurrences_from_a_prefill(tmp_path, capsys):
    found = benched("decode", "min_gru", "gqa", out=tmp_path)
    how = {r.name: f["how"] for r in found if r.setting["part"] == "step" for f in r.figures.values()}
    assert how["min_gru"] == how["torch.nn.LSTM"] == "measured"
    assert how["gqa"] == how["torch SDPA attention"] == "random cache"
    assert {r.name: r.status for r in found if r.setting["part"] == "drift"}["gqa"] == cells.NOT_OFFERED
    drifted = [r for r in found if r.setting["part"] == "drift" and r.name == "min_gru"]
    assert drifted[0].value("error") < 1e-4


def test_records_are_kept_beside_those_of_other_runs(tmp_path, capsys):
    first = benched("throughput", "min_gru", out=tmp_path)
    both = benched("throughput", "short_conv", "--no-peers", out=tmp_path)
    assert {r.name for r in both} == {r.name for r in first} | {"short_conv"}
    again = benched("throughput", "min_gru", "--missing", out=tmp_path)
    assert again == both
    (tmp_path / "throughput.jsonl").write_text("{}\n")
    assert bench("throughput", "min_gru", *SMALL["throughput"], "--out", str(tmp_path)) == 2
    assert "line 1" in capsys.readouterr().err


def test_tables_are_printed_without_json(capsys):
    assert bench("throughput", "min_gru", "--no-peers", *SMALL["throughput"]) == 0
    out = capsys.readouterr()
    assert "min_gru" in out.out
    assert "min_gru: width 16, length 8" in out.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["throughput", "mambaa"], "Did you mean 'mamba'"),
        (["throughput", "zzz*"], "No sequence mixer matches 'zzz*'"),
        (["throughput", "gqa(heads=2)"], "Unknown option"),
        (["throughput", "gqa", "--length", "4k,x"], "--length '4k,x' is not allowed"),
        (["throughput", "gqa", "--width", "15"], "d_model=15"),
        (["throughput", "gqa", "--budget", "0"], "--budget 0 is not allowed"),
        (["memory", "mha", "--budget", "inf"], "--budget inf is not allowed"),
        (["decode", "mha", "--budget", "nan"], "--budget nan is not allowed"),
        (["decode", "mha", "--budget", "1e9"], "--budget 1e+09 is not allowed"),
        (["throughput", "gqa", "--repeats", HUGE], "--repeats 1e+20 is not allowed"),
        (["mad", "gqa", "--threads", HUGE], "--threads 1e+20 is not allowed"),
        (["mad", "gqa", "--seeds", HUGE], "--seeds"),
        (["mad", "gqa", "--batch-size", HUGE], "--batch-size"),
        (["long-context", "gqa", "--rows", HUGE], "--rows"),
        (["long-context", "gqa", "--tokens", HUGE], "--tokens"),
        (["long-context", "gqa", "--times", f"1,{HUGE}"], "--times"),
        (["long-context", "gqa", "--length", HUGE], "--length"),
        (["long-context", "gqa", "--width", HUGE], "--width"),
        (["long-context", "gqa", "--preset", "nia"], "Did you mean 'niah'"),
        (["throughput", "gqa", "--length", "9" * 5000], "--length"),
        (["throughput", "gqa", "--width", f"16,{HUGE}"], "--width"),
        (["memory", "gqa", "--context", HUGE], "--context"),
        (["decode", "gqa", "--drift", HUGE], "--drift"),
        (["throughput", "gqa", "--out", f"/tmp/{'n' * 300}"], "Cannot write"),
        (["throughput", "gqa", "--out", "/dev/null/x"], "Cannot write"),
        (["throughput", "gqa", "--precision", "half"], "--precision 'half'"),
        (["throughput", "gqa", "--device", "tpu"], "device='tpu'"),
        (["throughput", "--import", "nowhere.py"], "--import 'nowhere.py' failed"),
        (["memory", "gqa", "--lenght", "8"], "--length"),
        (["decode", "gqa", "--context", "0"], "--context '0' is not allowed"),
        (["long-context", "gqa", "--task", "sudoku"], "has no length to be varied"),
        (["long-context", "gqa", "--task", "nia"], "Did you mean 'niah'"),
        (["long-context", "gqa", "--set", "keys=2"], "Unknown option of niah"),
        (["long-context", "gqa", "--set", "seq_len=2"], "--set seq_len is not allowed"),
        (["long-context", "gqa", "--layers", "gqa"], "{mixer}"),
        (["long-context", "gqa", "--layers", "2*({mixer}"], "missing to close"),
        (["long-context", "gqa", "--train", "device=cuda"], "--train device"),
        (["long-context", "gqa", "--train", "lrr=1"], "'lr'"),
        (["mad", "gqa", "--task", "mqar"], "Unknown task of MAD"),
        (["mad", "gqa", "--share", "2"], "--share 2"),
        (["mad", "gqa", "--lr", "fast"], "--lr 'fast'"),
        (["mad", "gqa", "--lr", "nan"], "--lr 'nan'"),
        (["mad", "gqa", "--weight-decay", "0,inf"], "--weight-decay '0,inf'"),
        (["speed"], "speed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_in_one_line(arguments, told, capsys):
    assert bench(*arguments) == (1 if told == "Cannot write" else 2)
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_everything_is_checked_before_anything_is_measured(monkeypatch):
    """The second width does not fit the last subject: nothing is measured at the first."""
    monkeypatch.setattr(cells, "cell", lambda *_, **__: pytest.fail("measured"))
    asked = request(subjects=subjects.choose(["min_gru", "mha(n_heads=3)"]))
    for name in ("throughput", "memory", "decode"):
        monkeypatch.setattr(sys.modules[benchmarks[name].__module__], "cell", cells.cell)
        with pytest.raises(zoo.UsageError, match="d_model=32 is not divisible by n_heads=3"):
            list(measured(name, asked, width=[32, 48]))


def test_names_of_one_layer_are_one_row():
    """By what is built at the width, words and patterns alike."""
    words = ["swa", "mqa", "min_gru", "2*(gqa swiglu)", "gqa", "2*(mqa swiglu)", "mha(window=64)"]
    asked = [subjects.from_pattern(word) for word in words]
    assert [s.names for s in subjects.distinct_layers(asked, 64)] == [
        "swa = mha(window=64)",
        "mqa = gqa",  # four heads, one key
        "min_gru",
        "2*(gqa swiglu) = 2*(mqa swiglu)",
    ]
    wide = subjects.distinct_layers([subjects.from_pattern(word) for word in ("gqa", "mqa", "mha")], 512)
    assert [s.names for s in wide] == ["gqa", "mqa", "mha"]


@pytest.mark.parametrize("word", list_mixers(kind="sequence"))
def test_attention_has_four_heads_and_no_layer_is_measured_at_its_inits(word):
    subject = subjects.from_pattern(word)
    layer = subject.build(64, 64)
    heads = getattr(getattr(layer, "attention", layer), "n_heads", None)
    assert not isinstance(layer, AttentionWord) or heads >= subjects.HEADS
    assert ("n_heads" in subject.text(64)) == isinstance(layer, AttentionWord)
    assert all(p.any() for p in layer.parameters())
    with torch.no_grad():
        assert layer(torch.randn(1, 64, 64))[0].abs().max() > 1e-3


def test_heads_that_are_given_stay():
    texts = ["mha(n_heads=1)", "mha(head_dim=32)", "gqa(n_kv_heads=8)", "lstm", "bidirectional(mamba2)"]
    for text in texts:
        assert subjects.from_pattern(text).text(64) == text
    assert (
        subjects.from_pattern("gqa(n_kv_heads=2) | mha").text(64) == "(gqa(n_heads=4, n_kv_heads=2) | mha(n_heads=4))"
    )


def trained_as(status: str, accuracy: float, seed: int) -> dict:
    return {
        "status": status, "seconds": 1.0 + seed, "steps": 10, "n_parameters": 1, "backends": {},
        "validation": {"accuracy": accuracy}, "test": {"accuracy": accuracy},
    }  # fmt: skip


def long(monkeypatch, status, right, tested):
    """Tables of a long-context run whose trainings ended so, with the accuracies of each seed at each length."""
    results = iter([trained_as(status, accuracy, i) for i, accuracy in enumerate(right)])
    monkeypatch.setattr(long_context, "trained", lambda *_, **__: next(results))
    monkeypatch.setattr(long_context, "chance_of", lambda task: 0.125)
    monkeypatch.setattr(
        long_context,
        "evaluate_run",
        lambda folder, overrides, split: {
            "accuracy": tested[overrides["task.seq_len"]][int(folder.name)], "exact": 0.0, "slices": {},
        },
    )  # fmt: skip
    options = {"task": "niah", "set": {"key_vocab": 8, "value_vocab": 8}, "layers": "{mixer}", "width": 16, "rows": 8}
    options |= {"length": 64, "times": [n // 64 for n in tested] or [1], "tokens": 64, "seeds": len(right)}
    found = list(measured("long-context", request(subjects=subjects.choose(["min_gru"])), **options))
    (table,) = kind("long-context").tables(found)
    return found, dict(zip(table.head, table.rows[0], strict=True))


def test_an_effective_length_of_several_seeds_was_tested(monkeypatch):
    """Seeds that reach 0 and 64 have no effective length of 32."""
    for tested, expected in (
        ({64: [0.31, 0.99]}, "< 64"),
        ({64: [0.99, 0.90], 256: [0.5, 0.9]}, "64 (64 to 64)"),
        ({64: [0.99, 0.99], 256: [0.9, 0.9]}, "≥ 256 (≥ 256 to ≥ 256)"),
        ({64: [0.99, 0.9, 0.7], 256: [0.9, 0.9, 0.2], 1024: [0.9, 0.2, 0.2]}, "256 (none to 256)"),
    ):
        found, row = long(monkeypatch, "target", [0.99] * len(tested[64]), tested)
        assert row["effective length"] == expected
        assert row["learned"] == f"{len(tested[64])} of {len(tested[64])}"
        length = found[-1].value("effective_length")
        assert length is None or length in tested
        (accuracy,) = [text for head, text in row.items() if head.startswith("64 (chance ")]
        assert "to" in accuracy  # the spread over the seeds


@pytest.mark.parametrize(("status", "told"), [("finished", "not learned"), ("time_budget", "stopped by the clock")])
def test_what_was_not_learned_is_no_score(monkeypatch, status, told):
    found, row = long(monkeypatch, status, [0.2, 0.9, 0.1], {})
    assert {r.status for r in found} == {told}
    assert not any(r.figures for r in found)
    assert {text for head, text in row.items() if head.startswith("64")} == {told}
    assert row["effective length"] == row["learned"] == "—"
    assert drawing.charts(found) == []

    monkeypatch.setattr(mad, "trained", lambda *_, **__: trained_as(status, 0.7, 0))
    options = {"task": ("compression",), "layers": "{mixer}", "width": 16, "share": 0.5, "batch_size": 8, "seeds": 2}
    asked = request(subjects=subjects.choose(["min_gru"]))
    found = list(measured("mad", asked, **options))
    assert [r.status for r in found] == [told, cells.NO_AVERAGE]
    (table,) = mad.MAD.tables(found)
    assert table.head == ["", f"compression (chance {found[0].chance:.0%})"]
    assert table.rows == [["min_gru", told]]
    monkeypatch.setattr(mad, "trained", lambda *_, **__: trained_as(status, 0.86, 0))
    assert [r.status for r in measured("mad", asked, **options)] == ["ok", "ok"]


def test_chance_is_what_a_constant_answer_gets():
    niah = {"name": "niah", "seq_len": 64, "n_queries": 8, "asked": "in_turn", "key_vocab": 8, "value_vocab": 8}
    assert chance_of({**niah, "min_length": 34}) == pytest.approx(1 / 8, abs=0.01)


def test_a_page_says_of_how_many_values_its_figures_are():
    at = {"width": 16, "length": 8, "batch_size": 1, "direction": "train", "compiled": False}
    one, five = records.figure([2.0]), records.figure([1.0, 2.0, 3.0, 4.0, 9.0])

    def page(**figures):
        made = cells.record("throughput", "gqa", at, device="cpu", figures=figures, conditions={"budget": 2.0})
        return markdown(throughput.Throughput, [made], "throughput.jsonl", [])

    assert "One value each (n = 1), without a spread: tokens per second." in page(tokens_per_second=one)
    assert "Medians" not in page(tokens_per_second=one)
    both = page(tokens_per_second=five, seconds=one)
    assert "Medians of 5 values (tokens per second); their number and quartiles are in the records." in both
    assert "One value each (n = 1), without a spread: seconds." in both
    assert "- budget 2 s" in both


def test_a_share_above_one_is_remarked_on():
    at = {"width": 16, "length": 8, "batch_size": 1, "direction": "train", "compiled": False}
    figures = {"tokens_per_second": records.figure(5.0), "matmul_share": records.figure(1.14)}
    made = cells.record("throughput", "gqa", at, device="cpu", figures=figures)
    (table,) = throughput.Throughput.tables([made])
    assert table.rows == [["gqa", "5 (114%‡)"]]
    assert tables.ABOVE in tables.notes([made])


def test_the_preset_stands_for_what_is_not_given(monkeypatch):
    found = []
    monkeypatch.setattr(command, "run", lambda benchmark, *_, **__: found.append(benchmark.config))
    assert bench("long-context", "min_gru", "--preset", "niah", "--width", "32", "--set", "n_queries=2") == 0
    preset = long_context.PRESETS["niah"]
    (asked,) = found
    assert asked.width == 32
    assert asked.set == {**preset["set"], "n_queries": 2}
    assert (asked.layers, asked.train, asked.times) == (preset["layers"], preset["train"], (1, 4, 16, 64))


def test_a_newer_record_of_a_layer_takes_the_place_of_those_under_its_other_names():
    at = {"width": 64, "length": 8}
    old = [records.Record("memory", name, at) for name in ("gqa", "lstm", "mqa")]
    new = records.Record("memory", "gqa", at, same=["mqa"])
    assert [r.label for r in records.merged(old, [new])] == ["gqa = mqa", "lstm"]


def test_every_registered_sequence_mixer_is_measured_where_none_is_named():
    assert [s.name for s in subjects.choose([])] == list_mixers(kind="sequence")
    chosen = [s.name for s in subjects.choose(["*mamba*", "2*(lstm swiglu)"])]
    assert chosen == [*list_mixers("*mamba*"), "2*(lstm swiglu)"]
    assert len(chosen) > 2


OWN = """
import torch
import zoo
from zoo.benchmarks.page import markdown
from zoo.mixers.min_gru import MinGRU


@zoo.register("{name}")
class Own(MinGRU):
    class Config(MinGRU.Config):
        pass

    def forward(self, x, state=None, context=None):
        y, state = super().forward(x, state, context)
        return {output}, state
"""


@pytest.fixture
def own(tmp_path):
    """From a name and what it gives to the path of a file that registers that mixer; forgotten afterwards."""
    names = []

    def write(name: str, output: str):
        names.append(name)
        path = tmp_path / f"{name}.py"
        path.write_text(OWN.format(name=name, output=output))
        return path

    yield write
    for name in names:
        mixers._classes.pop(name, None)
        sys.modules.pop(name, None)


def test_a_mixer_from_a_file_is_measured_in_child_processes_too(own, tmp_path, capsys):
    path = own("own_bench_mixer", "y")
    sizes = [*SMALL["memory"], "--width", "64", "--length", "4K"]  # more than the pages that are there already
    assert bench("memory", "own_bench_mixer", "--no-peers", "--import", str(path), *sizes, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["status"] for r in found] == ["ok"] * 3
    assert found[0]["figures"]["peak_bytes"]["value"] > 0


def test_nothing_is_measured_of_a_mixer_that_breaks_a_law(own, capsys):
    path = own("own_bench_leak", "y + x.mean(1, keepdim=True)")
    arguments = ["own_bench_leak", "--no-peers", "--import", str(path), *SMALL["throughput"]]
    assert bench("throughput", *arguments, "--json") == 0
    for line in capsys.readouterr().out.splitlines():
        r = json.loads(line)
        assert (r["status"], r["figures"]) == ("breaks a law", {})
        assert "chunk consistency" in r["why"]


def request(**options) -> cells.Request:
    return cells.Request(**{"subjects": [], "say": lambda line: None, **options})


def test_a_cell_beyond_its_budget_says_so_and_larger_ones_are_not_tried():
    tried = []

    def measure(seconds: float) -> cells.Measured:
        tried.append(seconds)
        if seconds > 1:
            raise cells.NoFigure(cells.OVER, "one run took long")
        return {"seconds": records.figure(seconds)}, {}

    ladder = cells.Ladder(1.0)
    ladder.climb(10, lambda: measure(0.2))
    with pytest.raises(cells.NoFigure, match="expected to take 2 s, of 1 s"):
        ladder.climb(100, lambda: measure(9))
    with pytest.raises(cells.NoFigure, match="one run took long"):
        ladder.climb(20, lambda: measure(2))
    with pytest.raises(cells.NoFigure, match="as before: one run took long"):
        ladder.climb(21, lambda: measure(0.1))
    assert tried == [0.2, 2]
    with pytest.raises(cells.NoFigure, match="one run took"):
        cells.sampled(request(budget=1e-9), lambda: sum(range(1000)))


def test_figures_are_medians_with_quartiles():
    assert records.figure([4.0, 1.0, 2.0, 3.0, 100.0]) == {
        "value": 3.0, "low": 2.0, "high": 4.0, "n": 5, "how": "measured",
    }  # fmt: skip
    assert records.figure(7, "formula") == {"value": 7.0, "low": 7.0, "high": 7.0, "n": 1, "how": "formula"}


@torch.no_grad()
@pytest.mark.parametrize("make", [subjects.SDPA, subjects.TorchLSTM])
def test_peers_keep_the_laws_that_mixers_do(make):
    torch.manual_seed(0)
    layer = make(32)
    x = torch.randn(2, 9, 32)
    whole, _ = layer(x)
    first, state = layer(x[:, :4], layer.init_state(2))
    second, state = layer(x[:, 4:8], state)
    last, state = layer.step(x[:, 8], state)
    torch.testing.assert_close(torch.cat([first, second, last[:, None]], 1), whole, atol=1e-5, rtol=1e-4)
    causality(layer)
    state = layer.init_state(2, capacity=7)
    assert tree_bytes(state) == layer.state_bytes(2, 7, torch.float32)


def test_states_made_by_hand_are_like_those_of_a_prefill():
    for word in ("gqa", "mla", "dsa", "swa", "mamba2 swiglu gqa"):
        layer = subjects.choose([word])[0].build(32, 24)
        made, how = states.at_context(layer, 24, room=3)
        with torch.no_grad():
            _, real = layer(torch.randn(1, 24, 32), layer.init_state(1, capacity=27))
        assert tree_bytes(made) == tree_bytes(real)
        assert how == "random cache"
        if word != "mamba2 swiglu gqa":
            for a, b in zip(zoo.canonical(made), zoo.canonical(real), strict=True):
                assert a.shape == b.shape
                assert a.all()
        with torch.no_grad():
            y, _ = layer.step(torch.randn(1, 32), made)
        assert y.isfinite().all()


def test_training_memory_is_that_of_what_must_be_kept():
    """A gated linear layer keeps its input and two products for the backward pass, and makes their gradients."""
    subject = subjects.from_pattern("swiglu(d_hidden=256)")
    bound = request(budget=60.0)
    peaks = [memory.peak_in_child(bound, subject, 64, length, 1) for length in (4096, 16384)]
    grown = (peaks[1] - peaks[0]) / (16384 - 4096) / 4  # floats a token
    assert 2 * 256 < grown < 16 * 256


def test_a_share_counts_the_matrix_products_of_each_token_at_its_context():
    layer = subjects.choose(["mha(n_heads=2)"])[0].build(16, 4)
    assert throughput.forward_flops(layer, 3) == sum(layer.flops_per_token(t) for t in (1, 2, 3))


def test_weights_that_do_not_fit_are_not_made(capsys):
    long = ["--width", "16", "--context", "1M", "--length", "128", "--repeats", "1", "--budget", "60"]
    assert bench("memory", "token_mlp", "--no-peers", *long, "--json") == 0
    *_, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert last["status"] == "no memory"
    assert "GB" in last["why"]


LACKING = """
from zoo.benchmarks import Benchmark, BenchmarkOptions, option, register


@register("without_tables")
class WithoutTables(Benchmark):
    class Config(BenchmarkOptions):
        pass

    def cells(self, request):
        yield from ()


class Taken(BenchmarkOptions):
    out: str = option("", "An option that zoo bench has.")
"""


def test_a_benchmark_that_lacks_something_is_refused_alone(tmp_path, monkeypatch, capsys):
    assert set(inspect.signature(command.shared).parameters) == options.SHARED
    (tmp_path / "own.py").write_text(LACKING)
    monkeypatch.setenv("ZOO_IMPORT", str(tmp_path / "own.py"))
    with pytest.warns(UsageWarning) as warned:
        assert bench("--help") == 2
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.startswith("  ")] == [
        "throughput", "memory", "decode", "long-context", "mad"
    ]  # fmt: skip
    first, second = (str(warning.message) for warning in warned)
    assert "'without_tables'" in first
    assert "it lacks tables" in first
    assert "cannot be called 'out'" in second


def of_one_cell(**attributes):
    """A benchmark with one cell for each layer, and other attributes than it should have."""

    class OneCell(benchmark.Benchmark):
        Config, title, peers = type("Config", (options.BenchmarkOptions,), {"__doc__": "None."}), "One", False

        def cells(self, request):
            for subject in request.at(32):
                yield cells.cell(request, self.label(), subject, {"width": 32}, self.measure)

        def measure(self):
            return {"figure": records.figure(1.0)}, {}

        @classmethod
        def tables(cls, found):
            return []

    for name, value in attributes.items():
        setattr(OneCell, name, value)
    return OneCell


def with_option(**fields):
    space = {"__doc__": "One.", "__module__": __name__, "model_config": {"arbitrary_types_allowed": True}}
    return type("Config", (options.BenchmarkOptions,), space | fields)


def config_of(kind, default):
    return with_option(__annotations__={"rows": kind}, rows=default)


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        (
            {"Config": config_of(int, options.option("many", "Rows."))},
            "a default does not fit: rows='many' is not allowed",
        ),
        (
            {"Config": config_of(int, options.option(0, "Rows.", least=1))},
            "a default does not fit: rows=0 is not allowed",
        ),
        (
            {"Config": config_of(list[int], options.option([1], "Rows."))},
            r"rows is of type list\[int\], which the command",
        ),
        ({"Config": config_of(torch.dtype, torch.float32)}, "rows is of type dtype, which the command cannot read"),
        ({"Config": with_option(__annotations__={"rows": int})}, "its option rows has no default"),
        ({"Config": type("Config", (Options,), {})}, "its Config is no subclass of BenchmarkOptions"),
        ({"title": None}, "it lacks title"),
        ({"plots": ("curve",)}, "its plots are no tuple of Plot"),
    ],
)
def test_a_benchmark_is_refused_when_it_registers(monkeypatch, attributes, why):
    with pytest.raises(UsageError, match=f"The benchmark 'one_cell'.* is refused: .*{why}"):
        benchmark.register("one_cell")(of_one_cell(**attributes))


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        (
            {"cells": lambda self, request: iter(())},
            "yields no record for these layers and options: nothing was measured",
        ),
        ({"cells": lambda self, request: None}, "returns None: it should yield records"),
        ({"cells": lambda self, request: iter([{"x": 1}])}, r"yields \{'x': 1\}, no Record"),
        ({"measure": lambda self: 3.0}, r"returns 3.0, expected \(figures, further fields"),
        ({"measure": lambda self: ({"x": 3.0}, {})}, "returns x=3.0: make it with zoo.benchmarks.figure"),
        ({"measure": lambda self: ({}, {"law": []})}, "Unknown field of a record .*'law'. Did you mean 'laws'"),
        (
            {"tables": classmethod(lambda cls, found: "text")},
            "tables of the benchmark 'one-cell' returns 'text', no list",
        ),
    ],
)
def test_what_a_benchmark_gives_back_is_checked(attributes, why):
    cls = of_one_cell(**attributes)
    cls.name = "one_cell"
    with pytest.raises(UsageError, match=why) as refusal:
        command.run(cls(cls.Config()), request(subjects=subjects.choose(["mha"])))
    assert "\n" not in str(refusal.value)


def test_a_cell_without_figures_has_a_status_that_records_have():
    with pytest.raises(UsageError, match=r"Unknown status .*'over budgt'. Did you mean 'over budget'\?"):
        cells.NoFigure("over budgt", "it took long")
    sent = pickle.loads(pickle.dumps(cells.NoFigure(cells.OVER, "it took long")))  # as from a child process
    assert (sent.status, sent.why, str(sent)) == (cells.OVER, "it took long", "it took long")


def test_nothing_is_measured_where_nothing_is_missing(tmp_path):
    cls, said = of_one_cell(), []
    cls.name = "one_cell"
    asked = request(subjects=subjects.choose(["mha"]), say=said.append)
    command.run(cls(cls.Config()), asked, out=tmp_path)
    command.run(cls(cls.Config()), asked, out=tmp_path, missing=True)
    assert said[-1].endswith("one-cell.jsonl: nothing is missing.")
