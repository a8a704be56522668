"""The task `text` from token shards and from JSON lines: rows, splits, memory, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.cli import main
from zoo.core.errors import UsageError
from zoo.tasks import create_task
from zoo.tasks.protocol import SPLITS

N = 60_000


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ramp(dtype="uint32", n=N, start=0):
    """Tokens that are their own places."""
    return np.arange(start, start + n, dtype=dtype)


def head(magic: int, n: int) -> bytes:
    return np.array([magic, 1, n, *[0] * 253], dtype="<i4").tobytes()


WRITTEN = {
    "a.npy": lambda path: np.save(path, ramp("uint16")),
    "b.npy": lambda path: np.save(path, ramp("uint32")),
    "c.bin": lambda path: path.write_bytes(ramp("<u2").tobytes()),
    "d.bin": lambda path: path.write_bytes(head(20240520, N) + ramp("<u2").tobytes()),
    "e.bin": lambda path: path.write_bytes(head(20240801, N) + ramp("<u4").tobytes()),
}


def lines(path: str, texts, **more) -> str:
    Path(path).write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer() -> str:
    """Words of four digits, each its own token; the end is the last of 501."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"{i:04}": i for i in range(499)} | {"?": 499, "<end>": 500}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save("tokenizer.json")
    return "tokenizer.json"


def numbered(n: int, words: int) -> list[str]:
    return [" ".join(f"{(i * words + j) % 499:04}" for j in range(words)) for i in range(n)]


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_of_shards_are_windows(name):
    WRITTEN[name](Path(name))
    task = create_task("text", path=name, vocab_size=N, seq_len=32)
    batch = task.sample(20, split="train", seed=0)
    assert (batch.inputs.diff(dim=1) == 1).all()
    assert torch.equal(batch.targets, batch.inputs + 1)
    again = task.sample(5, split="train", seed=0, start=15)
    assert torch.equal(again.inputs, batch.inputs[15:])
    assert not torch.equal(task.sample(20, split="train", seed=1).inputs, batch.inputs)
    assert "inputs" in task.render(batch)


