"""Makes all pages of the documentation as Markdown: those written by hand, and one for every registered thing.

    python docs/pages.py build/docs/pages && sphinx-build -W -c docs build/docs/pages build/docs/html

which `make docs` does. Mixers, tasks, objectives, models and recipes are enumerated, so that a new one has its page.
"""

from __future__ import annotations

import functools
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import zoo
from zoo.core.described import Described, described
from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.listing import all_options, listing
from zoo.objectives.base import objectives
from zoo.pattern import make_word, parse, to_text
from zoo.protocol import Mixer, Place, mixers
from zoo.recipes import headline, list_recipes, recipe_text
from zoo.report.benchmark import in_order
from zoo.report.units import size
from zoo.tasks.protocol import registry as tasks

DOCS = Path(__file__).resolve().parent
WIDTH = 256
CONTEXTS = {"1K": 2**10, "64K": 2**16, "1M": 2**20}
NOT_OF_MIXERS = {"families.md"}
"""Pages of results whose rows are named like mixers and are not about them."""
HELPERS = {"short_conv"}
"""A sequence mixer beside which another one's row is still about the other."""


# ---- text


def markdown(doc: str) -> str:
    """A docstring as Markdown: indented blocks become fenced ones, since those within may be fenced already."""
    lines = inspect.cleandoc(doc).splitlines()
    found: list[str] = []
    at = 0
    while at < len(lines):
        opens_block = lines[at].startswith("    ") and (not at or not lines[at - 1].strip())
        if not opens_block:
            found.append(lines[at])
            at += 1
            continue
        end = at
        while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
            end += 1
        block = textwrap.dedent("\n".join(lines[at:end])).strip("\n").splitlines()
        fence = block[0].startswith("```")
        found += [*fenced("\n".join(block[1:-1] if fence else block)), ""]
        at = end
    return "\n".join(found)


