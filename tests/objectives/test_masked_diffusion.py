"""Masked diffusion: what is masked, how it is weighted, and the order in which answers are unmasked."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zoo
from zoo.objectives import create_objective
from zoo.objectives.unmasking import step_of
from zoo.objectives.unmasking import unmasked as unmasked_after
from zoo.tasks import create_task
from zoo.tasks.protocol import IGNORE

SUDOKU = create_task("sudoku", size=4, max_givens=6)
MQAR = create_task("mqar", seq_len=16, n_pairs=2, vocab_size=20)
COPY = create_task("copy", seq_len=12, symbols=6)


def objective(task=SUDOKU, **options):
    return create_objective("masked_diffusion", task, causal=False, **options)


class Table(nn.Module):
    """A model that knows the answer, and counts its passes: cell i is sure by `sureness[i]`."""

    config = SimpleNamespace(shifted_logits=False)

    def __init__(self, answers, vocab_size, sureness):
        super().__init__()
        self.answers, self.vocab_size, self.sureness = answers, vocab_size, sureness
        self.unused = nn.Parameter(torch.zeros(1))
        self.passes = 0

    def features(self, tokens, state, context):
        self.passes += 1
        one_hot = nn.functional.one_hot(self.answers[: len(tokens)], self.vocab_size).float()
        return one_hot * self.sureness[:, None], ()

    def logits(self, hidden):
        return hidden


def table(rows, chosen, sureness=None):
    sureness = torch.arange(16).float() + 1 if sureness is None else sureness
    return Table(rows.targets, chosen.vocab_size, sureness)


def unmasked(chosen, model, rows, **how):
    """Tokens after every step, from nothing but the givens."""
    cells = rows.inputs == SUDOKU.blank
    start = rows.targets.masked_fill(cells, chosen.mask_token)
    generator = torch.Generator().manual_seed(0)
    how = chosen.config.model_copy(update=how)
    return cells, list(chosen.unmask(model, start, cells, generator=generator, how=how))


@pytest.mark.parametrize("weighting", ["llada", "mdlm"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_loss_bounds_the_likelihood(weighting, antithetic):
    """Of a model that says p for every cell, the loss is -log p on average, whatever was masked."""
    chosen = objective(weighting=weighting, antithetic=antithetic)
    rows = SUDOKU.sample(64, split="train", seed=0)
    model = table(rows, chosen, torch.zeros(16))
    data, generator = chosen.encode(rows), torch.Generator().manual_seed(0)
    losses = [next(chosen.updates(model, data, {}, generator)).loss for _ in range(300)]
    mean, error = torch.stack(losses).mean(), torch.stack(losses).std() / 300**0.5
    expected = math.log(SUDOKU.vocab_size)
    assert abs(mean - expected) < 4 * error, (mean, error)
    assert error < 0.02 * expected


@pytest.mark.parametrize("weighting", ["llada", "mdlm"])
def test_antithetic_times_are_those_of_mdlm(weighting):
    """The i-th of n rows has its own draw within the i-th n-th, as `_sample_t` of the authors' code."""
    chosen = objective(weighting=weighting)
    data = chosen.encode(SUDOKU.sample(64, split="train", seed=0))
    draws = torch.rand(64, generator=torch.Generator().manual_seed(5))
    t = (draws / 64 + torch.arange(64) / 64) % 1
    noisy = chosen._noise(data, torch.Generator().manual_seed(5))
    cells = torch.bincount(data.positions // 16)
    weight = noisy.weight * 64 * cells[noisy.rows]
    torch.testing.assert_close(weight, 1 / ((1 - 1e-3) * t + 1e-3)[noisy.rows])
    assert len(noisy.rows.unique()) > 55


@pytest.mark.parametrize(("cells", "steps"), [(20, 13), (20, 7), (16, 16), (5, 8), (12, 1), (9, 4)])
def test_the_first_steps_unmask_what_is_left_over(cells, steps):
    """`get_num_transfer_tokens` of LLaDA's code: cells // steps in every step, one more in the first cells % steps."""
    expected = [cells // steps + (step < cells % steps) for step in range(steps)]
    count = torch.tensor([cells])
    kept = [int(unmasked_after(count, step, steps)) for step in range(steps)]
    assert [b - a for a, b in itertools.pairwise([0, *kept])] == expected
    assert kept[-1] == cells


def test_rows_have_steps_of_their_own():
    """Of rows of 8 and 12 blanks in 5 passes: 2, 2, 2, 1, 1 and 3, 3, 2, 2, 2 at a time."""
    task = create_task("sudoku", size=4, max_givens=8)
    rows = task.sample(40, split="test", seed=0)
    chosen = objective(task)
    cells, history = unmasked(chosen, table(rows, chosen), rows, steps=5)
    left = torch.stack([(tokens == chosen.mask_token).sum(1) for tokens in history])
    blanks = cells.sum(1)
    assert {8, 12} <= set(blanks.tolist())
    taken = -torch.cat([blanks[None], left]).diff(dim=0)
    for n, expected in ((8, [2, 2, 2, 1, 1]), (12, [3, 3, 2, 2, 2])):
        assert (torch.tensor(expected) == taken[:, blanks == n].T).all()


def test_only_the_answer_is_masked():
    rows = SUDOKU.sample(32, split="train", seed=0)
    chosen = objective()
    data = chosen.encode(rows)
    assert (data.tokens == rows.targets).all()
    blank = rows.inputs == SUDOKU.blank
    assert (data.positions == blank.flatten().nonzero().squeeze(1)).all()
    noisy = chosen._noise(data, torch.Generator().manual_seed(0))
    hidden = noisy.tokens == chosen.mask_token
    assert hidden.any()
    assert not (hidden & ~blank).any()
    assert (noisy.tokens[~hidden] == rows.targets[~hidden]).all()
    assert (hidden.flatten().nonzero().squeeze(1) == noisy.positions).all()


def test_questions_without_blanks_are_answered_behind_them():
    rows = MQAR.sample(8, split="train", seed=0)
    chosen = objective(MQAR)
    data = chosen.encode(rows)
    assert chosen.length == data.tokens.shape[1] == 32
    assert (data.tokens[:, :16] == rows.inputs).all()
    assert (data.positions % 32 >= 16).all()
    assert (data.targets == rows.targets[rows.targets != IGNORE]).all()
    hidden = chosen._noise(data, torch.Generator().manual_seed(0)).tokens[:, :16]
    assert (hidden == rows.inputs).all()


def test_an_answer_that_is_a_text_is_masked_where_the_row_says_it():
    rows = COPY.sample(5, split="train", seed=0)
    asked = rows.targets != IGNORE
    chosen = objective(COPY)
    data = chosen.encode(rows)
    assert chosen.length == data.tokens.shape[1] == COPY.seq_len + 1
    assert (data.tokens[:, :-1] == rows.inputs).all()
    assert (data.tokens[:, 1:][asked] == rows.targets[asked]).all()
    cells = torch.zeros_like(data.tokens, dtype=torch.bool)
    cells.view(-1)[data.positions] = True
    assert (cells[:, 1:] == asked).all()
    assert not cells[:, 0].any()
    model = zoo.create_model("gqa", d_model=16, vocab_size=chosen.vocab_size, causal=False)
    frames = list(chosen.solve(model, rows))
    assert (frames[-1].tokens == chosen.predict(model, rows)).all()
    for frame in frames:
        assert (frame.tokens[~asked] == rows.inputs[~asked]).all()


def test_shifted_logits_are_those_of_the_next_cell():
    """A model that knows cell i + 1 at cell i answers all cells, and the first one by its own logits."""
    rows = SUDOKU.sample(40, split="train", seed=0)
    chosen = objective()
    right = table(rows, chosen, torch.full((16,), 40.0))
    shifted = table(rows, chosen, torch.full((16,), 40.0))
    shifted.answers = torch.cat([rows.targets[:, 1:], rows.targets[:, :1]], 1)
    shifted.answers[:, 0] = rows.targets[:, 0]  # which its own logits are of
    shifted.config = SimpleNamespace(shifted_logits=True)
    cells = rows.inputs == SUDOKU.blank
    cells[:, 1] = False
    for model in (right, shifted):
        assert torch.equal(chosen.evaluate(model, rows)[0][cells], rows.targets[cells])
    shifted.config = right.config
    assert (chosen.evaluate(shifted, rows)[0][cells] != rows.targets[cells]).any()


def test_no_other_objective_reads_shifted_logits():
    config = zoo.create_model("dream-tiny", vocab_size=MQAR.vocab_size + 1).config
    assert objective(MQAR).needs(config)
    other = create_objective("uniform_diffusion", MQAR, causal=False)
    with pytest.raises(zoo.UsageError, match="shifted_logits=True is not allowed: uniform_diffusion reads the logits"):
        other.needs(config)


def test_prompts_are_dropped_where_guidance_asks_for_it():
    rows = SUDOKU.sample(200, split="train", seed=0)
    seen = []

    class Spy(Table):
        def features(self, tokens, state, context):
            seen.append(tokens)
            return super().features(tokens, state, context)

    chosen = objective(prompt_dropout=0.5)
    model = Spy(rows.targets, chosen.vocab_size, torch.ones(16))
    next(chosen.updates(model, chosen.encode(rows), {}, torch.Generator().manual_seed(0)))
    given = rows.inputs != SUDOKU.blank
    dropped = ((seen[0] == chosen.mask_token) | ~given).all(1)
    assert 70 < dropped.sum() < 130
    assert (seen[0][~dropped][given[~dropped]] == rows.inputs[~dropped][given[~dropped]]).all()


@pytest.mark.parametrize("order", ["random", "confidence", "margin", "entropy", "low_confidence"])
@pytest.mark.parametrize("steps", [1, 3, None])
def test_every_order_finds_what_the_model_knows(order, steps):
    rows = SUDOKU.sample(5, split="test", seed=0)
    chosen = objective(order=order, steps=steps)
    model = table(rows, chosen)
    predictions, loss = chosen.evaluate(model, rows)
    assert (predictions == rows.targets).all()
    assert 0 < loss < math.log(SUDOKU.vocab_size)


@pytest.mark.parametrize("order", ["confidence", "margin", "low_confidence"])
def test_the_surest_cell_comes_first(order):
    rows = SUDOKU.sample(3, split="test", seed=0)
    chosen = objective(order=order)
    cells, history = unmasked(chosen, table(rows, chosen), rows)
    assert len(history) == cells.sum(1).max()
    for row in range(3):
        masked = [(t[row] == chosen.mask_token).nonzero().squeeze(1) for t in history]
        for left in masked:  # sureness grows with the position, so what is left lies to the left
            assert (left == cells[row].nonzero().squeeze(1)[: len(left)]).all()


def test_a_margin_is_not_a_confidence():
    """Cell a: probabilities .5 and .45; cell b: .4 and two of .3. The first is more probable, the second less torn."""
    chosen = objective(SUDOKU)
    logits = torch.full((1, 2, 6), -20.0)
    logits[0, 0, :3] = torch.tensor([0.5, 0.45, 0.05]).log()
    logits[0, 1, :3] = torch.tensor([0.4, 0.3, 0.3]).log()
    tokens, cells = torch.full((1, 2), chosen.mask_token), torch.ones(1, 2, dtype=torch.bool)
    for order, first in (("confidence", [0, chosen.mask_token]), ("margin", [chosen.mask_token, 0])):
        how = chosen.config.model_copy(update={"order": order})
        assert step_of(tokens, cells, cells.sum(1), logits, 0, 2, how, None, chosen.mask_token).tolist() == [first]


def test_a_doubtful_guess_is_masked_again():
    chosen = objective(order="low_confidence")
    tokens = torch.tensor([[1, chosen.mask_token, chosen.mask_token]])
    cells = torch.ones(1, 3, dtype=torch.bool)
    logits = torch.zeros(1, 3, 6)
    logits[0, 1, 2], logits[0, 2, 3] = 9.0, 8.0  # the token 1 taken before has the probability 1/6 now
    how = chosen.config
    new = step_of(tokens, cells, cells.sum(1), logits, 1, 3, how, None, chosen.mask_token)
    assert new.tolist() == [[chosen.mask_token, 2, 3]]


def test_blocks_are_finished_one_after_the_other():
    rows = SUDOKU.sample(4, split="test", seed=0)
    chosen = objective()
    cells, history = unmasked(chosen, table(rows, chosen), rows, block_length=3)
    for tokens in history:
        for row in range(4):
            left = (tokens[row] == chosen.mask_token)[cells[row]]
            touched = [bool((~part).any()) for part in left.split(3)]
            done = [bool((~part).all()) for part in left.split(3)]
            assert all(done[: max(i for i, t in enumerate(touched) if t)])


def test_a_pass_is_not_repeated_where_nothing_changed():
    rows = SUDOKU.sample(1, split="test", seed=0)
    chosen = objective(order="random")
    model = table(rows, chosen)
    cells, history = unmasked(chosen, model, rows, steps=200)
    assert (history[-1] == rows.targets).all()
    assert model.passes == len(history) <= cells.sum()


@pytest.mark.parametrize("order", ["random", "confidence", "margin", "low_confidence"])
@pytest.mark.parametrize("how", [{}, {"steps": 5}, {"steps": 40}, {"steps": 40, "block_length": 4}])
@pytest.mark.parametrize("n", [1, 25])
def test_no_more_passes_than_are_said(order, how, n):
    """Of rows of different lengths together, which are unmasked in different steps where there are more than cells."""
    chosen = objective(order=order, **how)
    rows = SUDOKU.sample(n, split="test", seed=1)
    model = table(rows, chosen)
    _, history = unmasked(chosen, model, rows)
    said = chosen.passes(model, rows)
    assert model.passes == len(history) <= said
    assert said == model.passes or order in ("random", "low_confidence")


def test_temperature_and_guidance():
    rows = SUDOKU.sample(64, split="test", seed=0)
    chosen = objective(prompt_dropout=0.1)
    flat = table(rows, chosen, torch.zeros(16))
    cells, history = unmasked(chosen, flat, rows, temperature=1.0, steps=1)
    drawn = torch.bincount(history[-1][cells], minlength=SUDOKU.vocab_size).double()
    assert (drawn / drawn.sum() - 1 / SUDOKU.vocab_size).abs().max() < 0.04  # the mask is never drawn
    assert len(drawn) == SUDOKU.vocab_size

    class Torn(Table):
        """Sure of 2 where it sees the givens, of 1 where it does not, and more so."""

        def features(self, tokens, state, context):
            given = (tokens != self.vocab_size - 1).any(1)
            hidden = torch.zeros(*tokens.shape, self.vocab_size)
            hidden[..., 1], hidden[..., 2] = 2.0, torch.where(given, 1.5, 0.0)[:, None]
            return hidden, ()

    torn = Torn(rows.targets, chosen.vocab_size, torch.ones(16))
    assert (unmasked(chosen, torn, rows, steps=1)[1][-1][cells] == 1).all()
    assert (unmasked(chosen, torn, rows, steps=1, guidance=1.0)[1][-1][cells] == 2).all()


@pytest.mark.crossed("pattern", "task")
@pytest.mark.parametrize(
    "pattern",
    [
        "gqa swiglu",
        "bidirectional(mamba2) swiglu",
        pytest.param("token_mlp(length=32) moe", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("task", [SUDOKU, MQAR], ids=["sudoku", "mqar"])
def test_it_teaches_any_pattern_that_looks_ahead(pattern, task):
    torch.manual_seed(0)
    chosen = objective(task)
    model = zoo.create_model(pattern, d_model=32, vocab_size=chosen.vocab_size, causal=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(40):
        rows = task.sample(32, split="train", seed=0, start=32 * step)
        for update in chosen.updates(model.train(), chosen.encode(rows), {}, generator):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
            losses.append(update.loss.item())
    assert sum(losses[-8:]) / 8 < 0.85 * losses[0]


def test_refusals():
    with pytest.raises(zoo.UsageError, match=r"set model.causal=false, and write recurrent words as bidirectional"):
        create_objective("masked_diffusion", SUDOKU, causal=True)
    with pytest.raises(zoo.UsageError, match="guidance needs a model trained with prompt_dropout"):
        objective(guidance=1.0)
    with pytest.raises(zoo.UsageError, match="order='marginal' is not allowed"):
        objective(order="marginal")


@pytest.mark.parametrize("name", ["masked_diffusion", "deep_supervision"])
def test_answers_that_stand_in_the_question_are_refused(name):
    with pytest.raises(zoo.UsageError, match=rf"in_context_recall says each answer .*{name} cannot .*=next_token can"):
        create_objective(name, create_task("in_context_recall"), causal=False)
