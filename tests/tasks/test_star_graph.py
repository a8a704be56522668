from __future__ import annotations

import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS
from zoo.tasks.star_graph import BETWEEN, EQUALS, LABEL, QUESTION


def star_graph(**options):
    return tasks.create_task("star_graph", **options)


def read(inputs):
    """Edges, centre and goal of a row, and where its answer begins."""
    question = inputs.index(QUESTION)
    pieces = [inputs[i : i + 3] for i in range(0, question, 3)]
    assert all(mark == BETWEEN for _, _, mark in pieces)
    assert inputs[question + 3] == EQUALS
    return [(a, b) for a, b, _ in pieces], *inputs[question + 1 : question + 3], question + 3


def solved(edges, center, goal):
    """The path, found from the goal backwards."""
    before = {b: a for a, b in edges}
    path = [goal]
    while path[-1] != center:
        path.append(before[path[-1]])
    return path[::-1]


@pytest.mark.parametrize(
    "options",
    [{}, {"n_paths": 5, "length": 3, "labels": 11}, {"n_paths": 3, "length": 7, "min_length": 3, "reverse": True}],
)
@pytest.mark.parametrize("split", SPLITS)
def test_rows(options, split):
    task = star_graph(**options)
    c = task.config
    batch = task.sample(60, split=split, seed=0)
    places, lengths = set(), set()
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        edges, center, goal, begin = read(inputs)
        path = solved(edges, center, goal)
        assert len(edges) == c.n_paths * (len(path) - 1)
        assert len({node for edge in edges for node in edge}) == len(edges) + 1
        assert min(min(edge) for edge in edges) >= LABEL
        assert sum(a == center for a, _ in edges) == c.n_paths
        written = path[::-1] if c.reverse else path
        assert targets[begin : begin + len(path)] == written
        assert inputs[begin + 1 : begin + len(path)] == written[:-1]
        assert not any(inputs[begin + len(path) :])
        assert [t for t in targets if t != IGNORE] == written
        places.add(edges.index((path[-2], goal)))
        lengths.add(len(path))
    assert len(places) > len(edges) / 2, "edges are shuffled"
    assert lengths == set(range(c.min_length or c.length, c.length + 1))


def test_a_path_at_random_is_right_once_in_all_paths():
    """All that a model of each next node can know before it has seen the branch."""
    task = star_graph(n_paths=4, length=4)
    batch = task.sample(1500, split="validation", seed=0)
    generator = torch.Generator().manual_seed(0)
    said = batch.targets.clone()
    for row, inputs in enumerate(batch.inputs.tolist()):
        edges, center, _, begin = read(inputs)
        ends = {b for _, b in edges} - {a for a, _ in edges}
        goal = sorted(ends)[int(torch.randint(4, (), generator=generator))]
        said[row, begin : begin + 4] = torch.tensor(solved(edges, center, goal))
    score = task.score(batch, said)
    assert score["exact"] == score["branch"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("reverse", [False, True])
def test_branch_is_the_neighbour_of_the_centre(reverse):
    task = star_graph(reverse=reverse, min_length=2)
    batch = task.sample(40, split="test", seed=0)
    said = batch.targets.clone()
    for row, inputs in enumerate(batch.inputs.tolist()):
        edges, center, goal, begin = read(inputs)
        path = solved(edges, center, goal)
        place = begin + (len(path) - 2 if reverse else 1)
        assert said[row, place] == path[1]
        said[row, place] = center
    assert task.score(batch, said)["branch"] == 0
    others = torch.where(said == batch.targets, 0, batch.targets)
    assert task.score(batch, others)["branch"] == 1


def test_the_order_of_edges_makes_no_other_problem():
    task = star_graph()
    batch = task.sample(50, split="train", seed=0)
    turned = batch.inputs.clone()
    edges = turned[:, : 3 * task.n_edges].view(50, -1, 3)
    edges.copy_(edges.flip(1).clone())
    assert not torch.equal(turned, batch.inputs)
    assert torch.equal(task.problems(batch), task.problems(batch._replace(inputs=turned)))
    other = batch.inputs.clone()
    other[:, 3 * task.n_edges + 2] = 99
    assert not (task.problems(batch) == task.problems(batch._replace(inputs=other))).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 6}, "min_length=6 is more than length=5"),
        ({"labels": 8}, "make 9 nodes, which need as many labels; labels=8 are too few"),
        ({"length": 2, "labels": 3}, "gives only 6 different rows"),
        ({"paths": 3}, "paths"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        star_graph(**options)
    assert "\n" not in str(error.value)