def fenced(text: str, language: str = "text") -> list[str]:
    """Text as a block of code."""
    return [f"```{language}", text.rstrip("\n"), "```"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of Markdown, with an empty line behind it."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines, ""]


def first_sentence(doc: str | None) -> str:
    """The first paragraph, as `zoo list` prints it."""
    return " ".join((inspect.cleandoc(doc or "")).split("\n\n")[0].split())


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|")


# ---- options


def options(config: type[Options]) -> list[str]:
    """A table of all options of a `Config` class."""
    return option_table(described(config))


def option_table(found: Iterable[Described]) -> list[str]:
    """A table of options."""
    rows = []
    for each in found:
        default = each.default if each.default == "required" else f"`{each.default}`"
        rows.append([f"`{each.name}`", cell(each.type), cell(default), cell(each.about)])
    return table(["option", "type", "default", "meaning"], rows) if rows else ["None.", ""]


# ---- mixers


class Family(NamedTuple):
    """A page under docs/mixers: what stands before its sections, and its sections by word, if it has any."""

    page: str
    title: str
    intro: str
    sections: dict[str, str]


@functools.cache
def families() -> list[Family]:
    """The pages about families of mixers."""
    found = []
    for path in sorted((DOCS / "mixers").glob("*.md")):
        if path.name != "README.md":
            intro, *rest = re.split(r"^## `(\w+)`\n", path.read_text(encoding="utf-8"), flags=re.M)
            title, _, intro = intro.partition("\n")
            found.append(
                Family(path.name, title.removeprefix("# "), intro, dict(zip(rest[::2], rest[1::2], strict=True)))
            )
    return found


def family_of(name: str) -> Family | None:
    """The family whose page has a section about a mixer; None if no page has one."""
    return next((family for family in families() if name in family.sections), None)


def built(name: str, width: int, length: int, options: Mapping[str, Any] = MappingProxyType({})) -> Mixer:
    """A mixer for rows of that length, without memory for its weights."""
    with torch.device("meta"):
        return zoo.create_mixer(name, width, place=Place(length=length), **options)


def costs(name: str) -> list[str]:
    """Parameters, FLOPs and state by the mixer's own formulas."""
    rows = []
    for label, context in CONTEXTS.items():
        mixer = built(name, WIDTH, context)
        n = sum(p.numel() for p in mixer.parameters())
        state = mixer.state_bytes(1, context, torch.float32)
        rows.append([label, f"{n:,}", f"{mixer.flops_per_token(context):,}", size(state) if state else "none"])
    if len({tuple(row[1:]) for row in rows}) == 1:
        rows = [["any", *rows[0][1:]]]
    head = ["context", "parameters", "FLOPs a token", "state of a sequence"]
    how = f"Computed by the mixer's own formulas, with the default options at width {WIDTH}, in float32."
    return [f"{how} The laws compare them with counted values.", "", *table(head, rows)]


EXCEPTIONS = {
    "not_compilable": "`torch.compile(fullgraph=True)` does not work",
    "not_compilable_packed": "`torch.compile(fullgraph=True)` does not work with packed documents",
    "couples_rows": "rows of a batch depend on each other, so laws 3, 9 and 10 do not apply",
    "work_varies": "the work of a step varies, and `flops_per_token` is its largest value",
}
"""The meaning of each trait by which a mixer declares that it does not keep a law."""


def exceptions(name: str) -> list[str]:
    """The laws that a mixer declares not to keep, over all its law cases."""
    cases = mixers[name].law_cases()
    found: dict[str, list[str]] = {}
    for case in cases:
        mixer = built(name, 32, 16, case)
        for attribute, meaning in EXCEPTIONS.items():
            if reason := getattr(mixer.traits, attribute):
                found.setdefault(f"{meaning}: {reason.rstrip('.')}.", []).append(f"`{to_text(make_word(name, case))}`")
    lines = []
    for meaning, where in found.items():
        lines.append(f"- {'Always' if len(where) == len(cases) else 'As ' + ', '.join(where)}: {meaning}")
    if not built(name, 32, 16).causal:
        lines.append("- It is not causal: it has no state, and the laws about states do not apply.")
    tested = f"Tested for [the laws](../concepts.md#the-laws) with {len(cases)} sets of options"
    return [f"{tested}{'. Declared exceptions:' if lines else ', without an exception.'}", "", *lines, ""]


class Found(NamedTuple):
    """A row of a table of the results."""

    page: Path
    title: str
    heading: str
    head: str
    row: str


@functools.cache
def result_rows() -> dict[str, list[Found]]:
    """All rows of all tables under docs/results, by the mixer that they are about."""
    found: dict[str, list[Found]] = {}
    for page in sorted((DOCS / "results").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.name in {"README.md", *NOT_OF_MIXERS}:
            continue
        title, heading, head = page.stem, "", ""
        # rows that are called otherwise: "name: `pattern`"
        aliases = dict(re.findall(r"^\| ([\w-]+): `([^`]+)` \|", text, re.M))
        lines = text.splitlines()
        for above, line in zip(["", *lines], lines, strict=False):
            if line.startswith("# "):
                title = line[2:]
            elif line.startswith("#"):
                heading = line.lstrip("# ")
            elif re.match(r"\|[\s:|-]+$", line):
                head = f"{above}\n{line}"
            elif line.startswith("|") and head:
                first = line.split("|")[1]
                for part in first.split(" = "):  # one layer under several names
                    if name := mixer_of_row(line.replace(first, f" {part.strip()} ", 1), aliases):
                        found.setdefault(name, []).append(Found(page, title, heading, head, line))
            elif not line.startswith("|"):
                head = ""
    return found


def mixer_of_row(row: str, aliases: dict[str, str]) -> str | None:
    """The mixer that a row is about: the only one in its first cells' pattern, or the word that it starts with."""
    for text in [part.strip(" *`") for part in row.strip("|").split("|")[:2]]:
        _, _, pattern = text.rpartition(": `")
        pattern = aliases.get(text, pattern).strip("`")
        try:
            words = {word.name for word in parse(pattern).words()}
        except UsageError:
            words = {re.split(r"[,:(\s]", pattern)[0]}
        about = {w for w in words if w in mixers and (mixers[w].kind == "sequence" or len(words) == 1)}
        about = about - HELPERS or about
        if len(about) == 1:
            return about.pop()
    return None


def measured(name: str) -> list[str]:
    """The rows of all tables of results that are about a mixer."""
    lines: list[str] = []
    groups: dict[tuple[Path, str, str, str], list[str]] = {}
    for found in result_rows().get(name, []):
        groups.setdefault(found[:-1], []).append(found.row)
    for (page, title, heading, head), rows in groups.items():
        link = f"[{title}](../results/{page.relative_to(DOCS / 'results')})"
        lines += [f"{link}{f', {heading}' if heading else ''}:", "", head, *rows, ""]
    return lines or ["No results yet. [Benchmarks](../benchmarks.md) says how to measure it with `zoo bench`.", ""]


def without_repeats(notes: str, before: str) -> str:
    """Notes without the blocks of equations most of which are already in the text before."""
    known = "".join(before.split())

    def kept(block: re.Match[str]) -> str:
        body = re.sub(r"^```\w*$", "", block[0], flags=re.M)
        equations = ["".join(part.split()) for part in re.split(r" ; |\n", body) if part.strip()]
        return "\n" if 2 * sum(equation in known for equation in equations) >= len(equations) else block[0]

    return re.sub(r"\n(?:\n(?: {4}.*\n)+|```\n(?:.*\n)*?```\n)", kept, notes)


def mixer_page(name: str) -> str:
    """Docstring, options, costs, exceptions, notes and results of one mixer."""
    cls = mixers[name]
    lines = [f"# `{name}`", ""]
    family = family_of(name)
    kind = "sequence mixer" if cls.kind == "sequence" else "channel mixer"
    where = f" of the family [{family.title}](../mixers/{family.page})" if family else ""
    lines += [f"A {kind}{where}: `{cls.__module__.replace('.', '/')}.py`.", "", markdown(cls.__doc__ or ""), ""]
    for base in cls.__mro__[1:]:
        if base.__module__ == cls.__module__ and issubclass(base, Mixer) and vars(base).get("__doc__"):
            lines += [markdown(base.__doc__ or ""), ""]
    if family:
        notes = without_repeats(family.sections[name], "\n".join(lines))
        notes = re.sub(r"\]\((\w+\.md)", r"](../mixers/\1", notes)
        lines += ["## Notes", "", notes.strip(), ""]
    lines += ["## Options", "", *options(cls.Config), "## Costs", "", *costs(name), "## Laws", "", *exceptions(name)]
    lines += ["## Measured", "", *measured(name)]
    return "\n".join(lines)


def word_links(names: Iterable[str], folder: str = "../words") -> list[str]:
    """A table of words, each with its line."""
    rows = [[f"[`{n}`]({folder}/{n}.md)", cell(first_sentence(mixers[n].__doc__))] for n in names]
    return table(["word", "what it is"], rows)


def mixer_pages() -> Iterator[tuple[str, str]]:
    """A page for every mixer, those of the families, and the index."""
    names = zoo.list_mixers()
    for name in names:
        yield f"words/{name}.md", mixer_page(name)
    for family in families():
        pages = list(family.sections)
        links = [*word_links(pages), *toctree([f"../words/{n}" for n in pages], hidden=True)] if pages else []
        yield f"mixers/{family.page}", "\n".join([f"# {family.title}", family.intro, *links])
    rest = [n for n in names if family_of(n) is None]
    text = (DOCS / "mixers" / "README.md").read_text(encoding="utf-8")
    lines = [re.sub(r"^\| \[.*", lambda row: re.sub(r"`(\w+)`", r"[`\1`](../words/\1.md)", row[0]), text, flags=re.M)]
    if rest:
        lines += ["## More words", "", *word_links(rest), *toctree([f"../words/{n}" for n in rest], hidden=True)]
    hidden = toctree([family.page.removesuffix(".md") for family in families()], hidden=True)
    yield "mixers/README.md", "\n".join([*lines, *hidden])


# ---- tasks, objectives, models, recipes


def task_page(name: str) -> str:
    """Docstring, drawing and options of one task."""
    cls = tasks[name]
    lines = [f"# `{name}`", "", f"Layout `{cls.layout}`; `{cls.__module__.replace('.', '/')}.py`.", ""]
    lines += [markdown(cls.__doc__ or ""), "", "## An example", "", f"`zoo show {name}`:", ""]
    try:
        task = cls(cls.Config())
        drawing = task.render(task.sample(1, split="train", seed=0))
    except UsageError as refused:
        drawing = f"The task needs options: {refused}"
    lines += [*fenced(drawing), ""]
    if cls.overlap:
        lines += [f"Splits are not disjoint: {cls.overlap}", ""]
    return "\n".join([*lines, "## Options", "", *options(cls.Config)])


def task_pages() -> Iterator[tuple[str, str]]:
    """A page for every task, and the index."""
    names = tasks.names()
    for name in names:
        yield f"tasks/{name}.md", task_page(name)
    rows = [[f"[`{n}`](tasks/{n}.md)", tasks[n].layout, cell(first_sentence(tasks[n].__doc__))] for n in names]
    index = table(["task", "layout", "what the model does"], rows)
    text = (DOCS / "tasks.md").read_text(encoding="utf-8")
    yield "tasks.md", inserted(text, index) + "\n".join(toctree([f"tasks/{n}" for n in names], hidden=True))


def objective_pages() -> Iterator[tuple[str, str]]:
    """A page for every objective."""
    for name in objectives.names():
        cls = objectives[name]
        lines = [f"# `{name}`", "", f"`{cls.__module__.replace('.', '/')}.py`.", "", markdown(cls.__doc__ or "")]
        yield f"objectives/{name}.md", "\n".join([*lines, "", "## Options", "", *options(cls.Config)])
    rows = [[f"[`{n}`](objectives/{n}.md)", cell(first_sentence(objectives[n].__doc__))] for n in objectives.names()]
    text = (DOCS / "objectives.md").read_text(encoding="utf-8")
    index = ["", "## Options and losses", "", *table(["objective", "what it is"], rows)]
    hidden = toctree([f"objectives/{n}" for n in objectives.names()], hidden=True)
    yield "objectives.md", "\n".join([text, *index, *hidden])


def model_page() -> Iterator[tuple[str, str]]:
    """The published families."""
    rows = [[f"`{m['name']}`", str(m["d_model"]), f"`{cell(m['pattern'])}`"] for m in listing("models")]
    about = (
        "# Published models\n\n"
        "Each is a pattern, a set of sizes and a weight map: `zoo.create_model(name)`, or `model=name` in a recipe.\n"
        "[Families](results/families.md) lists the differences from the public code.\n"
    )
    yield "models.md", "\n".join([about, *table(["model", "width", "pattern"], rows)])


def recipe_pages() -> Iterator[tuple[str, str]]:
    """A page for every recipe, as the file stands."""
    names = list_recipes()
    for name in names:
        text = (resources.files("zoo.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        lines = [f"# {name}", "", *fenced(f"zoo train {name}", "sh"), "", *fenced(text, "yaml"), ""]
        yield f"recipes/{name}.md", "\n".join(lines)
    rows = [[f"[{name}](recipes/{name}.md)", cell(headline(recipe_text(name)))] for name in names]
    about = (
        "# Recipes\n\n"
        "Experiments that ship with the package: `zoo train NAME`. `key=value` changes any key.\n"
        "[Results](results/recipes.md) has their scores and times. Begin your own experiments from `start`:\n"
        "it has no time budget, and its learning rate and schedule suit most models.\n"
    )
    hidden = toctree([f"recipes/{name}" for name in names], hidden=True)
    yield "recipes.md", "\n".join([about, *table(["recipe", "what it is"], rows), *hidden])


def benchmark_page() -> Iterator[tuple[str, str]]:
    """How to read benchmarks, and the options of each."""
    lines = [(DOCS / "benchmarks.md").read_text(encoding="utf-8"), "## Options", ""]
    for cls in in_order():
        lines += [f"### `zoo bench {cls.label()}`", "", first_sentence(cls.__doc__), "", *options(cls.Config)]
    yield "benchmarks.md", "\n".join(lines)


# ---- the rest


def toctree(pages: Sequence[str], *, hidden: bool = False, caption: str = "") -> list[str]:
    """Sphinx's table of pages."""
    says = [*([":hidden:"] if hidden else []), *([f":caption: {caption}"] if caption else [])]
    return ["", "```{toctree}", *says, ":maxdepth: 1", "", *pages, "```", ""]


def inserted(text: str, lines: Sequence[str]) -> str:
    """A page with lines before its first section."""
    head, mark, rest = text.partition("\n## ")
    return "\n".join([head, *lines]) + mark + rest


def start_page() -> Iterator[tuple[str, str]]:
    """README.md with the table of all pages, CONTRIBUTING.md, and the index of the results."""
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/results/\)", "](results/README.md)", text)
    text = re.sub(r"\[docs/([\w/]+?)/?(?:\.md)?\]\(", r"[\1](", text)  # the site has no folder docs
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\[([^\]]+)\]\((?:(?:zoo|tasks|tests|benchmarks)/[^)]*|CITATION\.cff)\)", r"`\1`", text)
    text = text.replace("[CONTRIBUTING.md](CONTRIBUTING.md)", "[Contributing](contributing.md)")
    trees = {
        "Start": [
            "Start <self>",
            "tutorial",
            "concepts",
            "training",
            "scale",
            "data",
            "continuous",
            "tracking",
            "adding",
            "install-gpu",
            "limits",
            "contributing",
        ],
        "Reference": ["options", "files"],
        "What there is": ["mixers/README", "attention", "tasks", "objectives", "models", "recipes"],
        "Measuring": ["sweeps", "statistics", "benchmarks", "report", "results/README"],
    }
    hidden = [line for caption, pages in trees.items() for line in toctree(pages, hidden=True, caption=caption)]
    yield "index.md", "\n".join([text, *hidden])
    text = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.sub(r"\[docs/(\w+)\.md\]\(", r"[\1](", text)
    yield "contributing.md", text.replace("](docs/", "](")
    results = DOCS / "results"
    found = sorted(str(page.relative_to(results).with_suffix("")) for page in results.rglob("*.md"))
    text = (results / "README.md").read_text(encoding="utf-8")
    yield "results/README.md", "\n".join([text, *toctree([page for page in found if page != "README"], hidden=True)])


