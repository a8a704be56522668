"""Uniform diffusion: its bound against its definition and exact likelihoods, its sampler against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from zoo.objectives import create_objective
from zoo.objectives.base import Encoded
from zoo.objectives.draws import RowDraws
from zoo.objectives.uniform_diffusion import bound_of, posterior
from zoo.tasks import create_task
from zoo.tasks.protocol import IGNORE

SUDOKU = create_task("sudoku", size=4, max_givens=6)


def objective(task=SUDOKU, **options):
    return create_objective("uniform_diffusion", task, causal=False, **options)


def defined(p, z, x, a):
    """Equation 18 of UDLM (arXiv 2412.10193), for a signal that decays at the rate 1; sums written out."""
    K = len(p)
    u = [K * a * (j == x) + 1 - a for j in range(K)]
    v = [K * a * p[j] + 1 - a for j in range(K)]
    inner = sum(u[j] / u[z] * math.log(v[z] * u[j] / (v[j] * u[z])) for j in range(K))
    return -1 / (K * a) * (K / u[z] - K / v[z] - inner)


def noise(x, z, a, K):
    """The probability of the noisy token z where the clean one is x."""
    return a * (z == x) + (1 - a) / K


def test_the_bound_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    for K in (2, 5, 11):
        logits = 2 * torch.randn(40, K, generator=generator, dtype=torch.float64)
        z, x = (torch.randint(K, (40,), generator=generator) for _ in range(2))
        z = torch.where(torch.arange(40) % 2 == 0, x, z)
        a = torch.rand(40, generator=generator, dtype=torch.float64).clamp(1e-3, 0.999)
        rows = zip(logits.softmax(-1).tolist(), z.tolist(), x.tolist(), a.tolist(), strict=True)
        expected = torch.tensor([defined(*row) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(bound_of(logits, z, x, a), expected, rtol=1e-9, atol=1e-12)
        assert (expected >= 0).all()


def test_the_bound_is_the_limit_of_the_divergence_of_a_step():
    """KL(q(s | z, x) || p(s | z)) of a step from t to t - dt, by dt."""
    generator, dt, K = torch.Generator().manual_seed(1), 1e-5, 4
    logits = torch.randn(30, K, generator=generator, dtype=torch.float64)
    z, x = (torch.randint(K, (30,), generator=generator) for _ in range(2))
    a = 0.1 + 0.8 * torch.rand(30, generator=generator, dtype=torch.float64)
    told = nn.functional.one_hot(x, K).double()
    q, p = (posterior(c, z, (a + dt)[:, None], a[:, None]) for c in (told, logits.softmax(-1)))
    torch.testing.assert_close(q.sum(-1), torch.ones(30, dtype=torch.float64))
    step = (q * (q / p).log()).sum(-1) / dt
    torch.testing.assert_close(bound_of(logits, z, x, a), step, rtol=2e-3, atol=1e-5)


def test_a_step_is_bayes_rule():
    """q(s | z, x) is proportional to q(z | s) q(s | x), enumerated."""
    K, kept_s, kept_t = 3, 0.7, 0.25
    for x, z in itertools.product(range(K), repeat=2):
        joint = [noise(s, z, kept_t / kept_s, K) * noise(x, s, kept_s, K) for s in range(K)]
        told = nn.functional.one_hot(torch.tensor(x), K).double()
        found = posterior(told, torch.tensor(z), torch.tensor([kept_s]).double(), torch.tensor([kept_t]).double())
        torch.testing.assert_close(found, torch.tensor(joint).double() / sum(joint))


def test_of_the_true_denoiser_the_bound_is_the_entropy():
    """Two dependent tokens of three values; every clean and every noisy pair is enumerated, times by quadrature.

    The best prediction for a cell is the probability of its token given the noisy tokens of the other cells alone.
    """
    K = 3
    data = torch.tensor([0.3, 0.02, 0.08, 0.05, 0.25, 0.05, 0.01, 0.04, 0.2], dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(9), torch.arange(9))  # clean, noisy
    nodes, weights = np.polynomial.legendre.leggauss(60)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        a = (1 - node) / 2
        one = torch.tensor([[noise(x, z, a, K) for z in range(K)] for x in range(K)], dtype=torch.float64)
        joint = data[pairs[:, 0]] * one[pairs[:, 0] // K, pairs[:, 1] // K] * one[pairs[:, 0] % K, pairs[:, 1] % K]
        for of, other, table in ((pairs // K, pairs % K, data.view(K, K)), (pairs % K, pairs // K, data.view(K, K).T)):
            given = table @ one  # clean token of the cell, noisy token of the other
            told = (given / given.sum(0)).T[other[:, 1]]
            signal = torch.full((81,), a, dtype=torch.float64)
            total += weight / 2 * float((joint * bound_of(told.log(), of[:, 1], of[:, 0], signal)).sum())
    assert total == pytest.approx(-float((data * data.log()).sum()), rel=2e-4)


class Pair(nn.Module):
    """Predicts two cells of a row from both of them and from the time, by a table of random logits."""

    def __init__(self, places, n_values, bins):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(bins, n_values, n_values, 2, n_values, generator=generator, dtype=torch.float64)
        self.places, self.n_values = places, n_values
        self.unused = nn.Parameter(torch.zeros(1))

    def features(self, tokens, state, context):
        a, b = (tokens[:, 1 + place] - self.n_values for place in self.places)
        hidden = torch.zeros(*tokens.shape, self.n_values, dtype=torch.float64)
        for i, place in enumerate(self.places):
            hidden[:, 1 + place] = self.table[tokens[:, 0] - 2 * self.n_values, a, b, i]
        return hidden, ()

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("tail", ["greedy", "ancestral"])
def test_answers_are_drawn_as_enumerated(tail):
    """Two cells in two steps and a last: the share of every pair among 10,000 rows, against the exact probability."""
    n, K, places, steps = 10_000, SUDOKU.vocab_size, (2, 9), 2
    chosen = objective(steps=steps, tail=tail, time_bins=4, temperature=0.8)
    model = Pair(places, K, 4)
    p, eps = torch.full((K, K), K**-2.0, dtype=torch.float64), chosen.config.eps
    for i in range(steps + 1):
        t = 1 - (1 - eps) * i / steps
        s = 1 - (1 - eps) * (i + 1) / steps if i < steps else 0.0
        kept_t, kept_s = 1 - (1 - eps) * t, 1 - (1 - eps) * s
        nearest = min(int((1 - kept_t) * 4), 3)
        new = torch.zeros_like(p)
        for a, b in itertools.product(range(K), repeat=2):
            of_cell = []
            for cell, z in enumerate((a, b)):
                logits = model.table[nearest, a, b, cell]
                told = (logits / 0.8).softmax(-1)
                if tail == "greedy" and i == steps:
                    of_cell.append(nn.functional.one_hot(logits.argmax(), K).double())
                else:
                    each = torch.zeros(K, dtype=torch.float64)
                    for x, y in itertools.product(range(K), repeat=2):  # clean at 0, y at s, z at t
                        each[y] += told[x] * noise(y, z, kept_t / kept_s, K) * noise(x, y, kept_s, K)
                    of_cell.append(each / each.sum())
            new += p[a, b] * of_cell[0][:, None] * of_cell[1][None]
        p = new
    tokens = torch.zeros(n, 16, dtype=torch.int64)
    positions = (16 * torch.arange(n)[:, None] + torch.tensor(places)).flatten()
    data = Encoded(tokens, positions, tokens.flatten()[positions], streams=torch.arange(n))
    *_, answer = chosen._answers(model, data)
    assert (answer.sum(1) == answer[:, places[0]] + answer[:, places[1]]).all()
    found = torch.bincount(K * answer[:, places[0]] + answer[:, places[1]], minlength=K * K).view(K, K) / n
    error = (p * (1 - p) / n).sqrt()
    assert ((found - p).abs() <= 4.5 * error + 1e-9).all()


def test_the_loss_of_a_flat_model_is_log_of_the_tokens():
    """Within four errors over 100 batches, of training and of evaluation; noise is drawn as it should be."""
    rows = SUDOKU.sample(64, split="train", seed=0)
    chosen = objective(eps=1e-4)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def features(self, tokens, state, context):
            return torch.zeros(*tokens.shape, chosen.vocab_size, dtype=torch.float64), ()

        def logits(self, hidden):
            return hidden

    data, generator = chosen.encode(rows), torch.Generator().manual_seed(0)
    losses = torch.stack([next(chosen.updates(Flat(), data, {}, generator)).loss for _ in range(100)])
    assert abs(losses.mean() - math.log(SUDOKU.vocab_size)) < 4 * losses.std() / 100**0.5
    many = SUDOKU.sample(4000, split="train", seed=1)
    assert chosen.evaluate(Flat(), many)[1] == pytest.approx(math.log(SUDOKU.vocab_size), rel=0.03)
    noisy = chosen._noise(chosen.encode(many), RowDraws.of(chosen.encode(many)))
    found = noisy.tokens.flatten()[noisy.positions]
    K, kept = SUDOKU.vocab_size, noisy.signal[noisy.rows]
    expected = (kept + (1 - kept) / K).mean()
    assert (found == noisy.targets).double().mean() == pytest.approx(float(expected), abs=0.01)
    untouched = torch.ones_like(noisy.tokens, dtype=torch.bool)
    untouched.view(-1)[noisy.positions] = False
    assert (noisy.tokens[untouched] == chosen.encode(many).tokens[untouched]).all()


def test_it_teaches_a_pattern_that_looks_ahead():
    torch.manual_seed(0)
    task = create_task("sudoku", size=4, max_givens=12)
    chosen = objective(task)
    model = zoo.create_model("gqa swiglu", d_model=32, vocab_size=chosen.vocab_size, causal=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(30):
        rows = task.sample(24, split="train", seed=0, start=24 * step)
        for update in chosen.updates(model.train(), chosen.encode(rows), {}, generator):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
            losses.append(update.loss.item())
    assert sum(losses[-10:]) < 0.85 * sum(losses[:5]) * 2


def test_answers_are_tokens_of_the_task():
    for task in (SUDOKU, create_task("text", seq_len=16), create_task("mqar", seq_len=16, n_pairs=2, vocab_size=20)):
        chosen = objective(task)
        model = zoo.create_model("gqa", d_model=16, vocab_size=chosen.vocab_size, causal=False)
        rows = task.sample(5, split="test", seed=0)
        frames = list(chosen.solve(model, rows))
        assert len(frames) <= chosen.passes(model, rows)
        asked = rows.targets != IGNORE
        for frame in frames:
            assert not frame.hidden.any()
            assert (frame.tokens[~asked] == rows.inputs[~asked]).all()
            assert 0 <= frame.tokens.min() <= frame.tokens.max() < task.vocab_size


def test_refusals():
    with pytest.raises(zoo.UsageError, match=r"uniform_diffusion guesses from both sides: set model.causal=false"):
        create_objective("uniform_diffusion", SUDOKU, causal=True)
    with pytest.raises(zoo.UsageError, match="tail='best' is not allowed"):
        objective(tail="best")
