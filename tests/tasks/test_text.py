"""Text: where rows come from, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import SPLITS
from zoo.tasks.text import BLOCK, START


@pytest.fixture
def file(tmp_path):
    """100 blocks, each of one byte's value."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(bytes([i]) * BLOCK for i in range(100)) + b"z" * 20)
    return path


def test_rows_are_windows_of_the_text(file):
    content = file.read_bytes()
    task = tasks.create_task("text", path=str(file), seq_len=24)
    for split in SPLITS:
        rows = task.sample(50, split=split, seed=0)
        assert (rows.inputs[:, 0] == START).all()
        assert torch.equal(rows.inputs[:, 1:], rows.targets[:, :-1])
        assert all(bytes(row.tolist()) in content for row in rows.targets)


def test_splits_are_disjoint_places(file):
    task = tasks.create_task("text", path=str(file), seq_len=24)
    values = {s: set(task.sample(3000, split=s, seed=0).targets.flatten().tolist()) for s in SPLITS}
    assert set.union(*values.values()) == set(range(100))
    assert sum(map(len, values.values())) == 100


def test_a_folder_is_all_its_files(tmp_path, file):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_bytes(b"\xe0" * BLOCK * 60)
    (tmp_path / ".hidden").write_bytes(b"\xf0" * BLOCK * 60)
    (tmp_path / "link").symlink_to(tmp_path / ".hidden")
    rows = tasks.create_task("text", path=str(tmp_path)).sample(3000, split="train", seed=0).targets
    assert (rows == 0xE0).all(1).any()
    assert not (rows == 0xF0).all(1).any()


def test_what_is_too_small_or_missing_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"x" * 100)
    for path, message in [
        ("short", f"100 bytes are too few .* at least {3 * 256:,}"),
        ("none", "there is no such file"),
    ]:
        with pytest.raises(tasks.UsageError, match=message):
            tasks.create_task("text", path=str(tmp_path / path))


def test_a_short_text_is_enough(tmp_path):
    """Three blocks of one row each are the least; the splits stay apart."""
    for size in (768, 800, 4000, 20_000, 120_000):
        content = np.random.default_rng(0).bytes(size)
        (tmp_path / "text").write_bytes(content)
        task = tasks.create_task("text", path=str(tmp_path / "text"), seq_len=256)
        seen = {}
        for split in SPLITS:
            starts = [content.index(bytes(row)) for row in task.sample(40, split=split, seed=0).targets.tolist()]
            seen[split] = {place for start in starts for place in range(start, start + 256)}
        assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    (tmp_path / "text").write_bytes(b"x" * 767)
    with pytest.raises(tasks.UsageError, match="the 767 bytes are too few for rows of seq_len=256 in each of three"):
        tasks.create_task("text", path=str(tmp_path / "text"), seq_len=256)


@pytest.mark.parametrize(("content", "message"), [("a\n".encode("utf-16"), "is UTF-16"), (b"\x1f\x8b\x08", "by gzip")])
def test_what_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content * 1000)
    for path in (tmp_path / "text", tmp_path):
        with pytest.raises(tasks.UsageError, match=f"text cannot be read: .*{message}"):
            tasks.create_task("text", path=str(path))


def test_the_default_is_english():
    rows = tasks.create_task("text").sample(200, split="train", seed=0).targets
    letters = torch.bincount(rows.flatten(), minlength=256).double()
    p = letters / letters.sum()
    assert p[ord("e")] > p[ord("t")] > p[ord("q")]
    assert 3.5 < -(p * p.clamp(min=1e-12).log()).sum() / math.log(2) < 5.5
