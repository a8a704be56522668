"""The pages are whole: everything registered has one, every link leads somewhere, and what they say to type works."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import re
import sys
import tomllib
import traceback

import forked
import pytest
import typer
import yaml

import zoo
import zoo.cli
from zoo import protocol
from zoo.benchmarks.command import bench
from zoo.laws import LAWS
from zoo.listing import all_options
from zoo.ops.delta_kernel import KERNEL
from zoo.ops.kernel import Kernel
from zoo.recipes import list_recipes
from zoo.report.benchmark import benchmarks
from zoo.tasks.protocol import list_tasks

DOCS = pathlib.Path(__file__).parents[1] / "docs"
WRITTEN = sorted(page for page in DOCS.rglob("*.md"))


def load_pages():
    """The script docs/pages.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_pages", DOCS / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_pages()


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)


def test_every_section_about_a_mixer_is_about_one_that_there_is_and_the_only_one():
    words = [name for family in pages.families() for name in family.sections]
    assert len(words) == len(set(words))
    assert set(words) <= set(zoo.list_mixers())


def test_the_index_names_every_page_and_its_words():
    index = (DOCS / "mixers" / "README.md").read_text()
    rows = [line for line in index.splitlines() if line.startswith("| [")]
    told = {links(row)[0]: re.findall(r"`(\w+)`", row) for row in rows}
    assert {page: sorted(words) for page, words in told.items()} == {
        family.page: sorted(family.sections) for family in pages.families()
    }


def test_every_link_leads_somewhere():
    for page in [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *WRITTEN]:
        for target in links(page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_citation_names_the_package_as_it_is():
    root = DOCS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["title"] == project["name"]
    assert citation["version"] == zoo.__version__
    assert citation["license"] == project["license"]


def test_names_and_paths_of_the_code_that_pages_give_are_there():
    root = DOCS.parent
    for page in [root / "README.md", root / "CONTRIBUTING.md", *WRITTEN]:
        text = page.read_text()
        for path in re.findall(r"`((?:zoo|tasks|benchmarks|tests|docs)/[\w./]*)`", text):
            assert (root / path).exists(), f"{page.name}: {path}"
        for name in re.findall(r"\bzoo(?:\.[A-Za-z_]\w*)+", text):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError) as error:
                pytest.fail(f"{page.name}: {name} is not there: {error}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "pages"
    pages.write(folder)
    return folder


def test_the_floors_of_the_picture_are_those_of_the_import_contract():
    contracts = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == "layers")
    picture = re.search(r"## The floors\n.*?```\n(.*?)```", (DOCS / "concepts.md").read_text(), re.S)[1]
    drawn = [set(re.findall(r"zoo/(\w+)", line)) for line in picture.splitlines() if line.startswith("zoo/")]
    assert [floor - {"tasks"} for floor in drawn] == [set(re.findall(r"zoo\.(\w+)", layer)) for layer in layers]


def test_the_laws_of_the_page_are_those_of_the_law_book():
    """As a reader of the file sees them, and as `zoo/protocol.py` lists them."""
    listed = re.findall(r"^(\d+\. .+(?:\n +.+)*)$", inspect.cleandoc(protocol.__doc__), re.M)
    section = (DOCS / "concepts.md").read_text().partition("\n## The laws\n")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d+\. .+(?:\n +.+)*)$", section, re.M) == listed
    of_objectives = 14
    assert [int(law.partition(".")[0]) for law in listed] == sorted(
        {law.number for law in LAWS.values()} | {of_objectives}
    )


