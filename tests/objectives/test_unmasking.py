"""Samplers of masked diffusion against enumeration: masks that come back, bounded entropies, remainders."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import zoo
from zoo.objectives import create_objective
from zoo.objectives.draws import RowDraws
from zoo.objectives.unmasking import remasked_step, step_of, unmasked
from zoo.tasks import create_task

SUDOKU = create_task("sudoku", size=4, max_givens=6)
K, PLACES = SUDOKU.vocab_size, (2, 9)


class Pair(nn.Module):
    """Predicts two cells of a row from both of them, masks included, by a table of random logits."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = torch.randn(K + 1, K + 1, 2, K, generator=generator, dtype=torch.float64)
        self.unused, self.config = nn.Parameter(torch.zeros(1)), zoo.ModelConfig(pattern="mlp", vocab_size=K + 1)

    def features(self, tokens, state, context):
        hidden = torch.zeros(*tokens.shape, K + 1, dtype=torch.float64)
        for i, place in enumerate(PLACES):
            hidden[:, place, :K] = self.table[tokens[:, PLACES[0]], tokens[:, PLACES[1]], i]
        return hidden, ()

    def logits(self, hidden):
        return hidden


def reverse(cell, p, rate, t, s):
    """The probabilities (K + 1) of a cell at time s: equation 6 of ReMDM (arXiv 2503.00307), the signal being 1 - t."""
    after = torch.zeros(K + 1, dtype=torch.float64)
    kept_t, kept_s = 1 - t, 1 - s
    if cell < K:
        after[cell], after[K] = 1 - rate, rate
    else:
        after[:K] = p * (kept_s - (1 - rate) * kept_t) / (1 - kept_t)
        after[K] = (1 - kept_s - rate * kept_t) / (1 - kept_t)
    return after


