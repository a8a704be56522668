"""Block diffusion: the loss against whole rows read from rest and the exact bound; answers against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import zoo
from zoo.objectives import create_objective
from zoo.objectives.draws import RowDraws
from zoo.tasks import create_task

SUDOKU = create_task("sudoku", size=4, max_givens=12)
TEXT = create_task("text", seq_len=10)


def objective(task=TEXT, **options):
    return create_objective("block_diffusion", task, **options)


def model_of(chosen, pattern="gqa swiglu"):
    torch.manual_seed(0)
    model = zoo.create_model(pattern, d_model=16, vocab_size=chosen.vocab_size).double().eval()
    torch.nn.init.normal_(model.embedding.weight)
    return model


def from_rest(model, chosen, clean, noisy, start, stop):
    """Log probabilities (n, stop - start, values) of a block, all of the row before it being read again."""
    row = torch.cat([clean[:, :start], *[noisy[:, start:stop]] * chosen.config.readings], 1)
    hidden, _ = model.features(row)
    return model.logits(hidden[:, start - stop :])[..., : chosen.mask_token].log_softmax(-1)


@pytest.mark.parametrize("pattern", ["gqa swiglu", "mamba2 swa(window=3)", "gated_deltanet lstm"])
@pytest.mark.parametrize("how", [{"block_length": 4}, {"block_length": 3, "readings": 1}])
def test_loss_and_gradients_are_those_of_whole_rows(pattern, how):
    """The states at the starts of blocks pass gradients; the last block is shorter than the others."""
    chosen = objective(**how)
    model, rows = model_of(chosen, pattern), TEXT.sample(5, split="train", seed=0)
    data = chosen.encode(rows)
    noisy = chosen._noise(data, torch.Generator().manual_seed(4))
    loss = next(chosen.updates(model, data, {}, torch.Generator().manual_seed(4))).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    size, expected = chosen.config.block_length, 0.0
    weight = torch.zeros(5 * 10, dtype=torch.float64)
    weight[noisy.positions] = noisy.weight.double()
    for start in range(0, 10, size):
        stop = min(start + size, 10)
        found = from_rest(model, chosen, data.tokens, noisy.tokens, start, stop)
        nats = -found.gather(-1, data.tokens[:, start:stop, None]).squeeze(-1)
        expected = expected + (nats * weight.view(5, 10)[:, start:stop]).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the weights are in float32
    expected.backward()
    for found, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-6, atol=1e-8)


def test_the_loss_is_the_exact_bound_on_average():
    """For blocks of n cells, a set of k of them is masked at a random time with the weight 1/t: the integral over t is
    the Beta function of (k, n - k + 1). The mean over 4,000 draws is within four errors of the sum over all sets."""
    chosen = objective(block_length=3, eps=1e-6)
    model, rows = model_of(chosen), TEXT.sample(1, split="train", seed=0)
    data, exact = chosen.encode(rows), 0.0
    with torch.no_grad():
        for start in range(0, 10, 3):
            stop = min(start + 3, 10)
            n = stop - start
            for which in itertools.product((False, True), repeat=n):
                if k := sum(which):
                    hidden = torch.zeros(1, 10, dtype=torch.bool)
                    hidden[0, start:stop] = torch.tensor(which)
                    noisy = data.tokens.masked_fill(hidden, chosen.mask_token)
                    found = from_rest(model, chosen, data.tokens, noisy, start, stop)
                    nats = -found.gather(-1, data.tokens[:, start:stop, None]).squeeze(-1)
                    share = math.exp(math.lgamma(k) + math.lgamma(n - k + 1) - math.lgamma(n + 1))
                    exact += share * float(nats[hidden[:, start:stop]].sum()) / 10
    many = rows._replace(inputs=rows.inputs.repeat(4000, 1), targets=rows.targets.repeat(4000, 1))
    data = chosen.encode(many)._replace(streams=torch.arange(4000))
    noisy = chosen._noise(data, RowDraws.of(data))
    with torch.no_grad():
        logits, _, _ = chosen._logits(
            model, data.tokens, torch.ones_like(data.tokens, dtype=torch.bool), noisy.tokens, noisy.positions, None
        )
    nats = torch.nn.functional.cross_entropy(logits, noisy.targets, reduction="none")
    each = torch.bincount(noisy.rows, nats * noisy.weight * 4000, 4000)
    assert abs(each.mean() - exact) < 4 * each.std() / 4000**0.5 < 0.05 * exact


def test_answers_are_drawn_as_enumerated():
    """Two cells of one block in two random steps at temperature 1: every pair's share among 6,000 rows."""
    n, K = 6000, SUDOKU.vocab_size
    chosen = objective(SUDOKU, order="random", steps=2, temperature=1.0)
    model, rows = model_of(chosen), SUDOKU.sample(1, split="test", seed=0)
    tokens = chosen.encode(rows).tokens
    places, start = (22, 24), 21  # 16 cells, a separator, and blocks of 4 from step 17 on
    cells = torch.zeros_like(tokens, dtype=torch.bool)
    cells[0, list(places)] = True
    masked = tokens.masked_fill(cells, chosen.mask_token)

    def p(row):
        found = from_rest(model, chosen, row, row, start, start + 4).exp()[0]
        return [found[place - start] for place in places]

    exact = torch.zeros(K, K, dtype=torch.float64)
    with torch.no_grad():
        first = p(masked)
        exact += 0.5 * first[0][:, None] * first[1]  # both in one step: the first, or the second
        for value in range(K):
            for i in range(2):
                row = masked.clone()
                row[0, places[i]] = value
                joint = 0.25 * first[i][value] * p(row)[1 - i]
                if i == 0:
                    exact[value] += joint
                else:
                    exact[:, value] += joint
        assert exact.sum() == pytest.approx(1)
        draws = RowDraws(torch.arange(n))
        *_, answer = chosen.unmask(model, masked.expand(n, -1), cells.expand(n, -1), generator=draws)
    drawn = torch.bincount(K * answer[:, places[0]] + answer[:, places[1]], minlength=K * K).view(K, K) / n
    assert ((drawn - exact).abs() <= 4.5 * (exact * (1 - exact) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("pattern", ["gqa swiglu", "rwkv7 rwkv_channel_mix"])
def test_the_cache_changes_no_answer(pattern):
    """Greedy answers, against every block's passes over the whole row from rest."""
    chosen = objective(SUDOKU, order="confidence", steps=2)
    model, rows = model_of(chosen, pattern), SUDOKU.sample(4, split="test", seed=0)
    said = chosen.predict(model, rows)
    for i in range(4):
        data = chosen.encode(zoo.tasks.protocol.take(rows, slice(i, i + 1)))
        cells = torch.zeros_like(data.tokens, dtype=torch.bool)
        cells.view(-1)[data.positions] = True
        tokens = data.tokens.masked_fill(cells, chosen.mask_token)
        for start in range(17, 33, 4):
            stop, count = start + 4, int(cells[0, start : start + 4].sum())
            for step in range(2):
                with torch.no_grad():
                    p, best = from_rest(model, chosen, tokens, tokens, start, stop)[0].max(-1)
                left = (tokens[0, start:stop] == chosen.mask_token).nonzero().squeeze(1)
                taken = count // 2 + (count % 2 > step)
                for place in left[p[left].argsort(descending=True)][:taken]:
                    tokens[0, start + place] = best[place]
        assert torch.equal(tokens[0, -16:], said[i])


def test_a_prompt_is_continued():
    chosen = objective(block_length=4)
    model = model_of(chosen, "mamba2")
    prompt = torch.randint(TEXT.vocab_size, (3, 5))
    tokens = torch.cat([prompt, torch.full((3, 10), chosen.mask_token)], 1)
    steps = list(chosen.unmask(model, tokens, tokens == chosen.mask_token, first=5))
    assert len(steps) == 10
    assert torch.equal(steps[-1][:, :5], prompt)
    for done, step in enumerate(steps):
        for row in step:
            left = (row == chosen.mask_token).nonzero().squeeze(1)
            assert len(left) == 9 - done
            assert not len(left) or left.min() >= 5 + (done + 1) // 4 * 4


def test_it_learns_from_both_sides_of_a_block():
    """The first token of a block of two repeats the second: only two readings can know it."""
    losses = {}
    for readings in (1, 2):
        chosen = objective(create_task("text", seq_len=2), block_length=2, readings=readings)
        torch.manual_seed(0)
        model = zoo.create_model("gqa swiglu", d_model=32, vocab_size=chosen.vocab_size)
        optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
        positions = torch.arange(128)
        for _ in range(80):
            tokens = torch.randint(8, (64, 1), generator=generator).repeat(1, 2)
            data = zoo.objectives.base.Encoded(tokens, positions, tokens.flatten())
            loss = next(chosen.updates(model, data, {}, generator)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            masked = tokens.clone()
            masked[:, 0] = chosen.mask_token
            logits, _, _ = chosen._logits(model, tokens, tokens >= 0, masked, 2 * torch.arange(64), None)
        losses[readings] = float(torch.nn.functional.cross_entropy(logits, tokens[:, 0]))
    assert losses[2] < 0.3 < 1.5 < losses[1]


def test_refusals():
    with pytest.raises(zoo.UsageError, match=r"set model.causal=true, or objective=masked_diffusion"):
        create_objective("block_diffusion", SUDOKU, causal=False)
    with pytest.raises(zoo.UsageError, match=r"it should be two shares"):
        objective(mask_range=(0.8, 0.3))
    with pytest.raises(zoo.UsageError, match="leave steps out"):
        objective(steps=2, entropy_bound=0.1)
