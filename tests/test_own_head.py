"""The example of docs/continuous.md runs as it stands and learns; so does the page's own code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_example_learns(capsys):
    found = runpy.run_path(str(DOCS / "examples" / "own_head.py"))
    assert found["accuracy"] > 0.9
    assert "policy: features (4, 32)" in capsys.readouterr().out


def test_the_page_s_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "continuous.md").read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(compile(code, "continuous.md", "exec"), scope)
    assert scope["y"].shape == (8, 2)