@pytest.mark.parametrize("remasking", ["cap", "rescale", "confidence", "loop"])
def test_cells_are_masked_again_as_enumerated(remasking):
    """Two cells in four steps: the share of every pair among 10,000 rows, against the exact probability.

    The state of the chain is the pair, and for "confidence" the probability with which each cell got its token.
    """
    n, steps, eta = 10_000, 4, 0.4
    chosen = create_objective("masked_diffusion", SUDOKU, causal=False, order="random", steps=steps, temperature=1.0)
    loop = {"loop_on": 0.75, "loop_off": 0.25, "loop_signal": 0.6}
    how = chosen.config.model_copy(update={"remasking": remasking, "remasking_rate": eta, **loop})
    model = Pair()
    states = {(K, K, math.inf, math.inf): 1.0}
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        if remasking == "loop":  # the masked share falls to 0.4 in a step, stays for two, and falls to 0
            t, s = [(1.0, 0.4), (0.4, 0.4), (0.4, 0.4), (0.4, 0.0)][i]
        most = 1.0 if t == 1 else min(1.0, s / (1 - t))
        found: dict[tuple, float] = {}
        for (a, b, *sure), weight in states.items():
            share = torch.tensor([-x for x in sure]).exp()
            rates = {
                "cap": [min(eta, most)] * 2,
                "rescale": [eta * most] * 2,
                "loop": [eta if i in (1, 2) else 0.0] * 2,
                "confidence": [most * float(x / share.sum()) if x else 0.0 for x in share],
            }[remasking]
            p = model.table[a, b].softmax(-1)
            after = [reverse(c, p[j], rates[j], t, s) for j, c in enumerate((a, b))]
            for pair in itertools.product(range(K + 1), repeat=2):
                chance = weight * float(after[0][pair[0]] * after[1][pair[1]])
                if chance:
                    now = [
                        math.inf if c == K else sure[j] if (a, b)[j] < K else float(p[j][c]) for j, c in enumerate(pair)
                    ]
                    key = (*pair, *(now if remasking == "confidence" else (1.0, 1.0)))
                    found[key] = found.get(key, 0.0) + chance
        states = found
    exact = torch.zeros(K + 1, K + 1, dtype=torch.float64)
    for (a, b, *_), weight in states.items():
        exact[a, b] += weight
    assert exact[:K, :K].sum() == pytest.approx(1)
    cells = torch.zeros(n, 16, dtype=torch.bool)
    cells[:, PLACES] = True
    tokens = torch.zeros(n, 16, dtype=torch.int64).masked_fill(cells, chosen.mask_token)
    *_, answer = chosen.unmask(model, tokens, cells, generator=RowDraws(torch.arange(n)), how=how)
    drawn = torch.bincount(K * answer[:, PLACES[0]] + answer[:, PLACES[1]], minlength=K * K).view(K, K) / n
    error = (exact[:K, :K] * (1 - exact[:K, :K]) / n).sqrt()
    assert ((drawn - exact[:K, :K]).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize(("steps", "dtype"), [(20, torch.float64), (40, torch.float32)])
def test_a_loop_has_the_chances_of_the_authors_code(steps, dtype):
    """Of every step: that a cell gets a token, and that a token is masked again (remdm-loop, with the published window,
    whose ends are on the grid of the steps, signal and rate; its three branches written out)."""
    on, off, signal, rate, n = 0.55, 0.05, 0.9, 0.02, 40_000
    options = {"order": "random", "remasking": "loop", "remasking_rate": rate}
    how = create_objective("masked_diffusion", SUDOKU, causal=False, **options).config
    assert (how.loop_on, how.loop_off, how.loop_signal) == (on, off, signal)
    tokens = torch.tensor([[K, 0]]).expand(n, 2)
    for i in range(steps):
        t, dt = 1 - i / steps, 1 / steps
        if t > on + 1e-9:
            masked_t, masked_s = 1 - (1 - t) * signal / (1 - on), 1 - (1 - t + dt) * signal / (1 - on)
            shown, hidden = (masked_t - masked_s) / masked_t, 0.0
        elif t <= off + 1e-9:
            masked_t, masked_s = t * (1 - signal) / off, (t - dt) * (1 - signal) / off
            shown, hidden = (masked_t - masked_s) / masked_t, 0.0
        else:
            shown, hidden = (signal - (1 - rate) * signal) / (1 - signal), rate
        state = tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(n, 2, K, dtype=dtype)
        own = RowDraws(torch.arange(n)).at(None, i)
        new, _ = remasked_step(*state, torch.ones(n, 2), i, torch.full((n,), steps), how, own, K)
        for found, chance in zip((new != tokens).double().mean(0), (shown, hidden), strict=True):
            assert abs(found - chance) <= 4.5 * (chance * (1 - chance) / n) ** 0.5 + 1e-9


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_a_loop_leaves_no_mask_however_few_its_steps(steps):
    chosen = create_objective("masked_diffusion", SUDOKU, causal=False, order="random", steps=steps, remasking="loop")
    cells = torch.zeros(30, 16, dtype=torch.bool)
    cells[:, PLACES] = True
    tokens = torch.zeros(30, 16, dtype=torch.int64).masked_fill(cells, chosen.mask_token)
    frames = list(chosen.unmask(Pair(), tokens, cells, generator=RowDraws(torch.arange(30))))
    assert len(frames) == steps
    assert (frames[-1] != chosen.mask_token).all()


def test_a_pass_unmasks_what_its_entropies_allow():
    """Three cells of entropies 0.33, 0.50 and 0.69 nats: the sum without the largest is 0, 0.33 and 0.82."""
    chosen = create_objective("masked_diffusion", SUDOKU, causal=False)
    logits = torch.full((1, 3, K), -40.0, dtype=torch.float64)
    for cell, p in enumerate((0.5, 0.9, 0.8)):
        logits[0, cell, :2] = torch.tensor([p, 1 - p], dtype=torch.float64).log()
    tokens, cells = torch.full((1, 3), chosen.mask_token), torch.ones(1, 3, dtype=torch.bool)
    for bound, found in ((0.0, [1]), (0.3, [1]), (0.33, [1, 2]), (0.8, [1, 2]), (0.83, [0, 1, 2])):
        for order in ("entropy", "confidence", "margin"):
            how = chosen.config.model_copy(update={"order": order, "entropy_bound": bound})
            new = step_of(tokens, cells, cells.sum(1), logits, 0, 1, how, None, chosen.mask_token)
            assert (new[0] != chosen.mask_token).nonzero().squeeze(1).tolist() == found


def test_a_bound_of_zero_takes_one_cell_of_a_doubtful_model_in_a_pass():
    rows = SUDOKU.sample(4, split="test", seed=0)
    chosen = create_objective("masked_diffusion", SUDOKU, causal=False, entropy_bound=0.0, order="entropy")
    torch.manual_seed(0)
    model = zoo.create_model("mha", d_model=16, vocab_size=chosen.vocab_size, causal=False).double()
    frames = list(chosen.solve(model, rows))
    assert len(frames) == chosen.passes(model, rows) == (rows.inputs == SUDOKU.blank).sum(1).max()
    wide = create_objective("masked_diffusion", SUDOKU, causal=False, entropy_bound=1e3, order="entropy")
    assert len(list(wide.solve(model, rows))) == 1


def test_a_remainder_is_spread():
    """Eight cells in five steps: 2, 2, 2, 1, 1 as in LLaDA's code, or 1, 2, 1, 2, 2."""
    for rule, expected in (("first", [2, 4, 6, 7, 8]), ("spread", [1, 3, 4, 6, 8])):
        assert [int(unmasked(torch.tensor([8]), i, 5, rule)) for i in range(5)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remasking": "cap"}, r'remasking is of a random order without blocks: set order="random"'),
        ({"remasking": "cap", "order": "random", "block_length": 4}, "and no block_length"),
        ({"entropy_bound": 0.1, "order": "random"}, r'order="random" does not: set order="entropy"'),
        ({"entropy_bound": 0.1, "steps": 4}, "leave steps out"),
        ({"remasking": "loops", "order": "random"}, "remasking='loops' is not allowed"),
        ({"remasking": "loop", "order": "random", "loop_on": 0.05}, "loop_on=0.05 with loop_off=0.05 is not allowed"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(zoo.UsageError, match=message):
        create_objective("masked_diffusion", SUDOKU, causal=False, **options)
