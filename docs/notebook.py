"""Executes the tutorial, a notebook in Markdown, and writes it with its outputs as Markdown and pictures.

    python docs/notebook.py build/docs/tutorial                  toy size, a minute: does everything work?
    python docs/notebook.py docs/tutorial_run --full             the study itself, whose outputs are committed

The cells run in an empty folder. A run that was killed continues with `--work FOLDER`, which keeps it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

SOURCE = Path(__file__).resolve().parent / "tutorial.md"
SIZE = 'SIZE = "full"'


def cells(text: str) -> list[str]:
    """The code cells of a page."""
    return [cell.source for cell in jupytext.reads(text, fmt="md").cells if cell.cell_type == "code"]


def execute(source: str, work: Path, *, toy: bool) -> nbformat.NotebookNode:
    """A notebook with the outputs of its cells, which run in the folder `work`."""
    text = source.replace(SIZE, SIZE.replace("full", "toy"), 1) if toy else source
    notebook = jupytext.reads(text, fmt="md")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # where `zoo` is
    environment = {**os.environ, "PATH": path, "COLUMNS": "100"}
    resources = {"metadata": {"path": str(work)}}
    client = NotebookClient(notebook, kernel_name="python3", resources=resources, coalesce_streams=True)
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def write(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """The notebook as `tutorial.md`, beside its pictures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, data in resources.get("outputs", {}).items():
        (folder / name).write_bytes(data)
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours, which a kernel makes commands print
    text = re.sub(r"\]\((\w+\.md)", r"](../\1", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    (folder / "tutorial.md").write_text(text.strip() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the tutorial.")
    parser.add_argument("out", type=Path, help="folder for the page and its pictures, emptied first")
    parser.add_argument("--full", action="store_true", help="the whole study, not its toy size")
    parser.add_argument("--work", type=Path, help="folder in which the cells run, kept; by default one that is deleted")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        write(execute(SOURCE.read_text(encoding="utf-8"), work, toy=not given.full), given.out)
    seconds = time.perf_counter() - started
    print(f"{given.out}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
