from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS

CASES = [
    {},
    {"max_nodes": 3, "n_queries": 8},
    {"max_nodes": 9, "max_hops": 6, "letters": 3, "min_word": 3, "max_word": 5},
    {"max_nodes": 20, "letters": 50, "max_word": 2},
]


def words(tokens, task):
    """The words of letters, read by their last ones."""
    found, word = [], []
    for token in tokens:
        word.append(token)
        if token >= task.words.last:
            found.append(tuple(word))
            word = []
    assert not word, "a word ends"
    return found


def read(inputs, targets, task):
    """The edges, and each question as hops, node and answer, of one row; checks its form."""
    hops = range(2, 2 + task.config.max_hops)
    marks = [i for i, token in enumerate(inputs) if token in hops]
    names = words(inputs[: marks[0]], task)
    edges = list(zip(names[::2], names[1::2], strict=True))
    questions = []
    for mark in marks:
        equals = inputs.index(1, mark)
        (node,) = words(inputs[mark + 1 : equals], task)
        end = equals
        while end < len(targets) and targets[end] != IGNORE:
            end += 1
        (answer,) = words(targets[equals:end], task)
        assert inputs[equals + 1 : end] == list(answer[:-1]) or equals + 1 == end, "an answer is read back"
        questions.append((inputs[mark] - 1, node, answer))
    assert sum(t != IGNORE for t in targets) == sum(len(answer) for _, _, answer in questions)
    return edges, questions


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = tasks.create_task("depo", **options)
    c = task.config
    batch = task.sample(60, split=split, seed=0)
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        edges, questions = read(inputs, targets, task)
        after = dict(edges)
        n = len(after)
        assert len(edges) == n
        assert set(after) == set(after.values())
        walk = [edges[0][0]]
        while after[walk[-1]] != walk[0]:
            walk.append(after[walk[-1]])
        assert len(walk) == n, "one cycle"
        assert len({node for _, node, _ in questions}) == len(questions) == min(n, c.n_queries)
        for hops, node, answer in questions:
            for _ in range(hops):
                node = after[node]
            assert node == answer
        most = max(hops for hops, _, _ in questions)
        assert batch.slices["hops"][row] == most <= c.max_hops
        if split != "train":
            assert n == c.max_nodes
            assert {hops for hops, _, _ in questions} == {most}
            assert most == c.max_hops or most.bit_count() == 1
        assert 3 <= n <= c.max_nodes <= max(c.max_nodes, batch.slices["nodes"][row])
        assert {len(word) for word in after} <= set(range(c.min_word, c.max_word + 1))


def test_a_cycle_is_in_one_split_in_any_order_of_its_edges():
    task = tasks.create_task("depo", max_nodes=4, letters=8, n_queries=2)
    seen = []
    for split in SPLITS:
        batch = task.sample(2000, split=split, seed=0)
        rows = zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
        seen.append({frozenset(read(*row, task)[0]) for row in rows})
        names = task.problems(batch)
        assert len(names.unique()) == len(seen[-1])
    assert sum(map(len, seen)) == len(set.union(*seen)) > 150


def test_sizes_and_hops_have_their_shares():
    task = tasks.create_task("depo", max_nodes=8, max_hops=4)
    batch = task.sample(4000, split="train", seed=0)
    marks = (batch.inputs > 0) & (batch.inputs < task.words.first)
    sizes = (marks.cumsum(1) == 0).sum(1).numpy() // 2
    share = 1 / (np.arange(3, 9) + 8**0.5)
    share /= share.sum()
    counts = np.bincount(sizes)[3:]
    assert (np.abs(counts / 4000 - share) < 5 * np.sqrt(share * (1 - share) / 4000)).all()
    hops = torch.bincount(batch.inputs[(batch.inputs > 1) & (batch.inputs < 6)])[2:].double()
    assert (hops / hops.sum() - 0.25).abs().max() < 5 * (0.1875 / hops.sum()) ** 0.5


def test_guesses_among_the_nodes_are_right_one_in_their_number():
    task = tasks.create_task("depo", max_nodes=6)
    batch = task.sample(1000, split="test", seed=0)
    nodes = batch.inputs[:, :12:2]  # each node once, as the start of an edge
    pick = torch.randint(6, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    score = task.score(batch, nodes.gather(1, pick % 6))
    assert abs(score["accuracy"] - 1 / 6) < 5 * (5 / 36 / 6000) ** 0.5
    assert set(score["slices"]["hops"]) == {"1", "2", "4"}
    assert set(score["slices"]["nodes"]) == {"6"}


def test_pictures():
    task = tasks.create_task("depo")
    batch = task.sample(1, split="test", seed=0)
    assert "cycle" in task.render(batch)
    assert "!" not in task.render(batch, 0, batch.targets.clamp(min=0))
    assert task.render(batch, 0, batch.targets.clamp(min=0) + 1).count("!") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_nodes": 2}, "max_nodes=2"),
        ({"letters": 8}, "letters=8 with min_word=1, max_word=1 gives 8 words, too few for 12 nodes"),
        ({"letters": 2, "max_word": 3}, "gives 14 words, at most half of them in a row"),
        ({"min_word": 3, "max_word": 2}, "min_word=3 is more than max_word=2"),
        ({"max_word": 9}, "more than"),
        ({"max_nodes": 3, "letters": 4}, "gives only 8 different rows"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("depo", **options)
    assert "\n" not in str(error.value)
