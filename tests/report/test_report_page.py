"""The page: complete, self-contained, safe against what people name their runs; and its plots as files."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from report_samples import write_sample

from tasks.registry import UsageError
from zoo.report import PLOTS, load_runs, plots, save_plots, to_csv, write_report
from zoo.report.drawing import running_mean
from zoo.report.files import write_atomically

VOID = {"meta", "link", "br", "img", "hr", "input"}
NASTY = '<script>alert("x")</script>&"\'$x_1$'


class Reader(HTMLParser):
    """Elements with their attributes, the text, and the tags that are still open."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
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
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


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


def test_the_page_needs_nothing_but_itself(page, sample_page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    text = sample_page.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text


def test_every_part_is_there(page):
    sections = {a["id"] for a in page.all("section")}
    assert sections == {"leaderboard", "plots", "example", "reproduce", "machine"}
    assert {a.get("id") for a in page.all("figure")} >= {plot.name for plot in PLOTS}
    for part in (
        "attention and gated-deltanet answer best",
        "pairs:",
        "zoo train attention.yaml",
        "an example CPU",
        "2.13.0",
    ):
        assert part in page.text


def test_headings_of_tables_have_a_scope_and_pictures_have_words(page):
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in page.all("th"))
    pictures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(pictures) >= len(PLOTS)
    assert all("attention" in (a.get("aria-label") or "") for a in pictures)
    assert page.all("html")[0]["lang"] == "en"
    for region in (a for _, a in page.elements if a.get("class") == "scroll"):
        assert region["tabindex"] == "0"
        assert region.get("aria-label") or region.get("aria-labelledby")


def test_the_download_is_the_csv(page, sample_runs):
    (link,) = [a for a in page.all("a") if a.get("download") == "leaderboard.csv"]
    assert unquote(link["href"].split(",", 1)[1]) == to_csv(sample_runs)


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
    assert reader.all("script") == []
    assert "<script" not in text
    assert NASTY in reader.text


def test_interrupted_runs_of_different_tasks_make_a_page(tmp_path):
    write_sample(tmp_path / "a", result=False)
    (write_sample(tmp_path / "b", result=False) / "metrics.jsonl").unlink()
    write_sample(tmp_path / "c", task={"name": "no-such-task"}, status="failed", test=None, machine=None, versions=None)
    reader = Reader(write_report(load_runs([tmp_path]), tmp_path / "report.html").read_text())
    assert "unfinished" in reader.text
    assert "different tasks" in reader.text
    assert "example" not in {a["id"] for a in reader.all("section")}


def test_a_run_without_any_figure_makes_a_page(tmp_path):
    (write_sample(tmp_path / "a", result=False) / "metrics.jsonl").unlink()
    runs = load_runs([tmp_path])
    assert all(plot.draw(runs) is None for plot in PLOTS)
    assert "has no figures yet" in write_report(runs, tmp_path / "report.html").read_text()


def test_writing_replaces_a_file_in_one_step_and_leaves_no_other(tmp_path):
    target = tmp_path / "new folder" / "report.html"
    for content in (b"old", b"new"):
        assert write_atomically(target, content).read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    target = write_atomically(tmp_path / "report.html", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_where_nothing_can_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path, says in ((tmp_path, "is a folder"), (tmp_path / "file" / "report.html", "cannot be written")):
        with pytest.raises(UsageError, match=says):
            write_atomically(path, b"")
    with pytest.raises(UsageError, match="at least one run"):
        write_report([], tmp_path / "report.html")


def test_plots_are_saved_as_files(sample_runs, tmp_path):
    written = save_plots(sample_runs[:2], tmp_path / "plots", formats=["svg"])
    assert [path.stem for path in written] == [plot.name for plot in PLOTS]
    assert all(path.read_bytes().startswith(b"<?xml") for path in written)


def test_the_front_is_drawn_through_its_runs(sample_runs):
    (axes,) = plots.accuracy_by_state(sample_runs).axes
    (front,) = [line for line in axes.lines if line.get_gid() == "front"]
    corners = set(zip(front.get_xdata(), front.get_ydata(), strict=True))
    assert {(2_048, 0.312), (32_768, 0.713), (68_608, 0.9986), (133_120, 0.9991)} <= corners
    assert (137_216, 0.9948) not in corners


def test_a_run_looks_the_same_in_every_plot(sample_runs):
    looks = []
    for draw in (plots.accuracy_by_time, plots.accuracy_by_tokens, plots.loss_curves, plots.accuracy_by_slice):
        (axes,) = draw(sample_runs).axes
        looks.append([(line.get_color(), line.get_marker()) for line in axes.lines])
    assert looks.count(looks[0]) == len(looks)
    assert len(set(looks[0])) == 5


def test_running_mean():
    assert running_mean([4, 2, 6, 0], 2) == [4, 3, 4, 3]
    assert running_mean([], 3) == []


def test_plotting_is_imported_only_when_it_is_used():
    code = "import sys, zoo; before = set(sys.modules); import zoo.report; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "jinja2", "rich"} & set(loaded)
