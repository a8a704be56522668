"""The study of decoding before and now: its comparison, its page, and a folder that is no checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.benchmarks.studies import decode_turns


@pytest.mark.slow
def test_a_tree_is_compared_with_itself():
    tree = Path(__file__).parents[1]
    row = decode_turns.compared(tree, tree, "mha", turns=3, tokens=4)
    assert row["other"] > 0 < row["own"]
    assert row["ratio"] == sorted(row["ratio"])


def test_the_page_and_a_folder_that_is_no_checkout(tmp_path, capsys):
    machine = {"cpu": "one", "versions": {"torch": "2"}}
    data = {"machine": machine, "commit": "abc", "turns": 3, "tokens": 4, "load": 1.5}
    row = {"other": 2.0, "own": 1.0, "ratio": [1.9, 2.0, 2.1]}
    text = decode_turns.markdown({**data, "patterns": {"mha": row}})
    assert "torch 2, 1.5 processes at work" in text
    assert "| `mha` | 2.00 | 1.00 | 2.00 (1.90 to 2.10) |" in text
    with pytest.raises(SystemExit) as stopped:
        decode_turns.STUDY.main([str(tmp_path), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is no checkout of this project" in capsys.readouterr().err