def test_the_way_of_tokens_is_the_stack_at_the_doors_of_the_kernel(tmp_path, monkeypatch):
    way = (
        (DOCS / "concepts.md")
        .read_text()
        .partition("<!-- begin: the way of tokens -->")[2]
        .partition("<!-- end -->")[0]
    )
    there, back = (block.splitlines() for block in re.findall(r"```\n(.*?)```", way, re.S))
    for file, function in (line.split()[:2] for line in there + back):
        define = r"\b{}\(" if file.endswith(".cpp") else r"def {}\("
        assert re.search(define.format(function), (DOCS.parent / file).read_text()), f"{file} has no {function}"
    if reason := KERNEL.why_not():
        pytest.skip(reason)
    stacks = {}

    def door(kernel, function, *arguments):
        here = pathlib.Path(zoo.__file__).parents[1]
        frames = [(pathlib.Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        own = [(file.relative_to(here).as_posix(), name) for file, name in frames if here / "zoo" in file.parents]
        stacks.setdefault(function, own)
        return opened(kernel, function, *arguments)

    opened = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", door)
    cut = ["train.steps=1", "train.eval_rows=2", "train.test_rows=2", "task.seq_len=16", f"out={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as ended:
        zoo.cli.main(["train", "start", "model.pattern=gated_deltanet swiglu", *cut, "--quiet"])
    assert ended.value.code == 0
    written = [[tuple(line.split()[:2]) for line in block if not line.startswith(" ")] for block in (there, back)]
    assert stacks["delta_forward"] == written[0]
    backward = stacks["delta_backward"]
    assert backward[backward.index(written[1][0]) :] == written[1]


def test_everything_registered_has_a_page(site):
    for folder, names in {
        "words": zoo.list_mixers(),
        "tasks": list_tasks(),
        "objectives": zoo.list_objectives(),
        "recipes": list_recipes(),
    }.items():
        assert {page.stem for page in (site / folder).glob("*.md")} == set(names)
    assert all(f"`{name}`" in (site / "models.md").read_text() for name in zoo.list_models())


def test_pages_of_the_site_lead_somewhere_too(site):
    for page in site.rglob("*.md"):
        for target in links(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            assert (page.parent / target).exists(), f"{page.relative_to(site)}: {target}"
        assert "<!-- file:" not in page.read_text()


def test_every_option_says_what_it_means(site):
    rows = re.compile(r"^\| `(\w+)` \| (.+?) \| `.*` \| (.*) \|$", re.M)
    for folder in ("words", "tasks", "objectives"):
        for page in (site / folder).glob("*.md"):
            _, _, rest = page.read_text().partition("## Options\n")
            table = rest.partition("\n## ")[0]
            found = rows.findall(table)
            assert len(found) == table.count("\n| ") - 1 or table.strip() == "None."
            for option, _, meaning in found:
                assert meaning, f"{page.stem}: {option}"


def test_the_page_of_options_has_every_option(site):
    page = (site / "options.md").read_text()
    found = set()
    for title, table in re.findall(r"^## (.+)\n((?:.*\n)*?)(?=^## |\Z)", page, re.M):
        words = title.replace("`", "").split()
        section = {"Experiment": "", "Sweep": "sweep."}.get(title, f"{words[0]}.")
        section = f"sweep.{section}" if title.endswith("of a sweep") else section
        rows = re.findall(r"^\| `(\w+)` \| .+ \| (?:`.*`|required) \| (.+) \|$", table, re.M)
        assert len(rows) == table.count("\n| ") - 1, title
        found |= {f"{section}{name}" for name, _ in rows}
    assert found == {each.name for each in all_options()}


def test_a_page_of_a_mixer_has_its_equation_costs_exceptions_and_results(site):
    page = (site / "words" / "retention.md").read_text()
    assert "S_t = gamma_h S_{t-1} + k_t v_t^T" in page
    assert "| any | 524,416 | 1,114,112 | 128 KiB |" in page
    assert "without an exception" in page
    gqa = (site / "words" / "gqa.md").read_text()
    assert "| 1K | 163,840 | 1,376,256 | 512 KiB |" in gqa  # k and v of one group, 64 channels, 1024 steps, 4 bytes
    lstm = (site / "words" / "lstm.md").read_text()
    assert 'As `lstm(bias=False, backend="fused")`: `torch.compile(fullgraph=True)` does not work' in lstm
    assert "../results/state_tracking.md" in lstm


RETIRED = re.compile(r"\b(told|asked|held(?![ -]out)|so many|go(es|ing)? on (from|with)|makes? of (it|them))\b", re.I)
"""Phrases at which readers stumbled; CONTRIBUTING.md says how to write."""


def help_texts(command):
    """The help of a command, of its options and of the commands within it."""
    yield command.help or ""
    for parameter in command.params:
        yield getattr(parameter, "help", None) or ""
    for inner in getattr(command, "commands", {}).values():
        yield from help_texts(inner)


def test_no_page_and_no_help_has_a_retired_phrase(site, capsys):
    texts = {page.relative_to(site).as_posix(): page.read_text() for page in site.rglob("*.md")}
    texts = {name: text for name, text in texts.items() if not name.startswith("results/")}  # written by code
    texts["zoo --help"] = "\n".join(help_texts(typer.main.get_command(zoo.cli.app)))
    for command in [(), *[(name,) for name in benchmarks.names()]]:
        bench([*command, "--help"])
        texts[" ".join(["zoo bench", *command])] = " ".join(capsys.readouterr().out.split())
    found = {}
    for name, text in texts.items():
        prose = re.sub(r"^ *```.*?^ *```|`[^`\n]*`|^## Measured$.*", "", text, flags=re.S | re.M)
        found |= {name: [match[0] for match in RETIRED.finditer(prose)]}
    assert not {name: phrases for name, phrases in found.items() if phrases}


def public_docstrings(node, path):
    """The docstrings of what can be used from outside: of a module, its classes, functions, methods and constants."""
    yield path, ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        return
    for before, each in zip([None, *node.body], node.body, strict=False):
        if isinstance(each, ast.ClassDef | ast.FunctionDef) and not each.name.startswith("_"):
            yield from public_docstrings(each, f"{path}.{each.name}")
        text = each.value.value if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) else None
        if isinstance(text, str) and isinstance(before, ast.Assign | ast.AnnAssign):
            name = ast.unparse(before.targets[0] if isinstance(before, ast.Assign) else before.target)
            if not name.startswith("_"):
                yield f"{path}.{name}", text


def test_no_docstring_of_a_public_name_has_a_retired_phrase():
    found = set()
    for folder in ("zoo", "tasks", "benchmarks"):
        for file in (DOCS.parent / folder).rglob("*.py"):
            where = file.relative_to(DOCS.parent)
            if "studies" in where.parts or (where.parts[0] == "zoo" and where.parts[1] in ("tasks", "benchmarks")):
                continue
            for name, doc in public_docstrings(ast.parse(file.read_text()), where.as_posix()):
                prose = re.sub(r"`[^`\n]*`|^ *\w+:", "", doc, flags=re.M)  # without names of arguments
                found |= {(name, match[0]) for match in RETIRED.finditer(prose)}
    assert not found


@pytest.mark.parametrize(
    ("row", "mixer"),
    [
        ("| mamba2 | 1 |", "mamba2"),
        ("| `short_conv mha` | 0 |", "mha"),
        ("| attention | `2*(mha swiglu)` | 140k |", "mha"),
        ("| slstm: `slstm(n_heads=1)` | 1.00 |", "slstm"),
        ("| other-name | 1.00 |", "gla"),
        ("| mamba, width 128, expand 2 | auto |", "mamba"),
        ("| `short_conv` | 1 |", "short_conv"),
        ("| swiglu | 1 |", "swiglu"),
        ("| half | `mamba2 mha` | 2 |", None),
        ("| torch.nn.LSTM | 1 |", None),
        ("| 48 | 1.00 |", None),
    ],
)
def test_rows_of_results_find_their_mixer(row, mixer):
    assert pages.mixer_of_row(row, {"other-name": "2*(gla)"}) == mixer


def test_notes_do_not_repeat_the_equations_of_the_docstring():
    told = "```text\na = b c ;  d = e\nf = g\n```"
    notes = "One.\n\n    a = b c ;  d = e\n\n    new = h\n\nTwo.\n\n```\nf = g\n```\n\n```sh\nrun\n```\n"
    assert pages.without_repeats(notes, told) == "One.\n\n    new = h\n\nTwo.\n\n\n```sh\nrun\n```\n"


def test_docstrings_become_markdown():
    doc = "One.\n\n    y = x\n\n        ```\n        a  b\n        ```\n\nTwo `c`."
    assert pages.markdown(doc) == "One.\n\n```text\ny = x\n\n    ```\n    a  b\n    ```\n```\n\nTwo `c`."
    assert pages.markdown("One:\n\n    ```\n    a  b\n    ```\n\nTwo.") == "One:\n\n```text\na  b\n```\n\nTwo."


# ---- what the pages say to type

SOME_LAWS = "--law contract --law 'chunk consistency' --law gradients"
CUT_SHORT = "train.steps=2 train.eval_rows=8 train.test_rows=8"
DEMO = f"zoo train mqar-demo --variant conv-attention {CUT_SHORT} out=runs/demo"
RUN = """
import os, shlex, sys
sys.path.insert(0, {docs!r})
from zoo.cli import main
for line in {lines!r}:
    words = shlex.split(line, comments=True)
    if words[0] == "python":
        exec(words[2])
        continue
    try:
        main(words[1:])
    except SystemExit as done:
        if done.code:
            raise
import pages
written = {{**dict(pages.mixer_pages()), **dict(pages.objective_pages())}}
print(written["mixers/README.md"], written["words/fading_memory.md"], written["objectives/focal.md"])
print(pages.task_page("missing_symbol"))
"""


def typed(heading: str) -> list[str]:
    """The commands of the first block below a heading of docs/adding.md."""
    _, _, rest = (DOCS / "adding.md").read_text().partition(f"\n## {heading}\n")
    return re.search(r"```sh\n(.*?)```", rest, re.S)[1].splitlines()


@pytest.mark.parametrize("all_laws", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some laws", "all laws"])
def test_the_worked_examples_run_as_they_are_told(tmp_path, all_laws):
    lines = typed("From nothing to a Pareto plot")
    assert len(lines) <= 10
    assert lines[0].startswith("git clone")
    assert lines[1].startswith("make demo")
    mixer = lines[[line.startswith("cp ") for line in lines].index(True) :]
    others = [*typed("An op with a kernel in C++"), *typed("A task"), *typed("An objective")]
    others += [*typed("A norm"), *typed("A residual kind"), *typed("A benchmark"), *typed("A family")]
    (tmp_path / "docs").symlink_to(DOCS)
    copied = mixer.pop(0).split()
    assert copied[0] == "cp"
    (tmp_path / copied[2]).write_text((tmp_path / copied[1]).read_text())
    exports = [line.partition("ZOO_IMPORT=")[2] for line in [*mixer, *others] if line.startswith("export ")]
    commands = [line for line in [DEMO, *mixer, *others] if not line.startswith("export ")]
    commands = [f"{line} {CUT_SHORT}" if line.startswith("zoo train") and line != DEMO else line for line in commands]
    if not all_laws:
        commands = [re.sub(r"^(zoo laws \w+)$", rf"\1 {SOME_LAWS}", line) for line in commands]
        assert sum(SOME_LAWS in line for line in commands) == 4
    done = forked.run(
        [sys.executable, "-c", RUN.format(docs=str(DOCS), lines=commands)],
        env=os.environ | {"ZOO_IMPORT": ":".join(exports).replace("$PWD", str(tmp_path))},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "fading_memory  S_t = a S_{t-1}" in done.stdout  # zoo list
    assert "fading_memory: every law holds." in done.stdout  # zoo laws
    assert all(f"{name}: every law holds." in done.stdout for name in ("ema", "dynamic_tanh", "layer_scale"))
    assert "missing  " in done.stdout  # zoo show
    report = (tmp_path / "page.html").read_text()
    assert "short_conv fading_memory" in report
    assert "Pareto" in report
    assert all((tmp_path / f"runs/{run}/result.json").exists() for run in ("focal", "tanh", "scale"))
    assert re.search(r"dynamic_tanh +y = w tanh\(a x\) \+ b", done.stdout)  # zoo list norms
    assert "--distance <str>" in done.stdout  # zoo bench reach --help
    assert (tmp_path / "runs/bench/reach.svg").exists()
    assert "helium-2b" in done.stdout  # zoo list models
    assert "2*(gqa(rope_base=100000.0, n_heads=4, head_dim=16, n_kv_heads=4) swiglu(d_hidden=160))" in done.stdout
    # new files have their pages without an edit
    assert "| [`fading_memory`](../words/fading_memory.md) |" in done.stdout
    assert "| any | 262,146 |" in done.stdout
    assert "inputs      3   1   6   4   2   0" in done.stdout
    assert "| `gamma` | float | `2.0` | 0 is cross entropy. |" in done.stdout
