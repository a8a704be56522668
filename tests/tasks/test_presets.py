"""RULER's names for tasks of this package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zoo import tasks
from zoo.benchmarks.long_context import check_task
from zoo.tasks.presets import PRESETS
from zoo.tasks.protocol import SPLITS
from zoo.training.recipes import read_experiment, read_task

DOCS = Path(__file__).parents[2] / "docs"


MADE = [name for name, preset in PRESETS.items() if "references" not in preset.options]  # the others need a file


@pytest.mark.parametrize("name", MADE)
def test_a_name_is_the_task_with_its_options(name):
    preset = PRESETS[name]
    task, same = tasks.create_task(name), tasks.create_task(preset.task, **preset.options)
    assert type(task) is type(same)
    assert task.config == same.config
    for split in SPLITS:
        batch = task.sample(4, split=split, seed=0)
        assert (batch.inputs == same.sample(4, split=split, seed=0).inputs).all()
        assert task.score(batch, batch.targets)["contained"] == 1


def test_rulers_numbers():
    """Keys, values, queries and hops of `synthetic.yaml`; 7 digits a number, 32 a UUID."""
    sizes = {n: tasks.create_task(n).answer_length for n in MADE}
    assert sizes == {
        "niah_single_1": 7,
        "niah_single_2": 7,
        "niah_single_3": 32,
        "niah_multikey_1": 7,
        "niah_multikey_2": 7,
        "niah_multikey_3": 32,
        "niah_multivalue": 28,
        "niah_multiquery": 28,
        "vt": 5,
    }
    assert tasks.create_task("niah_multikey_1").n_keys == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("vocab", [10, 16])
def test_long_keys_differ_in_all_their_tokens(vocab):
    """A number of 31 bits has fewer digits than a key of 32 tokens; the key in question is not in the haystack."""
    task = tasks.create_task("niah_multikey_3", key_vocab=vocab, value_length=1, seq_len=256)
    batch = task.sample(200, split="test", seed=0)
    keys = batch.inputs[:, -32:]
    first = task.vocabulary.first["key"]
    for column in keys.T:
        assert len(column.unique()) > 1
        assert first <= column.min() <= column.max() < first + vocab
    context = batch.inputs[:, :-33].unfold(1, 32, 1)
    assert ((context == keys[:, None]).all(2).sum(1) == 1).all()


def test_an_option_takes_the_place_of_the_presets():
    task = tasks.create_task("niah_single_1", seq_len=64, value_length=2)
    assert (task.seq_len, task.answer_length, task.config.haystack) == (64, 2, "repeated")
    assert read_task("vt", {"n_hops": 2}).answer_length == 3
    assert read_experiment({"task": {"name": "niah_single_1", "seq_len": 64}, "model": "mha"}).build()[0].seq_len == 64
    assert check_task("niah_multivalue", {}, [128, 256]) == "seq_len"


def test_unknown_names_are_compared_with_these_too():
    with pytest.raises(tasks.UsageError, match="Did you mean 'niah_single_1'"):
        tasks.create_task("niah_singel_1")


def test_the_page_has_every_name_with_its_options():
    rows = re.findall(r"^\| `(\w+)`.*? \| `(\w+)` \| `(.*)` \|$", (DOCS / "tasks.md").read_text(), re.M)
    told = {name: (task, dict(pair.split("=") for pair in options.split())) for name, task, options in rows}
    assert told == {n: (p.task, {k: str(v) for k, v in p.options.items()}) for n, p in PRESETS.items() if n in MADE}
