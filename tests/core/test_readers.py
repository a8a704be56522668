"""Files that nobody vouches for: every reader refuses what is no file in one line, and waits for nothing."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import forked
import pytest

import zoo
from zoo import tasks
from zoo.core.errors import UsageError
from zoo.core.readers import check_path, parse_json, read_bytes, read_json, read_text, regular
from zoo.interop import rwkv


def task(name: str, option: str = "path", **options):
    return lambda path, folder: tasks.create_task(name, **{option: str(path)}, **options)


def beside(name: str):
    """Reads a checkpoint folder, in which `name` is a link to the path."""

    def read(path, folder):
        folder = zoo.to_hf(zoo.create_model("llama3-tiny"), folder / "published")
        (folder / "model.safetensors").unlink()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(path)
        return zoo.from_hf(folder)

    return read


def questions(folder: Path) -> str:
    (folder / "questions.jsonl").write_text('{"input": "a", "outputs": ["b"]}\n')
    return str(folder / "questions.jsonl")


READERS = {
    "sudoku": task("sudoku"),
    "maze": task("maze"),
    "niah": task("niah"),
    "tokenizer": lambda path, folder: tasks.create_task("niah", path=questions(folder), tokenizer=str(path)),
    "babilong": task("babilong"),
    "code_trace": task("code_trace"),
    "text": task("text"),
    "rwkv": lambda path, folder: rwkv.from_authors(path),
}
BESIDE = {
    name: beside(name)
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
}


def a_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


def a_socket(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
    return str(folder / "s")


def a_folder(folder: Path) -> str:
    (folder / "folder").mkdir()
    return str(folder / "folder")


WRONG = {
    "pipe": (a_pipe, "it is no file but a pipe; write what comes through it to a file first"),
    "socket": (a_socket, "it is no file but a socket"),
    "device": (lambda folder: "/dev/zero", "it is no file but a device"),
    "folder": (a_folder, "it is no file but a folder"),
    "nowhere": (lambda folder: str(folder / "none"), "there is no such file"),
}
NAMES = {
    "nul": ("a\0b", "no file can have such a name|no character NUL"),
    "half": ("a\ud800b", "no file can have such a name"),
    "long": ("a" * 300, "File name too long"),
    "lines": ("a\nb\x1b[31m", "there is no such file"),
}


def refusal(reader: str, path, folder: Path) -> str:
    with pytest.raises(tasks.UsageError) as error:
        {**READERS, **BESIDE}[reader](path, folder)
    text = str(error.value)
    assert text.isprintable(), text
    assert len(text) < 700
    return text


@pytest.mark.skipif(os.name != "posix", reason="pipes and sockets by name")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("reader", [*READERS, *BESIDE])
def test_what_is_no_file_is_refused_at_once(reader, wrong, tmp_path):
    make, message = WRONG[wrong]
    path = make(tmp_path)
    if (reader, wrong) == ("text", "folder"):
        message = "holds no file"  # it reads folders, and this one is empty
    if reader in BESIDE and wrong == "nowhere":
        message = "holds no|there is no such file"  # a link to nowhere
    told = refusal(reader, path, tmp_path)
    assert any(part in told for part in message.split("|")), told


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reader", READERS)
def test_names_that_no_file_has(reader, name, tmp_path):
    given, message = NAMES[name]
    told = refusal(reader, given, tmp_path)
    assert any(part in told for part in message.split("|")), told


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="process substitution")
@pytest.mark.parametrize("reader", READERS)
def test_process_substitution_is_named(reader, tmp_path):
    ours, theirs = os.pipe()
    try:
        assert "it is no file but a pipe" in refusal(reader, f"/dev/fd/{ours}", tmp_path)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("reader", ["sudoku", "maze", "niah", "babilong", "code_trace"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n2\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "it is compressed by gzip; unpack it first"),
        (b"PK\x03\x04abc", "it is a ZIP archive; unpack it first"),
        (b"# a\n\xff\n", ":2: this is no UTF-8 text (the byte 0xff)"),
        (b"# a\n\n\0", ":3: this is no UTF-8 text (the byte 0x00)"),
    ],
)
def test_what_is_no_text_is_named(reader, content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert message in refusal(reader, path, tmp_path)


def test_limits(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, most=5) == b"12345"
    assert regular(path, most=5) == path
    for read in (read_bytes, read_text, read_json, regular):
        with pytest.raises(tasks.UsageError, match="file cannot be read: it has more than 4 bytes"):
            read(path, most=4)
    with open(path, "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    for reader in READERS.keys() - {"rwkv"}:
        assert "it has more than" in refusal(reader, path, tmp_path)


def test_files_without_a_size(tmp_path):
    """Those of /proc tell 0 bytes and hold more."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    with pytest.raises(tasks.UsageError, match="it has more than 10 bytes"):
        read_bytes("/proc/self/status", most=10)
    with pytest.raises(tasks.UsageError, match="/proc/self/mem cannot be read"):
        read_bytes("/proc/self/mem")


def test_a_pipe_without_a_writer_ends_no_command_late(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", f"from zoo.core.readers import read_bytes; read_bytes({str(tmp_path / 'pipe')!r})"]
    done = forked.run(command, timeout=60)
    assert "it is no file but a pipe" in done.stderr


def test_text_with_and_without_a_mark(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "file").write_bytes("é\r\n\u2028".encode(encoding))
        assert read_text(tmp_path / "file") == "é\r\n\u2028"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "f:3: this is no JSON that can be read (it is nested too deeply)"),
        ("9" * 5000, "f:3: this is no JSON that can be read (a number has too many digits)"),
        ("[1,\n2", "f:4: this is no JSON (Expecting ',' delimiter)"),
        ("[NaN]", "f:3: this is no JSON that can be read (NaN is no number)"),
        ("", "f:3: this is no JSON (Expecting value)"),
    ],
)
def test_what_is_no_json_is_named(text, message):
    def no_constant(name):
        raise ValueError(f"{name} is no number")

    with pytest.raises(tasks.UsageError) as error:
        parse_json("f", text, 3, parse_constant=no_constant)
    assert str(error.value) == message + "."


@pytest.mark.parametrize("given", [5, None, ["runs"]])
def test_what_is_no_path_is_refused(given):
    with pytest.raises(UsageError, match="should be a path"):
        check_path(given)
