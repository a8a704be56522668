from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks import random
from zoo.tasks.protocol import IGNORE, SPLITS, Batch

CASES = [{}, {"max_nodes": 6, "letters": 7}, {"max_nodes": 12, "letters": 4, "min_word": 2, "max_word": 4}]


def brevo(**options):
    return tasks.create_task("brevo", **options)


def words(tokens, task):
    found, word = [], []
    for token in tokens:
        word.append(token)
        if token >= task.words.last:
            found.append(tuple(word))
            word = []
    assert not word
    return found


def read(inputs, targets, task):
    """Edges, the node in question and its answer, of one row; checks its form."""
    question, equals = inputs.index(1), inputs.index(2)
    names = words(inputs[:question], task)
    (node,) = words(inputs[question + 1 : equals], task)
    answer = [t for t in targets if t != IGNORE]
    assert targets[equals : equals + len(answer)] == answer
    assert inputs[equals + 1 : equals + len(answer)] == answer[:-1], "an answer is read back"
    assert not any(inputs[equals + len(answer) :])
    return list(zip(names[::2], names[1::2], strict=True)), node, words(answer, task)


def is_order(edges, node, order):
    """Whether an order has all that a node depends on, each once, behind what it depends on itself, and the node."""
    before, needed, left = {}, set(), [node]
    for a, b in edges:
        before.setdefault(b, set()).add(a)
    while left:
        needed.add(at := left.pop())
        left += before.get(at, set()) - needed
    return Counter(order) == Counter(needed) and all(
        before.get(each, set()) <= set(order[:i]) for i, each in enumerate(order)
    )


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("split", SPLITS)
def test_definition(options, split):
    task = brevo(**options)
    batch = task.sample(80, split=split, seed=0)
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        edges, node, answer = read(inputs, targets, task)
        assert is_order(edges, node, answer)
        assert len(set(edges)) == len(edges)
        for degrees in (Counter(a for a, _ in edges), Counter(b for _, b in edges)):
            assert max(degrees.values()) <= 4
        assert node not in {a for a, _ in edges}, "nothing depends on the node in question"
        nodes = {each for edge in edges for each in edge}
        assert len(nodes) <= task.config.max_nodes
        assert batch.slices["ancestors"][row] >= len(answer)
        assert batch.slices["nodes"][row] >= len(nodes)
        far, steps = {node}, 0
        while not any(each not in {b for _, b in edges} for each in far):
            far, steps = {a for a, b in edges if b in far}, steps + 1
        assert batch.slices["depth"][row] == steps


def test_every_right_order_is_right_and_no_other_one():
    """All orders of the words of short answers, against a check written anew."""
    task = brevo(max_nodes=6, letters=7)
    batch = task.sample(60, split="train", seed=1)
    right = rows = 0
    for row, (inputs, targets) in enumerate(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)):
        edges, node, answer = read(inputs, targets, task)
        if len(answer) > 5:
            continue
        orders = list(permutations(answer))
        said = batch.targets[row].clamp(min=0).repeat(len(orders), 1)
        said[:, batch.scored[row]] = torch.tensor([[token for word in order for token in word] for order in orders])
        many = Batch(batch.inputs[row].expand(len(orders), -1), batch.targets[row].expand(len(orders), -1))
        judged = task.is_right(many, said).tolist()
        assert judged == [is_order(edges, node, list(order)) for order in orders]
        assert task.right_cells(many, said)[torch.tensor(judged)][:, batch.scored[row]].all()
        right, rows = right + sum(judged), rows + 1
    assert right > rows + 20, "graphs with more than one order are among them"


def test_words_of_several_letters_are_judged_whole():
    task = brevo(**CASES[2])
    batch = task.sample(50, split="test", seed=0)
    assert task.is_right(batch, batch.targets).all()
    at = batch.scored.long().argmax(1)
    for token in (1, 2, task.words.first, task.vocab_size - 1, -7, 10**6):
        said = batch.targets.clone()
        rows = said[torch.arange(50), at] != token
        said[torch.arange(50), at] = token
        assert not task.is_right(batch, said)[rows].any()
        if token not in range(3, task.vocab_size):
            assert not task.right_cells(batch, said)[torch.arange(50), at].any()


def test_a_word_that_may_come_next_is_right_behind_the_true_ones():
    task = brevo()
    batch = task.sample(200, split="validation", seed=0)
    for row in range(200):
        edges, _, answer = read(batch.inputs[row].tolist(), batch.targets[row].tolist(), task)
        begin = int(batch.scored[row].long().argmax())
        needed = set(answer)
        may = {each for each in needed if all(a not in needed for a, b in edges if b == each)}
        said = batch.targets[row : row + 1].repeat(len(needed), 1)
        said[:, begin] = torch.tensor([word[0] for word in answer])
        said[:, begin + 1] = 1  # no answer is right as a whole
        one = Batch(batch.inputs[row].expand(len(needed), -1), batch.targets[row].expand(len(needed), -1))
        assert task.right_cells(one, said)[:, begin].tolist() == [word in may for word in answer]


def test_of_next_nodes_each_is_as_probable():
    """The two orders of two nodes that depend on nothing, before the one that depends on both."""
    from zoo.tasks.kernels import dag

    edges, order = np.full((20_000, 13, 2), -1), np.full((20_000, 6), -1)
    dag.write(np.full(20_000, 6), random.row_keys("train", 0, 0, 20_000), edges, order)
    ends = edges[:, :, 1]
    free = (ends != order[:, :1]).all(1) & (ends != order[:, 1:2]).all(1) & (order[:, 2] == 5)
    first = order[free, 0] < order[free, 1]
    assert len(first) > 100
    assert abs(first.mean() - 0.5) < 5 * 0.5 / len(first) ** 0.5


def test_a_graph_is_in_one_split_whatever_its_nodes_are_called():
    task = brevo(max_nodes=6, letters=7)
    batch = task.sample(300, split="train", seed=0)
    turned = torch.cat([torch.arange(3), 3 + torch.randperm(7, generator=torch.Generator().manual_seed(0))])
    renamed = Batch(turned[batch.inputs], batch.targets)
    edges = int((batch.inputs[0] == 1).long().argmax())
    renamed.inputs[0, :edges] = renamed.inputs[0, :edges].view(-1, 2).flip(0).flatten()
    assert torch.equal(task.problems(renamed), task.problems(batch))
    assert not torch.equal(renamed.inputs, batch.inputs)
    other = batch.inputs[:, :2].flip(1)
    backward = Batch(torch.cat([other, batch.inputs[:, 2:]], 1), batch.targets)
    assert (task.problems(backward) != task.problems(batch)).double().mean() > 0.8


def test_random_words_are_hardly_ever_right():
    task = brevo()
    batch = task.sample(500, split="test", seed=0)
    guesses = torch.randint(3, task.vocab_size, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    score = task.score(batch, guesses)
    assert score["exact"] == 0
    assert 0.01 < score["accuracy"] < 0.1


def test_pictures():
    task = brevo()
    batch = task.sample(1, split="test", seed=0)
    assert task.render(batch, 0, batch.targets.clamp(min=0)).endswith("a right order")
    assert task.render(batch, 0, 0 * batch.targets).endswith("no right order")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_nodes": 5}, "max_nodes=5"),
        ({"letters": 8}, "letters=8 .*gives 8 words, too few for 10 nodes"),
        ({"min_word": 3, "max_word": 2}, "min_word=3 is more than max_word=2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        brevo(**options)
    assert "\n" not in str(error.value)
