"""The page: complete, self-contained, safe against what people name their runs; and its plots as files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from report_samples import MODELS, OF_ERRORS, write_sample

from zoo.core.errors import UsageError
from zoo.core.files import write_output
from zoo.report import PLOTS, bench, load_runs, plots, save_plots, static, to_csv, units, write_report
from zoo.report.charts import running_mean, thinned

VOID = {"meta", "link", "br", "img", "hr", "input"}
NASTY = '<script>alert("x")</script>&"\'$x_1$'
LARGEST = 6_000_000


class Reader(HTMLParser):
    """Elements with their attributes, the text and the scripts, and the tags that are still open."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(sample_page) -> Reader:
    return Reader(sample_page.read_text())


def test_every_tag_is_closed_and_every_id_is_unique(page):
    assert page.open == []
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        target = attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids, (tag, target)
        for told in ("aria-labelledby", "aria-describedby", "data-copy"):
            assert attributes.get(told, ids[0]) in ids, (tag, told)


def test_the_page_needs_nothing_but_itself(page, sample_page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not {"iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    text = sample_page.read_text()
    for script in page.scripts[1:]:
        text = text.replace(script, "")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert sample_page.stat().st_size < LARGEST


def test_only_the_scripts_of_the_page_may_run(page):
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert [a.get("type") for a in page.all("script")] == ["application/json", None, None]
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]]
    assert re.search("script-src ([^;]*)", policy)[1].split() == [f"'{h}'" for h in hashes]
    assert policy.startswith("default-src 'none';")
    assert not [a for _, a in page.elements for name in a if name.startswith("on")]


def test_every_part_is_there(page, sample_measurements):
    sections = {a["id"] for a in page.all("section")}
    assert sections >= {"leaderboard", "plots", "layers", "example", "reproduce", "machine"}
    assert sections >= {plot.name for plot in PLOTS} - OF_ERRORS | {
        chart.name for chart in bench.charts(sample_measurements)
    }
    for part in (
        "attention and gated-deltanet answer best",
        "pairs:",
        "zoo train attention.yaml",
        "an example CPU",
        "2.13.0",
        "torch.nn.LSTM",
        "throughput: over budget (90 s), 2 settings",
    ):
        assert part in page.text


def test_headings_of_tables_have_a_scope_and_plots_have_words(page):
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in page.all("th"))
    for attributes in (a for a in page.all("div") if a.get("class") == "plot"):
        assert attributes["tabindex"] == "0"
        assert attributes["aria-label"]
    assert "gated-deltanet ends at" in page.text
    assert page.all("html")[0]["lang"] == "en"
    for region in (a for _, a in page.elements if a.get("class") == "scroll"):
        assert region["tabindex"] == "0"
        assert region.get("aria-label") or region.get("aria-labelledby")


def test_the_download_is_the_csv(page, sample_runs):
    (link,) = [a for a in page.all("a") if a.get("download") == "leaderboard.csv"]
    assert unquote(link["href"].split(",", 1)[1]) == to_csv(sample_runs)
    csv = page.data["csv"]
    assert csv["head"] + "".join(csv["lines"].values()) == to_csv(sample_runs)


def test_settings_make_the_run_again(page, sample_folder):
    links = {a["download"]: a["href"] for a in page.all("a") if "download" in a}
    texts = {name: unquote(link.split(",", 1)[1]) for name, link in links.items() if name.endswith(".yaml")}
    for name in MODELS:
        assert yaml.safe_load(texts[f"{name}.yaml"]) == yaml.safe_load(
            (sample_folder / name / "config.yaml").read_text()
        )


def test_names_act_as_text_wherever_they_stand(tmp_path):
    changes = {
        "name": NASTY,
        "model": {"pattern": NASTY},
        "status": NASTY,
        "commit": NASTY,
        "task": {"name": NASTY, "a": NASTY},
    }
    changes["test"] = {"accuracy": 0.5, "slices": {NASTY: {NASTY: {"accuracy": 1}, "b": {"accuracy": 0}}}}
    write_sample(tmp_path / "a", **changes)
    text = write_report(load_runs([tmp_path]), tmp_path / "report.html").read_text()
    reader = Reader(text)
    assert reader.open == []
    assert (
        len(reader.scripts) == len(reader.all("script")) == text.count("<script") - reader.scripts[1].count("<script")
    )
    assert reader.data["rows"][0]["label"] == NASTY
    assert NASTY in reader.text


def test_interrupted_runs_of_different_tasks_make_a_page(tmp_path):
    write_sample(tmp_path / "a", result=False)
    (write_sample(tmp_path / "b", result=False) / "metrics.jsonl").unlink()
    write_sample(tmp_path / "c", task={"name": "no-such-task"}, status="failed", test=None, machine=None, versions=None)
    page = write_report(load_runs([tmp_path]), tmp_path / "report.html").read_text()
    reader = Reader(page)
    assert "unfinished" in reader.text
    assert "3 runs of different tasks: mqar (2), no-such-task (1)." in reader.text
    assert "example" not in {a["id"] for a in reader.all("section")}
    assert "<option selected>mqar</option>" in page  # the task of most runs
    assert len([a for a in reader.all("option") if "selected" in a]) == 1


def test_a_run_without_any_figure_makes_a_page(tmp_path):
    (write_sample(tmp_path / "a", result=False) / "metrics.jsonl").unlink()
    runs = load_runs([tmp_path])
    assert plots.charts(runs) == []
    assert "has no figures yet" in write_report(runs, tmp_path / "report.html").read_text()


