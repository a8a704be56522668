from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.graph_coloring import BLANK, COLOUR, EDGE, fingerprint
from zoo.tasks.protocol import IGNORE, SPLITS, take


def graph_coloring(**options):
    return tasks.create_task("graph_coloring", **options)


def parts(batch, nodes):
    """Edges, given colours and planted colours by row."""
    inputs, targets = (t.numpy().reshape(-1, nodes, nodes) for t in (batch.inputs, batch.targets))
    return inputs == EDGE, inputs.diagonal(0, 1, 2), targets.diagonal(0, 1, 2)


def colourings(edges, given, colors):
    """All right answers, tried one by one."""
    pairs = [(a, b) for a, b in zip(*np.nonzero(edges), strict=True) if a < b]
    choices = [range(COLOUR, COLOUR + colors) if colour == BLANK else [colour] for colour in given]
    return {c for c in itertools.product(*choices) if all(c[a] != c[b] for a, b in pairs)}


@pytest.mark.parametrize(
    "options", [{}, {"nodes": 6, "colors": 4, "givens": 0}, {"nodes": 13, "colors": 2, "givens": 5}]
)
@pytest.mark.parametrize("split", SPLITS)
def test_rows(options, split):
    task = graph_coloring(**options)
    N, colors = task.nodes, task.config.colors
    batch = task.sample(60, split=split, seed=0)
    edges, given, planted = parts(batch, N)
    assert (edges == edges.swapaxes(1, 2)).all()
    assert ((batch.targets != IGNORE).sum(1) == N).all()
    assert ((given != BLANK).sum(1) == task.config.givens).all()
    assert ((given == BLANK) | (given == planted)).all()
    assert not (edges & (planted[:, :, None] == planted[:, None, :])).any()
    counts = np.stack([np.bincount(row - COLOUR, minlength=colors) for row in planted])
    assert (np.ptp(counts, axis=1) <= 1).all()
    assert (edges.sum((1, 2)) / 2 <= N * 5 // 2).all()


def test_the_checker_and_the_count_against_all_colourings():
    task = graph_coloring(nodes=6, givens=2, min_edges=5, max_edges=9)
    batch = task.sample(40, split="train", seed=0)
    edges, given, planted = parts(batch, 6)
    every = torch.tensor(list(itertools.product(range(COLOUR, COLOUR + 3), repeat=6)))
    answers = torch.diag_embed(every).flatten(1)
    several = 0
    for i in range(40):
        right = colourings(edges[i], given[i], 3)
        assert tuple(planted[i]) in right
        one = take(batch, torch.full((len(every),), i))
        found = task.is_right(one, answers)
        assert {tuple(row) for row in every[found].tolist()} == right
        assert torch.equal((task.right_cells(one, answers) | ~one.scored).all(1), found)
        assert len(right) <= batch.slices["colorings"][i] <= 1.5 * len(right)
        several += len(right) > 1
    assert several > 10


def test_what_is_no_answer():
    task = graph_coloring()
    batch = task.sample(20, split="test", seed=0)
    _, given, _ = parts(batch, task.nodes)
    node = [int(np.flatnonzero(row == BLANK)[0]) for row in given]
    for token in (0, BLANK, COLOUR + 3, 99, -5):
        said = batch.targets.clone()
        said[range(20), [11 * i for i in node]] = token
        assert not task.is_right(batch, said).any()
        assert task.score(batch, said)["accuracy"] == pytest.approx(0.9)
    renamed = torch.where(batch.targets >= COLOUR, COLOUR + (batch.targets - COLOUR + 1) % 3, batch.targets)
    assert not task.is_right(batch, renamed).any(), "given colours are kept"
    free = graph_coloring(givens=0)
    batch = free.sample(20, split="test", seed=0)
    renamed = torch.where(batch.targets >= COLOUR, COLOUR + (batch.targets - COLOUR + 1) % 3, batch.targets)
    assert free.is_right(batch, renamed).all()


def test_chance():
    task = graph_coloring(nodes=7, givens=4, min_edges=8, max_edges=8)
    batch = task.sample(300, split="validation", seed=0)
    edges, given, _ = parts(batch, 7)
    expected = np.mean([len(colourings(*row, 3)) for row in zip(edges, given, strict=True)]) / 3**3
    draws = torch.randint(COLOUR, COLOUR + 3, (40, 300, 7), generator=torch.Generator().manual_seed(0))
    fixed = torch.from_numpy(given.copy())
    draws = torch.where(fixed == BLANK, draws, fixed)
    found = [task.score(batch, torch.diag_embed(said).flatten(1))["exact"] for said in draws]
    assert np.mean(found) == pytest.approx(expected, abs=5 * np.sqrt(expected / 12000))


def test_fingerprints_do_not_depend_on_the_order_of_nodes():
    rng, task = np.random.default_rng(0), graph_coloring(nodes=9)
    batch = task.sample(200, split="train", seed=0)
    edges, _, _ = parts(batch, 9)
    turned = np.stack([e[np.ix_(p, p)] for e, p in zip(edges, (rng.permutation(9) for _ in edges), strict=True)])
    assert (fingerprint(turned) == fingerprint(edges)).all()
    less = edges.copy()
    for e in less:
        a, b = np.argwhere(e)[0]
        e[a, b] = e[b, a] = False
    assert (fingerprint(less) != fingerprint(edges)).all()
    assert len(np.unique(fingerprint(edges))) > 180


def test_pictures():
    task = graph_coloring()
    batch = task.sample(1, split="test", seed=0)
    said = batch.targets.clone()
    cells = (batch.inputs[0] == BLANK).nonzero().squeeze(1)
    assert "predicted: right" in task.render(batch, 0, said)
    said[0, cells[0]] = BLANK
    assert "predicted: wrong" in task.render(batch, 0, said)
    assert "?!" in task.render(batch, 0, said)
    hidden = torch.zeros_like(said, dtype=torch.bool)
    hidden[0, cells[1:]] = True
    kinds = task.kinds(batch, 0, batch.targets, hidden)
    assert [kinds[cell] for cell in cells[:3]] == ["right", "hidden", "hidden"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_edges": 9, "max_edges": 8}, "min_edges=9 is more than max_edges=8"),
        ({"nodes": 5, "max_edges": 11}, "5 nodes have at most 10 edges, not max_edges=11"),
        ({"nodes": 5, "givens": 5}, "givens=5 leaves none of 5 nodes"),
        ({"colours": 3}, "Did you mean 'colors'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        graph_coloring(**options)
    assert "\n" not in str(error.value)
