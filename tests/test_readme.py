"""The README's code runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.training.recipes import read_experiments

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line for language, code in BLOCKS if language == "sh" for line in code.splitlines() if line.startswith("zoo ")
]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: next(w for w in code.split("\n") if "=" in w)[:40])
def test_python_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_pattern_block_parses() -> None:
    from zoo.pattern import parse, to_text

    lines = next(code for language, code in BLOCKS if not language and "mamba2 swiglu" in code).splitlines()
    patterns = [re.split(r"\s{2,}", line)[0] for line in lines]
    assert len(patterns) > 4
    for text in patterns:
        assert to_text(parse(text)) == text


@pytest.mark.parametrize("variants", ["the-first", pytest.param("every", marks=pytest.mark.slow)])
def test_commands_run_in_order(
    variants: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every variant of a comparison is trained in a process of its own, seven processor seconds each."""
    monkeypatch.chdir(tmp_path)
    assert COMMANDS
    for line in COMMANDS:
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "train":  # the same command, cut short
            words += ["train.steps=2", "train.eval_rows=8", "train.test_rows=8", "task.n_puzzles=20"]
            names = [name for name in read_experiments(words[1]) if name]
            if variants == "the-first" and names:
                words += ["--variant", names[0]]
        with pytest.raises(SystemExit) as done:
            main(words)
        assert done.value.code in (0, None), f"{line}: {capsys.readouterr().err}"
    assert (tmp_path / "runs/readme/report.html").stat().st_size > 10_000


def test_tree_names_every_folder() -> None:
    tree = next(code for language, code in BLOCKS if "channel_mixers/" in code)
    root = README.parent
    packages = [p.parent for p in root.glob("zoo/*/__init__.py") if not p.parent.is_symlink()]
    assert packages
    for folder in packages:
        assert f"  {folder.name}/" in tree