def test_measurements_alone_make_a_page(sample_measurements, tmp_path):
    reader = Reader(write_report([], tmp_path / "report.html", sample_measurements).read_text())
    sections = {a["id"] for a in reader.all("section")}
    assert "layers" in sections
    assert not {"leaderboard", "plots", "reproduce", "example"} & sections


def test_what_differs_by_seed_alone_is_told_as_a_spread(tmp_path):
    for seed, accuracy in enumerate((0.9, 0.95, 0.92)):
        write_sample(tmp_path / str(seed), "lstm", seed=seed, test={"accuracy": accuracy})
    text = Reader(write_report(load_runs([tmp_path]), tmp_path / "report.html").read_text()).text
    assert "lstm: accuracy 90.0% to 95.0% over 3 seeds" in text
    assert "One seed each" not in text


def test_a_model_that_cannot_answer_says_why(tmp_path):
    (write_sample(tmp_path / "a") / "checkpoints").mkdir()
    reader = Reader(write_report(load_runs([tmp_path]), tmp_path / "report.html").read_text())
    assert "not asked: " in reader.text
    assert [a["data-card"] for a in reader.all("article")] == ["run-0"]
    reader = Reader(write_report(load_runs([tmp_path]), tmp_path / "report.html", ask_models=False).read_text())
    assert reader.all("article") == []


def test_writing_replaces_a_file_in_one_step_and_leaves_no_other(tmp_path):
    target = tmp_path / "new folder" / "report.html"
    for content in (b"old", b"new"):
        assert write_output(target, content).read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    target = write_output(tmp_path / "report.html", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        write_output(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_where_nothing_can_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path, says in ((tmp_path, "is a folder"), (tmp_path / "file" / "report.html", "cannot be written")):
        with pytest.raises(UsageError, match=says):
            write_output(path, b"")
    with pytest.raises(UsageError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UsageError, match=r"report.pdf' is not allowed: a report is a page"):
        write_report([], tmp_path / "report.pdf")


def test_plots_are_saved_as_files(sample_runs, tmp_path):
    written = save_plots(sample_runs, tmp_path / "plots", formats=["svg"])
    assert [path.stem for path in written] == [plot.name for plot in PLOTS if plot.name not in OF_ERRORS]
    assert all(path.read_bytes().startswith(b"<?xml") for path in written)


def test_measurements_are_saved_as_files(sample_measurements, tmp_path):
    charts = bench.charts(sample_measurements)
    written = static.save_charts(charts, bench.rows_of(sample_measurements), tmp_path, formats=["png"])
    assert [path.stem for path in written] == [chart.name for chart in charts]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_front_is_drawn_through_its_runs(sample_runs):
    (chart,) = [chart for chart in plots.charts(sample_runs) if chart.name == "accuracy-by-state"]
    (axes,) = static.draw(chart, plots.rows_of(sample_runs)).axes
    (front,) = [line for line in axes.lines if line.get_gid() == "front"]
    corners = set(zip(front.get_xdata(), front.get_ydata(), strict=True))
    assert {(2_048, 0.312), (32_768, 0.713), (68_608, 0.9986), (133_120, 0.9991)} <= corners
    assert (137_216, 0.9948) not in corners


def test_a_run_looks_the_same_in_every_plot(sample_runs):
    rows = plots.rows_of(sample_runs)
    looks = []
    for chart in plots.charts(sample_runs):
        if chart.name in ("accuracy-by-time", "accuracy-by-tokens", "loss", "accuracy-by-slice"):
            lines = static.draw(chart, rows).axes[0].lines
            looks.append([(line.get_gid(), line.get_color(), line.get_marker()) for line in lines])
    assert len(looks) == looks.count(looks[0]) == 4
    assert len(set(looks[0])) == 5


def test_a_swept_setting_is_a_plot_and_what_only_times_the_run_is_not(sample_runs):
    panels = plots.accuracy_by_setting(sample_runs)
    assert [panel.x.title for panel in panels] == ["train.lr"]
    assert {series.x[0] for series in panels[0].series} == {0.001, 0.002, 0.003}


def test_heat_maps_hold_accuracy_by_length_and_say_what_was_trained(tmp_path):
    task = {"name": "state_tracking", "length": 64}
    write_sample(tmp_path / "a", task=task, test={"accuracy": 0.5, "accuracy_128": 0.25, "accuracy_64": 1.0})
    (by_length,) = plots.accuracy_by_length(load_runs([tmp_path]))
    assert (by_length.columns, by_length.values, by_length.trained) == (["64", "128"], [[1.0, 0.25]], 1)


def test_running_mean_and_thinning():
    assert running_mean([4, 2, 6, 0], 2) == [4, 3, 4, 3]
    assert running_mean([], 3) == []
    points = [(float(i), 0.0) for i in range(1001)]
    assert thinned(points)[-1] == points[-1]
    assert len(thinned(points)) <= 400
    assert thinned(points[:7]) == points[:7]


@pytest.mark.parametrize(
    ("value", "text"), [(1024, "1K"), (65_536, "64K"), (1 << 20, "1M"), (1000, "1,000"), (100_000, "100k"), (7, "7")]
)
def test_lengths_read_as_they_are_named(value, text):
    assert units.length(value) == text


def test_the_script_is_packed_with_the_project():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"zoo.report" = ["*.css", "*.jinja", "*.js"]' in project
