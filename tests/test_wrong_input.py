"""Generated wrong input, for every option of everything that can be named: an answer or one line, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest
import torch

import zoo
from zoo.cli import main
from zoo.models.config import ModelConfig, Recursion
from zoo.objectives.base import objectives
from zoo.pattern import create_mixer
from zoo.protocol import mixers
from zoo.tasks.protocol import create_task
from zoo.tasks.protocol import registry as tasks
from zoo.training.options import Experiment
from zoo.training.recipes import parse_value, read_experiment
from zoo.training.train_options import TrainConfig

DEEP: Any = 1
for _ in range(400):
    DEEP = [DEEP]

NUMBERS = [-1, 0, 1, 2, 3, 7, 2**24, 2**24 + 1, 2**31, 2**63, 10**20, 10**400, -(2**63)]
NUMBERS += [0.0, 0.5, -0.5, 1.5, 1e30, 1e308, -1e308, 1e-320, float("inf"), float("nan")]
TEXTS = ["", "x", "a\0b", "x" * 300, "\udcff", "\u2028", "../x", ".", "/dev/zero", "empty", "noise", "2024-99-99"]
OTHERS = [[], [1], [0, 1], [1, 2, 3], [10**20], [[1]], ["x"], {}, {"a": 1}, {1: 2}, None, True, False, DEEP]
VALUES: list[Any] = [*NUMBERS, *TEXTS, *OTHERS]

PLAIN = {"task": {"name": "mqar", "vocab_size": 64, "seq_len": 16, "n_pairs": 2}, "model": {"pattern": "mha mlp"}}
FILLED = {"task": {"name": "sudoku", "size": 4}, "model": {"pattern": "mha mlp", "d_model": 16, "causal": False}}
THINKING = {**FILLED, "model": {**FILLED["model"], "recursion": {}}, "objective": "deep_supervision"}
BASES = {"next_token": PLAIN, "masked_diffusion": {**FILLED, "objective": "masked_diffusion"}}


class Case(NamedTuple):
    """What is tried: a name for it, and the call."""

    name: str
    run: Callable[[], object]


def build(base: dict[str, Any], key: str, value: Any) -> object:
    return read_experiment(base, {key: value}).build()


def make(name: str, option: str, value: Any) -> object:
    with torch.device("meta"):
        return create_mixer(name, d_model=32, **{option: value})


def draw(name: str, option: str, value: Any) -> object:
    return create_task(name, **{option: value}).sample(1, split="train", seed=0)


def options() -> Iterator[tuple[str, Callable[[Any], object]]]:
    """Every option that there is, each with a call that sets it."""
    for name in tasks.names():
        for option in tasks[name].Config.model_fields:
            yield f"{name}.{option}", lambda value, at=(name, option): draw(*at, value)
    for name in mixers.names():
        for option in mixers[name].Config.model_fields:
            yield f"{name}({option})", lambda value, at=(name, option): make(*at, value)
    sections = {"train": TrainConfig, "model": ModelConfig}
    for section, config in sections.items():
        for option in config.model_fields:
            yield f"{section}.{option}", lambda value, key=f"{section}.{option}": build(PLAIN, key, value)
    for option in Recursion.model_fields:
        yield f"recursion.{option}", lambda value, key=f"model.recursion.{option}": build(THINKING, key, value)
    for name in objectives.names():
        base = BASES.get(name, THINKING)
        for option in objectives[name].Config.model_fields:
            yield f"{name}.{option}", lambda value, base=base, key=f"objective.{option}": build(base, key, value)
    for key in (
        *Experiment.model_fields,
        "model.n_parameters",
        "words",
        "variants",
        "nothing",
        "",
        ".",
        "train..lr",
        1,
    ):
        yield str(key), lambda value, key=key: build(PLAIN, key, value)
        yield f"{key}:", lambda value, key=key: read_experiment({**PLAIN, key: value}).build()


def cases(seed: int, per_option: int) -> Iterator[Case]:
    """So many values for every option, drawn anew for each."""
    chance = random.Random(seed)
    for name, call in options():
        for value in chance.sample(VALUES, per_option):
            told = repr(value)[:40] if not isinstance(value, int) or abs(value) < 2**64 else "huge"
            yield Case(f"{name}={told}", lambda call=call, value=value: call(value))


def judge(case: Case) -> str:
    """What came of a case: "answer" or "refusal"; an AssertionError names one that ends otherwise."""
    try:
        case.run()
    except zoo.UsageError as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"{case.name}: {type(error).__name__}: {error}") from error
    else:
        return "answer"
    assert len(told.splitlines()) == 1, f"{case.name}: {told}"
    return "refusal"


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("noise").write_bytes(bytes(range(256)) * 16)


def test_no_option_takes_a_value_to_a_traceback():
    found = [judge(case) for case in cases(0, 3)]
    assert len(found) > 1000
    assert found.count("refusal") > len(found) / 2
    assert found.count("answer") > len(found) / 20


MARKS = "[]{}:,-*&!|>'\"%@`#?~ \n\t\0=0123456789.eExXoO_+abcnulltruefalse<\u2028\x85\udcff\x07é"


def values(seed: int, n: int) -> Iterator[Case]:
    """Texts as people never type them, read as the value of `key=value`."""
    chance = random.Random(seed)
    for _ in range(n):
        text = "".join(chance.choice(MARKS) for _ in range(chance.randint(0, 40)))
        yield Case(ascii(text), lambda text=text: parse_value(text))


def test_no_text_as_a_value_ends_in_a_traceback():
    assert all(judge(case) for case in values(0, 500))


COMMANDS = ("list", "show", "train", "eval", "generate", "compare", "report", "doctor", "nothing", "--help", "")
WORDS = (
    "mqar",
    "runs",
    "noise",
    "empty",
    ".",
    "",
    "x" * 300,
    "x" * 5000,
    "/dev/zero",
    "/proc/self/mem",
    "mixers",
    "--",
    "-x",
)
FLAGS = ("--json", "--fresh", "--resume", "--quiet", "--which=x", "--variant=x", "--split=x", "--row=-1", "--seed=x")
CHANGES = (
    "train.steps=0",
    "train.steps=" + "9" * 5000,
    "name=2024-99-99",
    "task=" + "[" * 3000,
    "x",
    "=",
    "a=*b",
    "out=\x01",
)
CHANGES += ("train.target=0.99", "train.lr=1:30", 'name="a\\0b"', "name=" + "x" * 300, "task.n_pairs=1e99", "steps=5")


def command_lines(seed: int, n: int) -> Iterator[list[str]]:
    """Commands with arguments that never fit: each has something wrong, so that none trains."""
    chance = random.Random(seed)
    for _ in range(n):
        command = chance.choice(COMMANDS)
        words = [chance.choice(WORDS)] if chance.random() < 0.8 else []
        flags = chance.sample(FLAGS, chance.randint(0, 2))
        yield [command, *words, *flags, chance.choice(CHANGES)] if command != "doctor" else [command, *flags, "x"]


def judge_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """The exit status of a command line that may answer, or refuse in one line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    status, (_, err) = ended.value.code, capsys.readouterr()
    told = f"{arguments}: {status}: {err[:500]}"
    assert status in (0, 2), told
    assert "Traceback" not in err, told
    if status == 2:
        assert len(err.splitlines()) == 1, told
        assert err.startswith("zoo: "), told
    return status


def test_command_lines_end_in_one_line(capsys):
    found = [judge_command(arguments, capsys) for arguments in command_lines(0, 150)]
    assert found.count(2) > 100


class Full(io.StringIO):
    """A file on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


PRINTING = ("list mixers", "list tasks --json", "show mqar", "doctor --json", "--help", "train --help", "bench --help")


@pytest.mark.parametrize("command", PRINTING)
def test_output_that_cannot_be_written_is_one_line(command, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Full())
        with pytest.raises(SystemExit) as ended:
            main(command.split())
    assert ended.value.code == 1
    assert capsys.readouterr().err == "zoo: Cannot write the output: No space left on device.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no such device")
def test_a_full_device_is_one_line_to_the_very_end():
    """A real process: what is found out as Python ends would be another line."""
    root = str(Path(__file__).resolve().parents[1])
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "zoo", "list", "mixers"]
        env = {**os.environ, "PYTHONPATH": root}
        done = forked.run(command, stdout=full, env=env)
    assert (done.returncode, done.stderr) == (1, "zoo: Cannot write the output: No space left on device.\n")
