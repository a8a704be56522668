"""Puzzles being solved, as they are recorded and drawn."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import zoo
from zoo.objectives import create_objective
from zoo.objectives.base import Frame
from zoo.report import load_runs, write_report
from zoo.report.solving import (
    MOST_MOMENTS,
    Boxes,
    Named,
    Strokes,
    animation_html,
    by_paths,
    filmstrip,
    filmstrip_svg,
    in_terminal,
    moments,
    new_cells,
    save,
    solve_runs,
)
from zoo.tasks import UsageError, create_task
from zoo.tasks.sketch import Cell, Sketch
from zoo.training.loading import open_run
from zoo.training.solving import RECORDED, RECORDED_PATHS, SOLVING, Solving, Step, read, record, solve, solve_run

THOUGHT = {"cycles": 1, "updates": 1, "max_steps": 3}
RUN = {
    "task": {"name": "sudoku", "size": 4, "max_givens": 6},
    "model": {"pattern": "gqa(rope=False) swiglu", "d_model": 16, "causal": False, "recursion": THOUGHT},
    "objective": "deep_supervision",
    "train": {"steps": 2, "batch_size": 4, "eval_rows": 8, "test_rows": 8, "threads": 1},
}
KINDS = [("sudoku", {"size": 4}), ("maze", {}), ("arc", {}), ("mqar", {"seq_len": 16, "n_pairs": 2})]


def untrained(name, options, objective="masked_diffusion"):
    chosen = create_objective(objective, create_task(name, **options), causal=False)
    torch.manual_seed(0)
    model = zoo.create_model("gqa(rope=False) swiglu", d_model=16, vocab_size=chosen.vocab_size, causal=False)
    return chosen, model


@pytest.fixture(params=KINDS, ids=[name for name, _ in KINDS])
def recorded(request, tmp_path):
    """A folder with the record of a model that knows nothing."""
    record(tmp_path, *untrained(*request.param), precision="float32")
    return tmp_path


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    threads = torch.get_num_threads()
    zoo.train({**RUN, "out": str(folder / "one")}, quiet=True)
    torch.set_num_threads(threads)
    return folder / "one"


def test_a_record_is_read_back(recorded):
    found = read(recorded)
    assert found is not None
    assert 2 < len(found.steps) <= RECORDED
    assert found.steps[0].title == "question"
    assert all(title.startswith("pass ") for title, *_ in found.steps[1:])
    assert not found.steps[-1].sketch.count("hidden")


def test_what_is_recorded_is_what_is_scored(run):
    """The marks of the last step are the errors that evaluation counts in the first validation row."""
    found = read(run)
    assert [step.title for step in found.steps] == ["question", "step 1", "step 2", "step 3"]
    assert found == solve_run(run)._replace(question="")
    task, model = create_task(RUN["task"]), zoo.load(run)
    rows = task.sample(1, split="validation", seed=0)
    predictions, _ = create_objective("deep_supervision", task, causal=False).evaluate(model, rows)
    wrong, asked = predictions != rows.targets, task.asked(rows)
    assert found.steps[-1].sketch.count("wrong") == wrong.sum() > 0
    told = found.steps[-1].note.split(", ")
    assert found.steps[0].note == f"{asked.sum()} to find"
    assert told[:2] == [f"{(wrong & asked).sum()} wrong", f"{(wrong & ~asked).sum()} givens too"]
    assert told[2].endswith(" % sure")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([], "solved"),
        ([True], "1 wrong"),
        ([False], "1 given wrong"),
        ([False, False], "2 givens wrong"),
        ([True, True, False], "2 wrong, 1 given too"),
    ],
)
def test_wrong_givens_are_told_apart(changed, told):
    """Of wrong cells those to find are counted, and cells that were given and are overwritten for themselves."""
    chosen, model = untrained("sudoku", {"size": 4})
    rows = chosen.task.sample(1, split="validation", seed=0)
    tokens, asked = rows.targets.clone(), chosen.task.asked(rows)[0]
    places = {True: iter(asked.nonzero().flatten().tolist()), False: iter((~asked).nonzero().flatten().tolist())}
    for own in changed:
        at = next(places[own])
        tokens[0, at] = 2 if tokens[0, at] != 2 else 3
    chosen.solve = lambda *_: iter([Frame(tokens, torch.zeros_like(tokens) > 0)])
    assert solve(chosen, model, rows)[-1].note == told


def test_answers_at_once_are_not_recorded(tmp_path):
    record(tmp_path, *untrained("sudoku", {"size": 4}, "next_token"), precision="float32")
    record(tmp_path, *untrained("text", {"seq_len": 16}), precision="float32")
    assert not list(tmp_path.iterdir())
    assert read(tmp_path) is None
    assert filmstrip_svg(tmp_path) == animation_html(tmp_path) == ""


def test_steps_are_left_out_evenly():
    def numbers(texts):
        steps = [Step(str(i), "", Sketch(1, (Cell("right", text, "  "),))) for i, text in enumerate(texts)]
        return [int(step.title) for step in Solving("", steps).shortened(9).steps]

    assert numbers(map(str, range(81))) == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert numbers("abcdefghi") == list(range(9))
    assert numbers("aaaaaaaaa") == list(range(9)), "there is room for all"
    assert numbers("abbbccccccccccd") == [0, 1, 4, 14]
    assert numbers("abbbcccccccccccc") == [0, 1, 4, 15], "the last one is shown, changed or not"


def test_new_cells():
    given, hidden, wrong = Cell("given", "1", "1 "), Cell("hidden", "", ". "), Cell("wrong", "4", "4 ")
    a, b = Cell("right", "2", "2 "), Cell("right", "3", "3 ")
    before = Sketch(4, (given, hidden, a, wrong))
    assert new_cells(Sketch(4, (given, hidden, b, wrong)), before) == {2}
    assert new_cells(Sketch(4, (given, a, a, a)), before) == {1, 3}
    assert new_cells(before, before) == set()
    assert new_cells(before, None) == set()
    first = Sketch(4, (given, hidden, hidden, hidden))
    assert new_cells(Sketch(4, (given, a, a, wrong)), first) == set(), "all of them: nothing to tell apart"
    assert new_cells(Sketch(4, (given, a, hidden, hidden)), first) == {1}


def test_nothing_is_drawn_outside(recorded):
    named = [Named("one", read(recorded)), Named("two", read(recorded))]
    for scene in (filmstrip(named), *moments(named)):
        for mark in scene.marks:
            if isinstance(mark, Boxes):
                corners = [(x + w, y + h) for x, y, w, h in mark.boxes] + [(x, y) for x, y, *_ in mark.boxes]
            elif isinstance(mark, Strokes):
                corners = [corner for a, b, c, d in mark.lines for corner in ((a, b), (c, d))]
            else:
                corners = [(mark.x, mark.y)]
            assert all(0 <= x <= scene.width and 0 <= y <= scene.height for x, y in corners)


def test_parts_of_a_page(recorded):
    """Well-formed, on their own, and with a button for every step."""
    n = len(read(recorded).steps)
    strip = ElementTree.fromstring(filmstrip_svg(recorded))
    assert "solved step by step" in strip.get("aria-label")
    text = animation_html(recorded, "solving-7")
    assert not re.search(r"https?:|<script|url\(|@import", text)
    page = ElementTree.fromstring(re.sub(r"<input ([^>]*?)( checked)?>", r"<input \1/>", text))
    marks = [e.get("id") for e in page.iter("input")]
    assert marks == ["solving-7-play", "solving-7-pause", *(f"solving-7-s{i}" for i in range(n))]
    assert [e.get("for") for e in page.iter("label")] == marks
    assert [e.get("class") for e in page.iter("g") if e.get("class")] == [f"moment m{i}" for i in range(n)]
    selectors = re.findall(r"^\.(\S+)", page.find("style").text, re.MULTILINE)
    assert set(selectors) == {"solving-7"}, "the rest of the page is left alone"


def test_on_the_page(run, tmp_path):
    page = write_report(load_runs([run]), tmp_path / "report.html").read_text()
    assert filmstrip_svg(run) in page
    assert len(re.findall(r'<g class="moment m\d">', page)) == 4


def test_files(recorded, tmp_path):
    named = [Named("a <name> with $signs$", read(recorded).shortened(4))]
    save(named, tmp_path / "strip.png")
    assert Image.open(tmp_path / "strip.png").n_frames == 1
    save(named, tmp_path / "strip.svg")
    ElementTree.parse(tmp_path / "strip.svg")
    save(named, tmp_path / "moving.gif")
    assert 1 < Image.open(tmp_path / "moving.gif").n_frames <= len(named[0].solving.steps)
    with pytest.raises(UsageError, match="no ending that names a picture format"):
        save(named, tmp_path / "moving.xyz")


def test_an_animation_shows_every_step(run, tmp_path):
    named = solve_runs(run, {"objective.eval_steps": 5})
    save([*named, Named("again", named[0].solving.shortened(2))], tmp_path / "both.webp")
    picture = Image.open(io.BytesIO((tmp_path / "both.webp").read_bytes()))
    assert picture.n_frames == len(moments(named)) == 6 < MOST_MOMENTS


def test_hostile_records(recorded):
    """A run folder from elsewhere: texts are texts, and what is no record is said to be none."""
    path = recorded / SOLVING
    path.write_text(path.read_text().replace("pass 1", "</text><script>alert(1)</script>' onload='x"))
    assert "<script" not in filmstrip_svg(recorded) + animation_html(recorded)
    assert "&lt;script" in filmstrip_svg(recorded)
    for damaged in ("", "{}", path.read_text()[:-40], re.sub(r'"cells":\[\d', '"cells":[99999,1', path.read_text())):
        path.write_text(damaged)
        for draw in (filmstrip_svg, animation_html):
            with pytest.raises(UsageError, match="damaged"):
                draw(recorded)


def test_in_a_terminal(run):
    (named,) = solve_runs(run)
    lines = [str(line) for line in in_terminal(named, 40)]
    assert lines[0].endswith("validation example 0")
    assert max(map(len, lines[1:])) <= 40
    assert sum("step 3" in line for line in lines) == 1
    assert any("!" in line for line in lines)
    assert lines[-1] == "+ new   ! wrong"


def test_the_question_of_a_row_of_tokens_is_told(tmp_path):
    objective, model = untrained("mqar", {"seq_len": 16, "n_pairs": 2})
    rows = objective.task.sample(1, split="test", seed=0)
    solving = Solving("", solve(objective, model, rows), objective.task.render(rows))
    lines = [str(line) for line in in_terminal(Named("", solving), 80)]
    assert objective.task.render(rows).splitlines()[0] in lines


def test_runs(run, tmp_path):
    (checkpoint,) = solve_runs(next((run / "checkpoints").iterdir()), split="test", row=2)
    assert checkpoint.solving.example == "test example 2"
    (found,) = solve_runs(run.parent, split="test", row=2)
    assert found.solving == checkpoint.solving
    with pytest.raises(UsageError, match=r"model\.d_model"):
        solve_runs(run, {"model.d_model": 8})
    with pytest.raises(UsageError, match="holds no run"):
        solve_runs(Path(tmp_path))


def test_all_paths_are_drawn(run, tmp_path):
    """The terminal, the file of a run and its page show every path, the one that is taken first."""
    changes = {"objective.starts": 3, "objective.noise": 0.5}
    named = solve_runs(run, changes)
    assert len(named) == 3
    assert [", taken" in name for name, _ in named] == [True, False, False]
    assert named[0].solving.steps == solve_run(run, changes).steps
    text = "\n".join(line.plain for each in named for line in in_terminal(each, 100))
    assert all(f"path {k}" in text for k in (1, 2, 3))
    save(named, tmp_path / "paths.gif")
    opened = open_run(run, {**changes, "objective.starts": 6})
    record(tmp_path, opened.parts.objective, opened.model, precision="float32")
    found = read(tmp_path)
    assert found.path.endswith(", taken")
    assert len(found.others) == RECORDED_PATHS - 1
    for drawn in (filmstrip_svg(tmp_path), animation_html(tmp_path)):
        assert all(name in drawn for name, _ in by_paths([Named("", found)]))