def section_options(section: str) -> list[str]:
    """A table of the options of a section of an experiment or a sweep, as `zoo list options` names them."""
    prefix = "" if section == "experiment" else f"{section}."
    inside = [each for each in all_options() if each.name.startswith(prefix)]
    own = [each._replace(name=each.name.removeprefix(prefix)) for each in inside]
    return option_table([each for each in own if "." not in each.name and each.name != "sweep"])


def filled(text: str) -> str:
    """A page with its comments replaced: `<!-- file: NAME -->`, `<!-- options: SECTION -->`."""

    def contents(match: re.Match[str]) -> str:
        path = DOCS / match[1]
        language = {".py": "python", ".cpp": "cpp", ".yaml": "yaml"}.get(path.suffix, "text")
        return "\n".join(fenced(path.read_text(encoding="utf-8"), language))

    text = re.sub(r"<!-- options: (\S+) -->", lambda m: "\n".join(section_options(m[1])).rstrip("\n"), text)
    return re.sub(r"<!-- file: (\S+) -->", contents, text)


def tutorial_page(folder: Path) -> None:
    """The tutorial with the outputs of its full run (`make tutorial`), where that is there; else without outputs."""
    page, run = folder / "tutorial.md", folder / "tutorial_run" / "tutorial.md"
    text = (run if run.exists() else page).read_text(encoding="utf-8")
    run.unlink(missing_ok=True)
    text = re.sub(r"!\[png\]\((\w+\.png)\)", r"![Drawn by the cell above](tutorial_run/\1)", text)
    text = text.replace("](../", "](").replace("```python", "```ipython3")
    page.write_text(text, encoding="utf-8")  # cells have lines of the shell


MAKERS: tuple[Callable[[], Iterator[tuple[str, str]]], ...] = (
    start_page,
    mixer_pages,
    task_pages,
    objective_pages,
    model_page,
    recipe_pages,
    benchmark_page,
)


def write(folder: Path) -> None:
    """Write every page into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("conf.py", "pages.py", "__pycache__", "static"))
    tutorial_page(folder)
    for path in folder.glob("*.md"):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    for make in MAKERS:
        for name, text in make():
            page = folder / name
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
