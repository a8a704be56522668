"""The pages under docs/ are whole: every word has its section, every link leads somewhere."""

from __future__ import annotations

import pathlib
import re

import zoo

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_every_mixer_has_one_section():
    pages = [page.read_text() for page in (DOCS / "mixers").glob("*.md")]
    sections = [name for page in pages for name in re.findall(r"^## `(\w+)`$", page, re.M)]
    assert sorted(sections) == sorted(zoo.list_mixers())


def test_the_index_names_every_page_and_word():
    index = (DOCS / "mixers" / "README.md").read_text()
    table = [line for line in index.splitlines() if line.startswith("| [")]
    words = [word for line in table for word in re.findall(r"`(\w+)`", line)]
    assert sorted(words) == sorted(zoo.list_mixers())
    linked = {name for line in table for name in re.findall(r"\((\w+\.md)\)", line)}
    assert linked == {page.name for page in (DOCS / "mixers").glob("*.md")} - {"README.md"}


def test_every_link_leads_somewhere():
    for page in [DOCS.parent / "README.md", *PAGES]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