def test_shards_of_a_folder_have_disjoint_splits_and_rows_within_one_file():
    Path("shards").mkdir()
    for i in range(3):
        np.save(f"shards/{i}.npy", ramp(start=1_000_000 * i, n=150_000))
    Path("shards/meta.json").write_text("{}")
    task = create_task("text", path="shards", vocab_size=3_000_000, seq_len=64)
    seen = {}
    for split in SPLITS:
        tokens = task.sample(2000, split=split, seed=0)
        assert (tokens.targets - tokens.inputs == 1).all()
        seen[split] = set(tokens.targets.flatten().tolist())
        assert {token // 1_000_000 for token in seen[split]} == {0, 1, 2}
    assert not seen["train"] & seen["validation"] | seen["train"] & seen["test"] | seen["validation"] & seen["test"]


def test_more_shards_leave_the_splits_of_the_first_as_they_are():
    Path("shards").mkdir()
    splits = []
    for i in range(2):
        np.save(f"shards/{i}.npy", ramp(start=1_000_000 * i, n=400_000))
        task = create_task("text", path="shards", vocab_size=3_000_000, seq_len=64)
        tokens = task.sample(4000, split="test", seed=0).inputs.flatten()
        splits.append({t // 4096 for t in tokens.tolist() if t < 400_000})
    assert splits[1] <= splits[0] != set()


def test_rows_of_json_lines_are_windows_of_documents(tokenizer):
    texts = numbered(300, 40)
    task = create_task("text", path=lines("a.jsonl", texts), tokenizer=tokenizer, end_token="<end>", seq_len=30)
    assert task.vocab_size == 501
    words = {split: task.sample(400, split=split, seed=0) for split in SPLITS}
    starts, ends = [int(text[:4]) for text in texts], [int(text[-4:]) for text in texts]
    for batch in words.values():
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        before, after = batch.inputs, batch.targets
        inside = (before != 500) & (after != 500)
        assert ((after - before)[inside] % 499 == 1).all()
        assert set(before[after == 500].tolist()) <= set(ends)
        assert set(after[before == 500].tolist()) <= set(starts)
        assert (before == 500).any()
    assert torch.equal(task.sample(7, split="train", seed=0, start=9).inputs, words["train"].inputs[9:16])
    assert "text      0" in task.render(words["train"])


def test_splits_of_json_lines_are_disjoint_documents_and_long_ones_count_by_their_length():
    texts = [chr(65 + i % 26) + f"{i:05}" * 3 for i in range(400)] + [f"{'z' * 40_000}"]
    task = create_task("text", path=lines("a.jsonl", texts), field="text", seq_len=16)
    assert (task.vocab_size, task.token_is_byte) == (257, True)
    said = {s: {bytes(r.tolist()[:6]) for r in task.sample(500, split=s, seed=0).inputs if r[0] < 91} for s in SPLITS}
    assert all(said.values())
    assert sum(map(len, said.values())) == len(set.union(*said.values()))
    z = {s: (task.sample(100, split=s, seed=0).inputs[:, 0] == ord("z")).double().mean().item() for s in SPLITS}
    assert 0.7 < max(z.values()) < 1  # of the split that holds it: most bytes are its
    assert sorted(z.values())[:2] == [0, 0]


def test_memory_does_not_grow_with_the_size_of_the_files(tokenizer):
    """Files of 1 and of 64 MB, and of half a terabyte that a sparse file only claims."""
    peaks = {}
    for n in (1, 64):
        with open(f"{n}.jsonl", "w") as file:
            text = lines(f"part-{n}", numbered(50, 800))
            file.write(Path(text).read_text() * (5 * n))
        peaks[f"{n}.jsonl"] = _peak(path=f"{n}.jsonl", tokenizer=tokenizer)
    for n in (2**20, 2**39):
        with open(f"{n}.bin", "wb") as file:
            file.truncate(n)
        peaks[f"{n}.bin"] = _peak(path=f"{n}.bin", vocab_size=7)
    assert Path("64.jsonl").stat().st_size > 60e6
    assert max(peaks.values()) < 2.5e6
    assert peaks["64.jsonl"] < 1.5 * peaks["1.jsonl"] + 2e5
    assert peaks[f"{2**39}.bin"] < 1.5 * peaks[f"{2**20}.bin"] + 2e5


def _peak(**options) -> int:
    tracemalloc.start()
    try:
        task = create_task("text", seq_len=64, **options)
        for split in SPLITS:
            assert task.sample(64, split=split, seed=0).inputs.shape == (64, 64)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


GOOD = [json.dumps({"text": f"a document number {i}"}) for i in range(60)]


def damaged(line: str | bytes, at: int = 0) -> bytes:
    new = [each.encode() for each in GOOD]
    new[at] = line if isinstance(line, bytes) else line.encode()
    return b"\n".join(new) + b"\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "cut', "this is no JSON"),
        ("[1, 2]", r"this line holds a list, where an object with the field 'text' is expected \(task\.field\)"),
        ('{"body": "x"}', r"this line holds the fields \['body'\], where"),
        ('{"text": 3}', "text is 3, not a text"),
        (b'{"text": "\xff"}', r"this is no UTF-8 text \(the byte 0xff\)"),
        ("[" * 100_000, r"this is no JSON"),
    ],
)
@pytest.mark.parametrize("at", [0, 37])
def test_a_damaged_line_is_refused_by_its_number(line, told, at):
    Path("a.jsonl").write_bytes(damaged(line, at))

    def read():
        task = create_task("text", path="a.jsonl", field="text", seq_len=8)
        for split in SPLITS:
            task.sample(300, split=split, seed=0)

    with pytest.raises(UsageError, match=rf"^a\.jsonl:{at + 1}: {told}[^\n]*$"):
        read()


def write(name: str, content) -> str:
    path = Path(name)
    np.save(path, content) if isinstance(content, np.ndarray) else path.write_bytes(content)
    return name


@pytest.mark.parametrize(
    ("name", "content", "options", "told"),
    [
        ("a.bin", b"", {"vocab_size": 9}, r"a\.bin cannot be read: it is empty"),
        ("a.bin", b"abc", {"vocab_size": 9}, r"its 3 bytes of tokens are no whole number of uint16 \(see dtype\)"),
        ("a.bin", b"ab" * 8, {"vocab_size": 9}, "text: the 8 tokens are too few for rows of seq_len=8"),
        ("a.bin", head(20240520, 0), {"vocab_size": 9}, "its 0 bytes of tokens are no whole number"),
        (
            "a.bin",
            head(20240520, 4) + b"abcd",
            {"vocab_size": 9, "dtype": "uint32"},
            "its head says uint16, and dtype=uint32",
        ),
        ("a.bin", b"ab" * 800, {}, r"a\.bin is a file of token ids by its name: its tokens need vocab_size"),
        ("a.bin", b"ab" * 800, {"dtype": "uint16"}, "holds token shards: vocab_size, or a tokenizer, has to be given"),
        (
            "a.npy",
            ramp("int64"),
            {"vocab_size": 9},
            r"it holds int64 of shape \(60000,\), not one row of uint16 or uint32",
        ),
        ("a.npy", ramp("uint16").reshape(2, -1), {"vocab_size": 9}, r"it holds uint16 of shape \(2, 30000\)"),
        ("a.npy", np.array([{}]), {"vocab_size": 9}, r"a\.npy cannot be read"),
        ("a.npy", b"\x93NUMPY no", {"vocab_size": 9}, r"a\.npy cannot be read"),
        ("a.npy", ramp("uint16", 0), {"vocab_size": 9}, "it holds no token"),
        ("a.npy", ramp("uint16"), {"vocab_size": 9, "dtype": "uint32"}, "it holds uint16, and dtype=uint32 was given"),
        ("a.jsonl", b"", {"field": "text"}, r"a\.jsonl cannot be read: it is empty"),
        ("a.jsonl", b'{"text": "x"}\n' * 2, {"field": "text"}, r"the 2 documents of a\.jsonl are too few"),
        ("a.jsonl", b"\n\n", {"field": "text"}, r"the 0 documents of a\.jsonl are too few"),
        ("a.jsonl", b"\x1f\x8b\x08", {"field": "text"}, "it is compressed by gzip"),
        ("a.jsonl", b"{}\n", {"field": "text", "end_token": "x"}, "end_token='x' goes with tokenizer"),
        (
            "a.txt",
            b"text " * 999,
            {"field": "text"},
            r"field goes with a path of JSON lines \(\.jsonl, \.ndjson\) or of token",
        ),
        ("a.txt", b"text " * 999, {"vocab_size": 9}, "vocab_size goes with a path of JSON lines"),
        ("a.txt", b"text " * 999, {"path": None, "tokenizer": "x"}, "tokenizer goes with a path of JSON lines"),
        ("a.bin", b"ab", {"path": "none.bin", "vocab_size": 9}, r"none\.bin cannot be read: there is no such file"),
    ],
)
def test_files_that_are_none_are_refused_in_one_line(name, content, options, told):
    with pytest.raises(UsageError, match=told) as error:
        create_task("text", **{"path": write(name, content), "seq_len": 8, **options})
    assert "\n" not in str(error.value)


def test_a_token_out_of_the_vocabulary_is_refused_by_its_place():
    tokens = np.zeros(N, dtype=np.uint16)
    tokens[5000:] = 9
    np.save("a.npy", tokens)
    task = create_task("text", path="a.npy", vocab_size=9, seq_len=32)
    with pytest.raises(
        UsageError, match=r"^a\.npy: the token [\d,]+ \(from 0\) is 9, which is not below vocab_size=9: [^\n]*$"
    ):
        task.sample(100, split="train", seed=0)


TRAIN = ["model=short_conv mlp", "model.d_model=16", "task.seq_len=16", "train.steps=6", "train.batch_size=4"]
TRAIN += ["train.eval_rows=8", "train.test_rows=8", "train.threads=1"]


def test_the_command_trains_on_both_and_resumes(tokenizer, capsys):
    np.save("a.npy", ramp("uint16", 40_000) % 500)
    lines("a.jsonl", numbered(100, 60))
    for name, options in (
        ("shards", ["task.path=a.npy", "task.vocab_size=500"]),
        ("lines", ["task.path=a.jsonl", f"task.tokenizer={tokenizer}"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["train", "start", "task=text", *options, *TRAIN, f"out={name}", "--quiet"])
        assert ended.value.code == 0
        assert "finished at step 6" in capsys.readouterr().out
        result = json.loads(Path(name, "result.json").read_text())
        assert "bits_per_byte" not in result["test"]
        assert result["model"]["vocab_size"] == {"shards": 500, "lines": 502}[name]
        with pytest.raises(SystemExit) as ended:
            main(["eval", name])
        assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["train", "start", "task=text", "task.path=a.npy", *TRAIN])
    assert ended.value.code == 2
    assert "its tokens need vocab_size" in capsys.readouterr().err


def test_a_run_on_shards_resumes_to_the_same_bits(tokenizer):
    from zoo.training.stopping import Interrupted

    class Cut(zoo.Callback):
        def on_log(self, record):
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    lines("a.jsonl", numbered(100, 60))
    task = {"name": "text", "path": "a.jsonl", "tokenizer": tokenizer, "seq_len": 16}
    train = {"steps": 8, "batch_size": 4, "eval_rows": 8, "test_rows": 8, "log_every": 5, "threads": 1}
    experiment = {"task": task, "model": {"pattern": "short_conv mlp", "d_model": 16}, "train": train}
    whole = zoo.train({**experiment, "out": "whole"}, quiet=True)
    with pytest.raises(Interrupted):
        zoo.train({**experiment, "out": "cut"}, callbacks=[Cut()], quiet=True)
    assert zoo.train({**experiment, "out": "cut"}, quiet=True).metrics == whole.metrics
