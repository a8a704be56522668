"""Tasks with a question behind a long context: programs that read only the inputs answer them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS


def spans(task, name, size):
    """The tokens of one range of a vocabulary."""
    return range(task.vocabulary.first[name], task.vocabulary.first[name] + size)


def blocks(context, starts, length):
    return [tuple(context[i : i + length]) for i, token in enumerate(context) if token in starts]


def niah(task, context, question):
    c, keys = task.config, spans(task, "key", task.config.key_vocab)
    hidden: dict[tuple, list] = {}
    at = 0
    while at < len(context):
        if context[at] not in keys:
            at += 1
            continue
        value = at + c.key_length
        hidden.setdefault(tuple(context[at:value]), []).extend(context[value : value + c.value_length])
        at = value + c.value_length
    asked = [tuple(question[i : i + c.key_length]) for i in range(1, len(question), c.key_length)]
    return [token for key in asked for token in hidden[key]]


def variable_tracking(task, context, question):
    value_of, names = {question[1]: True}, []
    for name, _, source in statements(task, context):
        if value_of.get(source):
            value_of[name] = True
            names.append(name)
    return names


def statements(task, context):
    equals = task.vocabulary.first["equals"]
    return [tuple(context[i - 1 : i + 2]) for i, token in enumerate(context) if token == equals]


def cwe(task, context, question):
    return sorted(word for word, _ in Counter(context).most_common(task.config.n_common))


def fwe(task, context, question):
    return [word for word, _ in Counter(context).most_common(task.config.n_asked + 1)[1:]]


def babilong(task, context, question):
    c, names = task.config, task.vocabulary
    at: dict[str, str] = {}
    carried: dict[str, list[str]] = {}
    path: dict[str, list[str]] = {}
    for fact in blocks(context, spans(task, "people", c.people), 3):
        person, action, what = (names[token] for token in fact)
        if action == "went":
            at[person] = what
            for thing in carried.get(person, []):
                path[thing].append(what)
        elif action == "took":
            carried.setdefault(person, []).append(what)
            if what not in path:
                path[what] = [at[person]] if person in at else []
        else:
            carried[person].remove(what)
    subject = names[question[1]]
    held = carried.get(subject, [])
    said = {
        "qa1": lambda: [at[subject]],
        "qa2": lambda: [path[subject][-1]],
        "qa3": lambda: [path[subject][-2]] if path[subject][-1] == names[question[2]] else [],
        "qa7": lambda: [["none", "one", "two", "three"][len(held)]],
        "qa8": lambda: [*(held or ["nothing"]), "|"],
    }[c.question]()
    tokens = {names[token]: token for token in range(1, len(names))}
    return [tokens[word] for word in said]


ORACLES = {"niah": niah, "variable_tracking": variable_tracking, "cwe": cwe, "fwe": fwe, "babilong": babilong}

CASES = [
    ("niah", {}),
    ("niah", {"n_keys": 4, "haystack": "repeated", "seq_len": 100, "min_length": 20}),
    ("niah", {"n_values": 3, "n_queries": 2, "value_length": 2, "key_length": 3, "min_length": 200}),
    ("niah", {"haystack": "needles", "key_length": 2, "n_queries": 2, "seq_len": 101}),
    ("niah", {"haystack": "needles", "n_values": 4, "min_length": 150, "depth": (0.2, 0.4)}),
    ("niah", {"seq_len": 4, "value_vocab": 100}),  # no filler at all
    ("variable_tracking", {}),
    ("variable_tracking", {"n_chains": 4, "n_hops": 3, "haystack": "repeated", "min_length": 60}),
    ("variable_tracking", {"n_hops": 0, "n_chains": 8, "depth": 0.5}),
    ("cwe", {}),
    ("cwe", {"n_common": 10, "n_words": 20, "ratio": 3, "words": 40, "min_length": 60}),
    ("fwe", {}),
    ("fwe", {"n_asked": 6, "words": 30, "seq_len": 2000, "min_length": 1500, "alpha": 1.5}),
    ("fwe", {"n_asked": 6, "words": 6, "seq_len": 712, "alpha": 3.0}),
    *(("babilong", {"question": question}) for question in ("qa1", "qa2", "qa3", "qa7", "qa8")),
    ("babilong", {"question": "qa8", "depth": (0.5, 1.0), "min_length": 200, "haystack": "repeated"}),
]


def read(task, batch):
    """Context, question and answer of each row."""
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        scored = [i for i, t in enumerate(targets) if t != IGNORE]
        begin = scored[0] + 1 - task.question_length
        assert scored == list(range(scored[0], scored[-1] + 1))
        assert inputs[scored[0] + 1 : scored[-1] + 1] == targets[scored[0] : scored[-1]], "read back"
        assert not any(inputs[scored[-1] + 1 :]), "padding is on the right"
        assert all(inputs[:begin])
        yield inputs[:begin], inputs[begin : scored[0] + 1], targets[scored[0] : scored[-1] + 1]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_programs_that_read_only_the_inputs_answer(name, options):
    task = tasks.create_task(name, **options)
    for split in SPLITS:
        batch = task.sample(60, split=split, seed=0)
        for context, question, answer in read(task, batch):
            assert ORACLES[name](task, context, question) == answer


@pytest.mark.parametrize(
    ("name", "options", "chance"),
    [
        ("niah", {"value_vocab": 8}, 1 / 8),
        ("variable_tracking", {"name_vocab": 10}, 1 / 10),
        ("cwe", {"words": 25}, 1 / 25),
        ("fwe", {"words": 10}, 1 / 10),
        ("copy", {"symbols": 5, "seq_len": 32}, 1 / 5),
        ("babilong", {}, 1 / 6),
        ("babilong", {"question": "qa3"}, 1 / 6),
    ],
)
def test_guesses_are_right_by_chance(name, options, chance):
    """Uniform guesses among the tokens that answers are made of."""
    task = tasks.create_task(name, **options)
    batch = task.sample(2000, split="validation", seed=0)
    scored = batch.targets != IGNORE
    first = int(batch.targets[scored].min())
    generator = torch.Generator().manual_seed(0)
    guesses = first + torch.randint(round(1 / chance), batch.targets.shape, generator=generator)
    assert int(batch.targets[scored].max()) < first + round(1 / chance)
    spread = (chance / int(scored.sum())) ** 0.5
    assert abs(task.score(batch, guesses)["accuracy"] - chance) < 5 * spread


@pytest.mark.parametrize(("name", "options"), CASES)
def test_lengths_are_those_asked_for(name, options):
    task = tasks.create_task(name, **options)
    low = options.get("min_length") or task.seq_len
    batch = task.sample(200, split="train", seed=0)
    ends = torch.tensor([int((row != IGNORE).nonzero()[-1]) + 1 for row in batch.targets])
    if name == "babilong" and options["question"] == "qa8":  # lists may be shorter
        ends = ends - (batch.targets != IGNORE).sum(1) + task.answer_length
    assert ends.min() >= low
    assert ends.max() <= task.seq_len
    assert low == task.seq_len or len(ends.unique()) > 10
    assert (batch.slices["length"] >= ends).all()


def test_keys_asked_for_in_turn():
    options = {"n_keys": 4, "n_queries": 3, "n_values": 2, "value_length": 2, "min_length": 100}
    task = tasks.create_task("niah", asked="in_turn", **options)
    together = tasks.create_task("niah", **options).sample(40, split="test", seed=0)
    batch = task.sample(40, split="test", seed=0)
    for i, (context, question, answer) in enumerate(read(tasks.create_task("niah", **options), together)):
        inputs, targets = batch.inputs[i].tolist(), batch.targets[i].tolist()
        pairs = [[key, *answer[4 * q : 4 * q + 4]] for q, key in enumerate(question[1:])]
        tail = [question[0], *(token for pair in pairs for token in pair)]
        end = len(context) + len(tail) - 1
        assert inputs == context + tail[:-1] + [0] * (256 - end)
        marks = [token if j and j % 5 != 1 else IGNORE for j, token in enumerate(tail)]
        assert targets == [IGNORE] * (len(context) - 1) + marks + [IGNORE] * (256 - end)
    assert task.score(batch, batch.targets)["contained"] == 1.0
    names = [task.vocabulary[token] for token in (*question, *answer)]
    assert f"question  {' '.join(names[:4])}" in task.render(batch, 39)
    assert f"answer    {' '.join(names[4:])}" in task.render(batch, 39)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0, (0.5, 0.75), None])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("niah", {"n_keys": 3, "n_values": 2}),
        ("niah", {"haystack": "needles"}),
        ("variable_tracking", {"n_chains": 2, "n_hops": 2}),
        ("babilong", {"question": "qa1"}),
    ],
)
def test_needles_lie_where_depth_says(name, options, depth):
    task = tasks.create_task(name, seq_len=500, depth=depth, **options)
    batch = task.sample(200, split="test", seed=0)
    low, high = depth if isinstance(depth, tuple) else (0.0, 1.0) if depth is None else (depth, depth)
    found = []
    for row, (context, question, _) in enumerate(read(task, batch)):
        if name == "niah":
            needed = [i for i, token in enumerate(context) if token == question[1]]
        elif name == "variable_tracking":
            chain = set(variable_tracking(task, context, question))
            needed = [i - 1 for i, token in enumerate(context) if token == 2 and context[i - 1] in chain]
        else:
            needed = [i for i, token in enumerate(context) if token in spans(task, "people", 4)]
        slack = len(needed) + 6  # needles take places of their own
        size = task.needle_length
        shares = [i / (len(context) - size) for i in needed]
        assert min(shares) >= low - slack * size / len(context)
        assert max(shares) <= high + slack * size / len(context)
        found += shares[:1]
        if name != "babilong":
            assert abs(int(batch.slices["depth"][row]) - min(9, shares[0] * 10)) < 1.5
    if low < high:
        assert np.std(found) > 0.1 * (high - low), "not all at one place"


def test_repeated_haystack_goes_on_behind_a_needle():
    task = tasks.create_task("niah", haystack="repeated", filler_vocab=5, n_keys=4)
    first = task.vocabulary.first["filler"]
    for context, _, _ in read(task, task.sample(20, split="train", seed=0)):
        filler = np.array([token - first for token in context if first <= token < first + 5])
        assert (np.diff(filler) % 5 == 1).all()


def test_random_haystack_is_uniform():
    task = tasks.create_task("niah", filler_vocab=10)
    first = task.vocabulary.first["filler"]
    tokens = task.sample(200, split="train", seed=0).inputs
    counts = np.bincount(tokens[(tokens >= first) & (tokens < first + 10)] - first, minlength=10)
    expected = counts.sum() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 9 + 6 * np.sqrt(18)


def test_hay_of_needles_has_every_other_key():
    task = tasks.create_task("niah", haystack="needles", key_vocab=8, n_queries=2)
    keys = set(spans(task, "key", 8))
    for context, question, _ in read(task, task.sample(50, split="train", seed=0)):
        counts = Counter(token for token in context if token in keys)
        assert set(counts) == keys
        assert [counts[key] for key in question[1:]] == [1, 1]


def test_frequencies_of_cwe():
    task = tasks.create_task("cwe", n_common=4, n_words=10, ratio=5, seq_len=200)
    for context, _, _ in read(task, task.sample(20, split="train", seed=0)):
        counts = sorted(Counter(context).values())
        assert len(counts) == 10
        assert counts[-1] == counts[-4] >= 5 * counts[0]
        assert counts[5] - counts[0] <= 1


def test_frequencies_of_fwe():
    task = tasks.create_task("fwe", seq_len=1000)
    for context, _, _ in read(task, task.sample(5, split="train", seed=0)):
        counts = [count for _, count in Counter(context).most_common()]
        shares = [6 / np.pi**2 / k**2 for k in range(2, 8)]
        assert counts[1:7] == [int(len(context) * share) for share in shares]


def test_contained_reads_answers_in_any_order():
    task = tasks.create_task("niah", n_values=4, value_length=2, value_vocab=50)
    batch = task.sample(50, split="train", seed=0)
    true, _ = task.answers(batch, batch.targets)
    swapped = batch.targets.clone()
    swapped[batch.targets != IGNORE] = true.unflatten(1, (4, 2)).flip(1).flatten()
    score = task.score(batch, swapped)
    assert score["contained"] == 1.0
    assert score["exact"] < 0.1
    half = batch.targets.clone()
    half[batch.targets != IGNORE] = torch.cat([true[:, :2], torch.zeros_like(true[:, 2:])], 1).flatten()
    assert 0.25 <= task.score(batch, half)["contained"] < 0.3, "one value of four, and those equal to it"


def test_labels_read_lists_in_any_order_and_nothing_else():
    task = tasks.create_task("babilong", question="qa8")
    batch = task.sample(500, split="train", seed=0)
    pairs = (batch.targets != IGNORE).sum(1) == 3
    scored = batch.targets[pairs] != IGNORE
    part = tasks.Batch(batch.inputs[pairs], batch.targets[pairs])
    assert len(scored) > 5
    true, _ = task.answers(part, part.targets)

    def labels(answers):
        said = part.targets.clone()
        said[scored] = torch.stack(answers, 1).flatten()
        return task.score(part, said)["labels"]

    first, second, end = true[:, 0], true[:, 1], true[:, 2]
    assert labels([second, first, end]) == 1.0
    assert labels([first, end, second]) == 0.0
    assert labels([first, second, first]) == 1.0, "told without an end"
    assert labels([first, first, end]) == 0.0


@pytest.mark.parametrize("options", [{}, {"seq_len": 40, "min_length": 8, "symbols": 4}])
def test_copies(options):
    task = tasks.create_task("copy", **options)
    batch = task.sample(100, split="test", seed=0)
    equals = task.vocabulary.first["equals"]
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        at = inputs.index(equals)
        string = inputs[:at]
        assert options.get("min_length", task.seq_len) <= 2 * at <= task.seq_len
        assert inputs == string + [equals] + string[:-1] + [0] * (task.seq_len - 2 * at)
        assert targets == [IGNORE] * at + string + [IGNORE] * (task.seq_len - 2 * at)


def test_reach_of_a_copy():
    task = tasks.create_task("copy", seq_len=20)
    batch = task.sample(4, split="train", seed=0)
    said = batch.targets.clone()
    said[:, 13] = 0
    assert task.score(batch, said)["reach"] == 3.0


@pytest.mark.parametrize("name", ["niah", "variable_tracking", "cwe", "fwe", "babilong", "copy"])
def test_a_million_tokens(name):
    task = tasks.create_task(name, seq_len=2**20)
    batch = task.sample(1, split="train", seed=0)
    assert batch.inputs.shape == (1, 2**20)
    assert batch.slices["length"].tolist() == [2**20]
    assert len(task.render(batch)) < 20_000


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("niah", {"depth": 1.5}, r"depth=1.5.*from 0 to 1"),
        ("niah", {"depth": [0.5, 0.2]}, r"depth=\[0.5, 0.2\].*least first"),
        ("niah", {"depth": "end"}, "depth='end'.*a number"),
        ("niah", {"depth": [0.1, 0.2, 0.3]}, "depth=.*two"),
        ("niah", {"depth": [0.1]}, "depth=.*two"),
        ("niah", {"seq_len": 3}, "seq_len=3 is too short.*at least 4"),
        ("niah", {"min_length": 300}, "min_length=300 is more than seq_len=256"),
        ("niah", {"min_length": 10, "n_values": 4}, "min_length=10 is too short.*at least 13"),
        ("niah", {"n_keys": 40}, "key_vocab=32.*gives 32 keys.*40"),
        ("niah", {"haystack": "needles", "n_keys": 3}, "leave n_keys out"),
        ("niah", {"n_queries": 9, "n_keys": 2}, "n_queries=9 asks for more keys than n_keys=2 hides"),
        ("niah", {"n_queries": 2, "n_keys": 1}, "n_queries=2 asks for more keys than n_keys=1 hides"),
        ("niah", {"seq_len": 4, "value_vocab": 2}, "only .* different rows"),
        ("niah", {"haystack": "noise"}, "'random', 'repeated' or 'needles'"),
        ("variable_tracking", {"n_hops": 9, "n_chains": 4}, "name_vocab=32 is too few.*40"),
        ("variable_tracking", {"n_chains": 40, "n_hops": 0, "name_vocab": 99}, "value_vocab=32 is too few.*40"),
        ("variable_tracking", {"seq_len": 20}, "seq_len=20 is too short for 5 statements.*at least 21"),
        ("cwe", {"n_words": 7}, "n_words=7.*from 2 [*] n_common=8 to words=32"),
        ("cwe", {"seq_len": 50}, "seq_len=50 is too short.*at least 60"),
        ("fwe", {"seq_len": 50}, "seq_len=50 is too short.*at least 77"),
        ("fwe", {"n_asked": 80}, "words=64 is fewer than n_asked=80"),
        ("copy", {"seq_len": 31}, "seq_len=31 is odd.*32"),
        ("copy", {"min_length": 31}, "min_length=31 is odd"),
        ("copy", {"min_length": 512}, "min_length=512 is more than seq_len=256"),
        ("copy", {"seq_len": 4, "symbols": 2}, "only 4 different rows"),
        ("babilong", {"question": "qa3", "seq_len": 64}, "seq_len=64 is too short.*at least 99"),
        ("babilong", {"min_facts": 11}, "min_facts=11 is more than max_facts=10"),
        ("babilong", {"places": 1}, "places=1"),
        ("babilong", {"question": "qa21"}, "'qa1', .*'qa8'"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task(name, **options)
    assert "\n" not in str(error.value)


def test_stories_that_cannot_be_told():
    task = tasks.create_task("babilong", question="qa3", min_facts=1, max_facts=1, depth=None, seq_len=4000)
    with pytest.raises(tasks.UsageError, match=r"1 to 1 facts.*raise min_facts"):
        task.sample(1, split="train", seed=0)
