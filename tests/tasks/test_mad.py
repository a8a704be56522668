"""The six tasks of MAD: their published settings, and programs that solve them from what a row tells."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.mad import TEST_ROWS, mad_tasks
from zoo.tasks.protocol import IGNORE, SPLITS

NAMES = sorted(mad_tasks())


# ---- programs that read a row of inputs and say what should stand at every position that is asked for


def recall(task, row):
    """The value that followed the same key before."""
    known, said = {}, {}
    for at in range(0, len(row), 2):
        if row[at] < task.n_keys:
            if row[at] in known:
                said[at] = known[row[at]]
            if at + 1 < len(row):
                known[row[at]] = row[at + 1]
    return said


def motifs(task, row):
    """A row cut into keys and values, by the kind of each token."""
    kinds = ["pad" if t == task.pad else "key" if t < task.n_keys else "value" for t in row]
    runs = [(kind, list(run)) for kind, run in itertools.groupby(range(len(row)), key=kinds.__getitem__)]
    return [(kind, run) for kind, run in runs if kind != "pad"]


def fuzzy(task, row):
    """The value that followed the same tokens of a key before, one token further at each position."""
    known, said, key = {}, {}, ()
    for kind, run in motifs(task, row):
        if kind == "key":
            key = tuple(row[i] for i in run)
            if key in known:
                said[run[-1]] = known[key][0]
        elif key in known:
            said |= {at: known[key][i + 1] for i, at in enumerate(run) if i + 1 < len(known[key])}
        else:
            known[key] = [row[i] for i in run]
    return said


def copy(task, row):
    command = row.index(task.copy)
    words = [token for token in row[:command] if token != task.blank_word]
    return {command + 1 + i: word for i, word in enumerate(words)}


def by_heart(task, row):
    learnt = {}
    batch = task.sample(300 + 4 * task.n_keys, split="train", seed=9)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        learnt |= {inputs[i - 1]: target for i, target in enumerate(targets) if target != IGNORE}
    return {at: learnt[row[at - 1]] for at in range(len(row)) if row[at] == task.ask}


PROGRAMS = {
    "in_context_recall": recall,
    "noisy_recall": recall,
    "fuzzy_recall": fuzzy,
    "selective_copy": copy,
    "compression": lambda task, row: dict(enumerate(row)),
    "memorization": by_heart,
}
SMALL = {
    "in_context_recall": [{"vocab_size": 8, "seq_len": 20}, {"vocab_size": 9, "seq_len": 12}],
    "noisy_recall": [{"vocab_size": 12, "noise_vocab_size": 4, "seq_len": 20, "frac_noise": 0.6}],
    "fuzzy_recall": [
        {"vocab_size": 8, "seq_len": 40, "k_motif_size": 2, "v_motif_size": 1},
        {"vocab_size": 10, "seq_len": 60, "k_motif_size": 1, "v_motif_size": 4},
    ],
    "selective_copy": [{"vocab_size": 5, "seq_len": 14, "n_copy": 6}, {"vocab_size": 18, "seq_len": 60, "n_copy": 2}],
    "compression": [{"vocab_size": 3, "seq_len": 12}],
    "memorization": [{"vocab_size": 9, "seq_len": 10}],
}
CASES = [(name, options) for name in NAMES for options in [{}, *SMALL[name]]]


def answers(task, batch):
    predictions = torch.full_like(batch.targets, -1)
    for row, tokens in enumerate(batch.inputs.tolist()):
        for at, token in PROGRAMS[task.name](task, tokens).items():
            predictions[row, at] = token
    return predictions


def test_programs_are_of_all_six():
    assert sorted(PROGRAMS) == NAMES


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_program_that_reads_the_row_scores_100(name, options, split):
    task = tasks.create_task(name, **options)
    batch = task.sample(12, split=split, seed=0)
    score = task.score(batch, answers(task, batch))
    assert score["exact"] == score["accuracy"] == 1


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall", "fuzzy_recall"])
def test_program_says_just_what_is_asked(name):
    """Whatever can be known from the row is asked for, in held-out rows and with teach="values"."""
    for split, options in (("test", {}), ("train", {"teach": "values"})):
        task = tasks.create_task(name, **options)
        batch = task.sample(20, split=split, seed=0)
        assert torch.equal(answers(task, batch) >= 0, batch.targets != IGNORE)


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall", "fuzzy_recall"])
def test_training_rows_ask_for_every_next_token(name):
    task = tasks.create_task(name)
    batch = task.sample(20, split="train", seed=0)
    assert torch.equal(batch.targets[:, :-1], batch.inputs[:, 1:])
    assert torch.equal(answers(task, batch)[:, -1], batch.targets[:, -1])


def chance(task):
    """Expected accuracy of guessing alike among the answers that there are."""
    if task.name == "compression":  # and the last token is always the same
        return ((task.seq_len - 1) / (task.vocab_size - 1) + 1) / task.seq_len
    if task.name == "selective_copy":
        return 1 / task.n_words
    if task.name == "memorization":
        return 1 / (task.ask - task.n_keys)
    return 1 / (task.n_values if task.name == "fuzzy_recall" else task.n_words - task.n_keys)


@pytest.mark.parametrize("name", NAMES)
def test_guessing_scores_what_it_should(name):
    task = tasks.create_task(name)
    batch = task.sample(400, split="test", seed=0)
    first, n = {
        "compression": (0, task.vocab_size - 1),
        "selective_copy": (0, task.vocab_size - 2),
        "fuzzy_recall": (7, 8),
        "memorization": (127, 128),
    }.get(name, (8, 8))
    generator = torch.Generator().manual_seed(0)
    guesses = first + torch.randint(n, batch.targets.shape, generator=generator)
    if name == "compression":
        guesses[:, -1] = task.vocab_size - 1
    asked = (batch.targets != IGNORE).sum().item()
    expected = chance(task)
    spread = math.sqrt(expected * (1 - expected) / asked)
    accuracy = task.score(batch, guesses)["accuracy"]
    assert abs(accuracy - expected) < (5 if name != "fuzzy_recall" else 9) * spread  # of fuzzy_recall rows differ in n


# ---- laws of the rows


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall"])
def test_pairs_are_drawn_alike(name):
    task = tasks.create_task(name)
    inputs = task.sample(500, split="train", seed=0).inputs.numpy()
    keys, values = inputs[:, ::2], inputs[:, 1::2]
    noisy = keys >= task.n_words
    assert (noisy[:, :-1] == (values >= task.n_words)).all()
    counts = np.bincount(keys[~noisy], minlength=8)
    assert len(counts) == 8
    assert (abs(counts / counts.mean() - 1) < 0.05).all()
    counts = np.bincount(values[~noisy[:, :-1]] - 8, minlength=8)
    assert len(counts) == 8
    assert (abs(counts / counts.mean() - 1) < 0.15).all()  # of 4000 values, each of several pairs
    share = noisy[:, :-1].mean()
    assert abs(share - task.noise_share * 62 / 63) < 0.01
    assert (~noisy[:, :-1]).any(1).all()
    assert not noisy[:, -1].any()


def test_a_row_of_noise_still_has_a_pair():
    task = tasks.create_task("noisy_recall", frac_noise=0.999, seq_len=8)
    batch = task.sample(200, split="test", seed=0)
    pairs = batch.inputs[:, :-1:2] < task.n_words
    assert (pairs.sum(1) == 1).float().mean() > 0.9
    assert (pairs.float().mean(0) > 0.2).all(), "it may stand anywhere"
    assert task.score(batch, answers(task, batch))["exact"] == 1


@pytest.mark.parametrize(("split", "least"), [("train", 1), ("test", 3)])
def test_motifs_have_the_published_sizes(split, least):
    task = tasks.create_task("fuzzy_recall")
    inputs = task.sample(300, split=split, seed=0).inputs.tolist()
    sizes = {"key": [], "value": []}
    for row in inputs:
        runs = motifs(task, row)
        assert runs[0][1][0] >= 1, "padding opens every row"
        for kind, run in runs[:-1]:  # the last is cut off
            sizes[kind].append(len(run))
            assert len({row[i] for i in run}) == len(run), "different tokens"
        assert runs[0][0] == "key"
    for kind, lowest in (("key", least), ("value", 1)):
        counts = np.bincount(sizes[kind], minlength=4)
        assert counts[:lowest].sum() == 0
        assert len(counts) == 4
        shares = counts[lowest:] / counts.sum()
        # A long pair is a little likelier to be the last that fits, and the last of a row is not counted.
        assert (abs(shares - 1 / (4 - lowest)) < 0.03).all()


@pytest.mark.parametrize("options", [{}, {"k_motif_size": 1, "v_motif_size": 2}, {"vocab_size": 32, "seq_len": 24}])
def test_the_last_key_is_always_told_before(options):
    task = tasks.create_task("fuzzy_recall", **options)
    batch = task.sample(500, split="test", seed=0)
    for row, targets, size in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.slices["value_size"].tolist(), strict=True
    ):
        asked = [t != IGNORE for t in targets]
        assert all(asked[-size:])
        assert not asked[-size - 1]
        keys = [tuple(row[i] for i in run) for kind, run in motifs(task, row) if kind == "key"]
        assert keys.count(keys[-1]) >= 2


def test_blanks_fall_before_words_alike():
    task = tasks.create_task("selective_copy", vocab_size=6, seq_len=40, n_copy=4)
    inputs = task.sample(4000, split="train", seed=0).inputs.numpy()
    before_command = inputs[:, : -4 - 1]
    assert (inputs[:, -5] == task.copy).all()
    assert (inputs[:, -4:] == task.blank_word).all()
    assert (before_command[:, -1] != task.blank_word).all()
    places = np.nonzero(before_command != task.blank_word)[1].reshape(-1, 4)
    gaps = np.diff(places, prepend=-1, axis=1) - 1
    assert (gaps.sum(1) == task.n_blanks).all()
    assert (abs(gaps.mean(0) - task.n_blanks / 4) < 0.25).all()
    variance = task.n_blanks * 1 / 4 * 3 / 4  # of a multinomial
    assert (abs(gaps.var(0) / variance - 1) < 0.1).all()


def test_memorized_map_is_one_for_all_and_one_to_one():
    known = {}
    for split, seed in itertools.product(SPLITS, (0, 1)):
        batch = tasks.create_task("memorization").sample(100, split=split, seed=seed)
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert set(targets[::2]) == {IGNORE}
            assert set(inputs[1::2]) == {255}
            for key, value in zip(inputs[::2], targets[1::2], strict=True):
                assert known.setdefault(key, value) == value
    assert sorted(known) == list(range(127))
    assert len(set(known.values())) == 127
    assert set(known.values()) <= set(range(127, 255))
    other = tasks.create_task("memorization", map_seed=1)
    assert (other.values != tasks.create_task("memorization").values).mean() > 0.9


# ---- the published settings


PUBLISHED = {
    "in_context_recall": ({"vocab_size": 16, "seq_len": 128}, 12_800, 11),
    "fuzzy_recall": ({"vocab_size": 16, "seq_len": 128, "k_motif_size": 3, "v_motif_size": 3}, 12_800, 11),
    "noisy_recall": ({"vocab_size": 32, "seq_len": 128, "noise_vocab_size": 16, "frac_noise": 0.2}, 12_800, 14),
    "selective_copy": ({"vocab_size": 16, "seq_len": 256, "n_copy": 16}, 12_800, 13),
    "compression": ({"vocab_size": 16, "seq_len": 32}, 12_800, 11),
    "memorization": ({"vocab_size": 256, "seq_len": 32}, 256, 6),
}


@pytest.mark.parametrize("name", NAMES)
def test_published_settings(name):
    baseline, rows, number = PUBLISHED[name]
    cls = mad_tasks()[name]
    assert baseline.items() <= tasks.create_task(name).config.model_dump().items()
    settings = cls.mad_settings()
    assert settings[0] == ("", {}, rows)
    assert len(settings) == number
    assert len({(tuple(s.options.items()), s.rows) for s in settings}) == number
    for setting in settings[1:]:
        if setting.changed == "rows":
            assert setting.options == {}
            assert setting.rows < rows
        else:
            assert list(setting.options) == [setting.changed]
            assert setting.rows == rows


def test_there_are_66_settings():
    assert sum(len(cls.mad_settings()) for cls in mad_tasks().values()) == 66
    assert TEST_ROWS == 1280


@pytest.mark.parametrize(
    ("name", "setting"), [(n, s) for n in NAMES for s in mad_tasks()[n].mad_settings() if s.options]
)
def test_every_setting_can_be_drawn(name, setting):
    task = tasks.create_task(name, **setting.options)
    batch = task.sample(2, split="test", seed=0)
    assert task.score(batch, answers(task, batch))["exact"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_true(name):
    """The program says of the row that is drawn what is drawn under it."""
    lines = [line.split() for line in mad_tasks()[name].__doc__.splitlines()]
    shown = {words[0]: words[1:] for words in lines if words and words[0] in ("inputs", "targets")}
    row = list(map(int, shown["inputs"]))
    words = " ".join(mad_tasks()[name].__doc__.split()).split("With ")[1].split(" (")[0]
    options = {k: int(v) for k, v in (part.split("=") for part in words.split(", "))}
    task = tasks.create_task(name, **options)
    assert len(row) == task.seq_len
    said = PROGRAMS[name](task, row)
    assert [str(said[i]) if i in said else "." for i in range(len(row))] == shown["targets"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("in_context_recall", {"seq_len": 13}, "seq_len=13 is not allowed: it should be even"),
        ("in_context_recall", {"seq_len": 2}, "at least 4"),
        ("in_context_recall", {"vocab_size": 1}, "vocab_size=1 leaves no key and value; take 2"),
        ("in_context_recall", {"vocab_size": 4, "seq_len": 6}, "gives only 8 different rows"),
        ("in_context_recall", {"teach": "keys"}, "teach='keys' is not allowed"),
        ("noisy_recall", {"vocab_size": 17}, "leaves no key and value beside 16 tokens of noise; take 18"),
        ("noisy_recall", {"frac_noise": 1.0}, "frac_noise=1.0 is not allowed"),
        ("fuzzy_recall", {"vocab_size": 6}, "has 2 tokens for keys of 3 different ones and 3 for values"),
        ("fuzzy_recall", {"seq_len": 20}, "seq_len=20 is too short for keys of 3 and values of 3 tokens; take 24"),
        ("fuzzy_recall", {"k_motif_size": 7}, "k_motif_size=7 is not allowed"),
        ("selective_copy", {"seq_len": 33}, "seq_len=33 is too short for n_copy=16; take 34"),
        ("selective_copy", {"vocab_size": 2}, "vocab_size=2 is not allowed"),
        ("selective_copy", {"vocab_size": 3, "n_copy": 1}, "gives only 1 different rows"),
        ("compression", {"seq_len": 1}, "seq_len=1 is not allowed"),
        ("compression", {"vocab_size": 3, "seq_len": 8}, "gives only 128 different rows"),
        ("memorization", {"seq_len": 7}, "seq_len=7 is odd"),
        ("memorization", {"vocab_size": 3}, "vocab_size=3 is not allowed"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task(name, **options)
    assert "\n" not in str(error.value)


def test_render_names_the_tokens():
    task = tasks.create_task("noisy_recall", vocab_size=12, noise_vocab_size=4, seq_len=14)
    batch = task.sample(1, split="test", seed=0)
    text = task.render(batch)
    assert text.startswith("keys and values")
    assert {word[0] for word in text.splitlines()[0].split()[3:]} <= set("kv~")
    assert "!" not in task.render(batch, 0, batch.targets.clamp(min=0))
    assert "!" in task.render(batch, 0, torch.zeros_like(batch.targets))
