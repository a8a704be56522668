"""Pages of results: each is made from its data, and none gives a score to a model that had not learned."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

from zoo.benchmarks import page, studies
from zoo.benchmarks.studies import needs, recipes, state_tracking, time_to_solve
from zoo.benchmarks.studies.harness import Study
from zoo.benchmarks.studies.sweep_study import SweepStudy
from zoo.report import bench, records
from zoo.report.benchmark import in_order

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MODULES = [importlib.import_module(f"{studies.__name__}.{m.name}") for m in pkgutil.iter_modules(studies.__path__)]
STUDIES: dict[str, Study | SweepStudy] = {m.STUDY.name: m.STUDY for m in MODULES if hasattr(m, "STUDY")}
SWEEPS = {name: study for name, study in STUDIES.items() if isinstance(study, SweepStudy)}
BENCHMARKS = {cls.label(): cls for cls in in_order()}


def read(name):
    return STUDIES[name].read(RESULTS)


def rows_of_recipes():
    found = read("recipes")
    return [row for name in sorted(found) for row in found[name]]


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_is_made_from_its_data(name):
    assert (RESULTS / f"{name}.md").read_text() == STUDIES[name].markdown(read(name))


def test_the_table_of_needs_is_made_from_the_stores():
    text = (RESULTS / "README.md").read_text()
    assert needs.rewritten(text, RESULTS) == text
    assert needs.NOT_YET in text  # a need without data says so


@pytest.mark.parametrize("name", SWEEPS)
def test_pictures_of_sweeps_are_those_of_their_page(name):
    pictures = SWEEPS[name].pictures(read(name))
    assert set(pictures) == {path.stem for path in RESULTS.glob(f"{name}-*.svg")}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_study_without_a_store_says_so(name, tmp_path):
    (tmp_path / "docs").mkdir()
    SWEEPS[name].write(tmp_path / "docs")
    text = (tmp_path / "docs" / f"{name}.md").read_text()
    assert "Not measured yet." in text
    for each in SWEEPS[name].stores:
        assert f"- `{each.name}`: not measured yet." in text
        assert f"{each.command} --out docs/results/data/studies/{each.name}" in text


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_page_of_a_benchmark_is_made_from_its_records(name):
    found = records.read(RESULTS / "data" / f"{name}.jsonl")
    charts = bench.charts_of(BENCHMARKS[name], found, bench.rows_of(found))
    text = page.markdown(BENCHMARKS[name], found, f"data/{name}.jsonl", charts)
    assert (RESULTS / f"{name}.md").read_text() == text


def test_every_page_has_its_data_its_command_and_its_place_in_the_index():
    """What no command in the tree can make again is not there."""
    made = {*STUDIES, *BENCHMARKS}
    assert {path.stem for path in RESULTS.glob("*.md")} == {*made, "README"}
    shown = {name for path in RESULTS.glob("*.md") for name in re.findall(r"!\[.*\]\((.*)\)", path.read_text())}
    assert {path.name for path in RESULTS.glob("*.*") if path.suffix != ".md"} == shown
    stores = {each.name for name in made & SWEEPS.keys() for each in SWEEPS[name].stores}
    assert {path.stem for path in (RESULTS / "data").iterdir()} == made - SWEEPS.keys() | {"studies"}
    assert {path.name for path in (RESULTS / "data" / "studies").iterdir()} <= stores
    index = (RESULTS / "README.md").read_text()
    assert set(re.findall(r"\]\((\S+?)\.md\)", index)) - {"../benchmarks", "../statistics"} == made
    for name in STUDIES:
        assert f"zoo.benchmarks.studies.{name}" in index or name == "ops"


def test_rows_that_are_not_measured_again_are_kept(tmp_path):
    """A study is handed what its folder holds, and the folder has the page and the data at every row."""
    seen = []

    def measure(arguments, old):
        rows = dict(old.get("rows", {}))
        for name in arguments.names:
            rows[name] = len(rows)
            yield {"rows": rows}
            seen.append((tmp_path / "trial.md").read_text())

    study = Study("trial", "A trial.", lambda p: p.add_argument("names", nargs="*"), measure, lambda d: str(d["rows"]))
    for names in (["a", "b"], ["b", "c"]):
        study.main([*names, "--out", str(tmp_path)])
    assert study.read(tmp_path) == {"rows": {"a": 0, "b": 2, "c": 2}}
    assert seen[0] == "{'a': 0}"


def shown(page, head):
    """The cells of a table's rows, by the first."""
    lines = page.partition(head)[2].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


WITHOUT_TARGET = ("cwm-tiny", "star-graph, next_token")


def test_recipes_that_did_not_learn_have_no_score():
    cells = shown(recipes.markdown(read("recipes")), "|---|\n")
    seen = set()
    for row in rows_of_recipes():
        score = cells[row["recipe"]][2:5]
        if "bits_per_byte" in row["test"]:
            assert score[0] == ""
        elif row["test"]["exact"] < recipes.LEARNED:
            seen.add("not learned")
            assert score == ["not learned", "", ""]
        elif row["status"] == "time_budget" and not row["recipe"].startswith(WITHOUT_TARGET):
            seen.add("clock")
            assert score == ["stopped by the clock", "", ""]
        else:
            assert score[0].startswith(f"{row['test']['exact']:.2%}")
    assert seen == {"not learned", "clock"}


def test_recipes_say_how_many_problems_their_rows_are():
    cells = shown(recipes.markdown(read("recipes")), "|---|\n")
    for row in rows_of_recipes():
        n, problems = row["test"]["n_rows"], row["test"]["n_problems"]
        assert cells[row["recipe"]][5] == (f"{n:,}" if n == problems else f"{n:,}: {problems:,} problems")
        if row["recipe"].startswith("sudoku-4x4"):
            assert problems == 15


def test_time_to_solve_has_one_row_for_a_layer_and_no_accuracy_of_what_the_clock_stopped():
    data = read("time_to_solve")
    cells = shown(time_to_solve.markdown(data).partition("Every mixer, alone")[2], "|---|\n")
    for row in data["mixers"]:
        (found,) = (cells[name] for name in cells if f"`{row['pattern']}`" in name.split(" = "))
        assert (found[1] == "solved") == (found[5] != "") == row["solved"]
    assert "`gqa` = `mha` = `mqa`" in cells
    assert time_to_solve.patterns("m[hq]a", 64) == [
        "mha(n_heads=4)", "short_conv mha(n_heads=4)", "mqa(n_heads=4)", "short_conv mqa(n_heads=4)"
    ]  # fmt: skip


def test_state_tracking_scores_only_what_learned():
    data = read("state_tracking")
    page = state_tracking.markdown(data)
    first, *by_length = page.split("\n## ")
    cells = shown(first, "| --: |\n")
    column = 0
    for recipe in state_tracking.RECIPES:
        _, table = next((part.split("\n", 1)) for part in by_length if part.startswith(f"{recipe}:"))
        for variant, row in data[recipe].items():
            cell = cells[variant][column]
            learned = row["trained"] >= state_tracking.LEARNED
            assert learned == bool(re.fullmatch(r"(\*\*)?[01]\.\d\d(\*\*)?( †)?", cell))
            assert learned == (f"\n| {variant}: `" in table)
            assert cell.endswith("†") == (learned and row["status"] == "time_budget")
        column += len(state_tracking._parts(recipe))
    assert not any(cell == "" for row in cells.values() for cell in row)
