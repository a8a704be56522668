"""Deep supervision: what is taught when, which puzzles stay, and what comes out after more thinking."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.models.recursive import RecursiveState
from zoo.objectives import create_objective
from zoo.objectives.draws import RowDraws
from zoo.protocol import Context
from zoo.tasks import create_task
from zoo.tasks.protocol import IGNORE
from zoo.training.evaluation import evaluate

SUDOKU = create_task("sudoku", size=4, max_givens=6)
MQAR = create_task("mqar", seq_len=16, n_pairs=2, vocab_size=20)
COPY = create_task("copy", seq_len=12, symbols=6)
PATTERN = "2*(gqa(rope=False) swiglu)"


def objective(task=SUDOKU, **options):
    return create_objective("deep_supervision", task, causal=False, **options)


def model_for(chosen, pattern=PATTERN, **recursion):
    torch.manual_seed(0)
    recursion = {"cycles": 2, "updates": 2, "max_steps": 3, **recursion}
    return zoo.create_model(
        pattern,
        d_model=32,
        vocab_size=chosen.vocab_size,
        causal=False,
        placement="post",
        norm="rmsnorm_plain",
        embedding_scale=32**0.5,
        recursion=recursion,
    )


def teach(chosen, model, n_batches, rows=6, generator=None, carry=None):
    """Updates and what was carried after each, without any learning."""
    carry = {} if carry is None else carry
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    history = []
    for i in range(n_batches):
        batch = chosen.task.sample(rows, split="train", seed=0, start=rows * i)
        (update,) = chosen.updates(model, chosen.encode(batch), carry, generator)
        history.append((update, dict(carry), batch))
    return history


def never_halts(model):
    torch.nn.init.constant_(model.halting.bias, -5.0)
    return model


def last_thought(chosen, model, tokens, state=None, puzzles=None):
    """That of the last step of evaluation, by `think` alone."""
    for _ in range(chosen.config.eval_steps or model.recursion.max_steps):
        thought = model.think(tokens, state, puzzles=puzzles)
        state = thought.state
    return thought


def test_the_loss_by_hand():
    chosen = objective(loss="softmax")
    model = model_for(chosen)
    update, _, batch = teach(chosen, model, 1)[0]
    logits, _ = model(batch.inputs)
    right = (logits.argmax(-1) == batch.targets).all(1)
    halting = F.binary_cross_entropy_with_logits(torch.full((6,), -5.0), right.float())
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()) + 0.5 * halting
    torch.testing.assert_close(update.loss, expected)


def test_stablemax_is_the_papers():
    chosen = objective(loss="stablemax")
    x = torch.tensor([[-3.0, -0.5, 0.0, 0.5, 4.0], [100.0, -100.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    s = torch.where(x < 0, 1 / (1 - x), x + 1)
    expected = -(s / s.sum(-1, keepdim=True)).log()
    for target in range(5):
        nats = chosen._nats(x, torch.full((2,), target))
        torch.testing.assert_close(nats.double(), expected[:, target], rtol=1e-6, atol=1e-6)


def test_a_puzzle_stays_until_its_steps_are_used_up():
    chosen = objective(exploration=0.0)
    model = never_halts(model_for(chosen))
    history = teach(chosen, model, 7)
    for i, (_, carry, _) in enumerate(history):
        kept = history[i // 3 * 3][2]  # every third batch is taken, the others are left out
        assert torch.equal(carry["tokens"], kept.inputs)
        assert (carry["steps"] == i % 3 + 1).all()
        assert carry["halted"].all() == (i % 3 == 2)
    state = None
    for update, _, _ in history[:3]:  # and each step goes on from the last
        thought = model.think(history[0][2].inputs, state)
        state = thought.state
        torch.testing.assert_close(update.logits, model.logits(thought.hidden).flatten(0, 1))


def test_what_it_finds_right_makes_room():
    chosen = objective(exploration=0.0)
    model = model_for(chosen)
    torch.nn.init.constant_(model.halting.bias, 5.0)
    for _, carry, batch in teach(chosen, model, 3):
        assert torch.equal(carry["tokens"], batch.inputs)
        assert (carry["steps"] == 1).all()
        assert carry["halted"].all()


def test_exploration_thinks_on():
    chosen = objective(exploration=1.0)
    model = model_for(chosen, max_steps=4)
    torch.nn.init.constant_(model.halting.bias, 5.0)
    history = teach(chosen, model, 1, rows=64)
    assert not history[0][1]["halted"].any()  # at least two steps each
    _, carry, _ = teach(chosen, model, 4, rows=64)[3]
    assert 1 < carry["steps"].float().mean() < 4


def test_a_place_keeps_the_number_of_its_puzzle():
    task = create_task("arc", size=6, n_made=4, n_augmentations=2)
    for halting in ("halt", "q"):
        chosen = objective(task, exploration=0.0, halting=halting)
        model = never_halts(model_for(chosen, prefix=2, n_puzzles=task.n_puzzles, max_steps=2))
        torch.nn.init.constant_(model.halting.bias[1], 5.0)
        torch.nn.init.normal_(model.puzzles.weight)
        state = None
        for i, (update, carry, _) in enumerate(teach(chosen, model, 4)):
            batch = task.sample(6, split="train", seed=0, start=6 * (i // 2 * 2))  # every second batch is taken
            assert torch.equal(carry["puzzles"], batch.puzzles)
            thought = model.think(batch.inputs, state if i % 2 else None, puzzles=batch.puzzles)
            state = thought.state
            scored = batch.targets != IGNORE
            torch.testing.assert_close(update.logits, model.logits(thought.hidden)[scored])
    rows = task.sample(6, split="test", seed=0)
    last = last_thought(chosen, model, rows.inputs, puzzles=rows.puzzles)
    asked = rows.targets != IGNORE
    assert torch.equal(chosen.predict(model, rows)[asked], model.logits(last.hidden).argmax(-1)[asked])
    assert not torch.equal(last.hidden, last_thought(chosen, model, rows.inputs).hidden)


def test_q_learning_bootstraps_from_the_next_step():
    chosen = objective(halting="q", exploration=0.0, loss="softmax")
    model = model_for(chosen, outer=PATTERN, gradient="step")
    torch.nn.init.normal_(model.halting.weight)
    update, _, batch = teach(chosen, model, 1)[0]
    now = model.think(batch.inputs)
    later = model.think(batch.inputs, now.state)
    right = (model.logits(now.hidden).argmax(-1) == batch.targets).all(1).float()
    halting = F.binary_cross_entropy_with_logits(now.halt, right)
    value = torch.maximum(later.halt, later.go_on).sigmoid()
    halting = halting + F.binary_cross_entropy_with_logits(now.go_on, value.detach())
    answers = F.cross_entropy(model.logits(now.hidden).flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(update.loss, answers + 0.5 * halting)


def start_of(chosen, model, rows, attempt=0):
    """The state from which evaluation starts an attempt: every row's from its own stream."""
    draws = RowDraws.of(chosen.encode(rows)).at(None, attempt)
    shapes = [leaf.shape[1:] for leaf in model.init_state(1, rows.inputs.shape[1])]
    return RecursiveState(*(draws.normal(i, *shape).float() for i, shape in enumerate(shapes)))


def test_more_steps_and_more_starts():
    chosen = objective(eval_steps=5)
    model = model_for(chosen)
    torch.nn.init.normal_(model.halting.weight)
    rows = SUDOKU.sample(6, split="test", seed=0)
    last = last_thought(chosen, model, rows.inputs)
    state = None
    for _ in range(5):
        logits, state = model(rows.inputs, state)
    torch.testing.assert_close(model.logits(last.hidden), logits)
    assert torch.equal(chosen.predict(model, rows), logits[..., : SUDOKU.vocab_size].argmax(-1))

    several, thoughts = objective(eval_steps=2, starts=4), []
    for attempt in range(4):
        thoughts.append(last_thought(several, model, rows.inputs, start_of(several, model, rows, attempt)))
    favourite = torch.stack([t.halt for t in thoughts]).argmax(0)
    assert len(favourite.unique()) > 1
    expected = torch.stack([model.logits(t.hidden) for t in thoughts])[favourite, torch.arange(6)]
    assert torch.equal(several.predict(model, rows), expected[..., : SUDOKU.vocab_size].argmax(-1))


def test_thinking_from_random_starts():
    chosen = objective(random_start=True, exploration=0.0)
    model = never_halts(model_for(chosen))
    torch.nn.init.normal_(model.halting.weight, std=1e-4)
    generator = torch.Generator().manual_seed(3)
    history = teach(chosen, model, 4, generator=generator)
    again = torch.Generator().manual_seed(3)
    start = model.init_state(6, 16, generator=again)
    thought = model.think(history[0][2].inputs, start)
    torch.testing.assert_close(history[0][0].logits, model.logits(thought.hidden).flatten(0, 1))
    torch.testing.assert_close(
        history[1][0].logits, model.logits(model.think(history[0][2].inputs, thought.state).hidden).flatten(0, 1)
    )
    rows = SUDOKU.sample(6, split="test", seed=0)
    state = start_of(chosen, model, rows)
    for _ in range(3):
        logits, state = model(rows.inputs, state)
    assert torch.equal(chosen.predict(model, rows), logits[..., : SUDOKU.vocab_size].argmax(-1))


@pytest.mark.parametrize("steps", [2, 6])
def test_the_answer_that_settled(steps):
    several = objective(eval_steps=steps, starts=3, vote="settled")
    model = model_for(several)
    rows, answers, moved = SUDOKU.sample(6, split="test", seed=0), [], []
    for attempt in range(3):
        state, told = start_of(several, model, rows, attempt), []
        for _ in range(steps):
            logits, state = model(rows.inputs, state)
            told.append(logits)
        distances = [(a - b).square().sum(-1).sqrt().mean(1) for a, b in itertools.pairwise(told[-4:])]
        moved.append(torch.stack(distances).mean(0))
        answers.append(logits.argmax(-1))
    favourite = torch.stack(moved).argmin(0)
    assert len(favourite.unique()) > 1
    expected = torch.stack(answers)[favourite, torch.arange(6)]
    assert torch.equal(several.predict(model, rows), expected)
    assert torch.equal(several.evaluate(model, rows)[0], expected)


def test_auxiliary_losses_are_taught_too():
    chosen = objective(exploration=0.0)
    heavy, light = (model_for(chosen, f"gqa moe(n_experts=4, balance_loss={weight})").train() for weight in (3.0, 0.0))
    light.load_state_dict(heavy.state_dict())
    with_it, without = (teach(chosen, model, 1)[0][0] for model in (heavy, light))
    context = Context()
    heavy.think(SUDOKU.sample(6, split="train", seed=0).inputs, context=context)
    torch.testing.assert_close(with_it.loss - without.loss, sum(context.losses))
    assert with_it.metrics["moe_0_max_load"] > 0


def test_questions_without_cells_are_answered_behind_them():
    chosen = objective(MQAR)
    rows = MQAR.sample(4, split="train", seed=0)
    data = chosen.encode(rows)
    assert (data.tokens[:, :16] == rows.inputs).all()
    scored = rows.targets != IGNORE
    assert (data.tokens[:, 16:][scored] == chosen.blank).all()
    assert (data.targets == rows.targets[scored]).all()
    assert chosen.predict(model_for(chosen), rows).shape == rows.inputs.shape


@pytest.mark.crossed("pattern", "task")
@pytest.mark.parametrize(
    "pattern",
    [
        PATTERN,
        pytest.param("bidirectional(mamba2) moe", marks=pytest.mark.slow),
        pytest.param('token_mlp(length=64, norm_axis="time") swiglu', marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("task", [SUDOKU, MQAR], ids=["sudoku", "mqar"])
def test_it_teaches_any_pattern_that_looks_ahead(pattern, task):
    chosen = objective(task, loss="softmax")
    model = model_for(chosen, pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, carry, losses = torch.Generator().manual_seed(0), {}, []
    for step in range(60):
        rows = task.sample(16, split="train", seed=0, start=16 * step)
        for update in chosen.updates(model.train(), chosen.encode(rows), carry, generator):
            optimizer.zero_grad()
            update.loss.backward()
            optimizer.step()
            losses.append(update.loss.item())
    assert sum(losses[-8:]) / 8 < 0.85 * losses[0]
    assert math.isfinite(losses[-1])


def test_an_answer_that_is_a_text_is_written_where_the_row_says_it():
    rows = COPY.sample(5, split="train", seed=0)
    asked = rows.targets != IGNORE
    chosen = objective(COPY)
    data = chosen.encode(rows)
    assert chosen.length == data.tokens.shape[1] == COPY.seq_len + 1
    assert (data.tokens[:, 1:][asked] == chosen.blank).all()
    assert (data.tokens[:, 1:-1][~asked[:, :-1]] == rows.inputs[:, 1:][~asked[:, :-1]]).all()
    assert (data.tokens[:, 0] == rows.inputs[:, 0]).all()
    assert (data.targets == rows.targets[asked]).all()
    said = chosen.predict(model_for(chosen), rows)
    assert said.shape == rows.inputs.shape
    assert (said[~asked] == rows.inputs[~asked]).all()


def test_refusals():
    with pytest.raises(zoo.UsageError, match="steps are at irregular times, which a recursive model does not read"):
        objective(create_task("event_xor"))
    with pytest.raises(zoo.UsageError, match=r"vote='settled' chooses among several starts: set objective.starts"):
        objective(vote="settled")
    with pytest.raises(zoo.UsageError, match="compares steps: it needs eval_steps above 1"):
        objective(vote="settled", starts=2, eval_steps=1)
    with pytest.raises(zoo.UsageError, match=r"answers all cells at once: set model.causal=false"):
        create_objective("deep_supervision", SUDOKU, causal=True)
    with pytest.raises(zoo.UsageError, match="loss='hinge' is not allowed"):
        objective(loss="hinge")


@pytest.mark.parametrize("task", [SUDOKU, MQAR, COPY], ids=lambda task: task.name)
def test_places_hold_rows_of_the_task(task):
    """The task judges answers in its own coordinates, whatever the form in which the model reads its rows."""
    chosen = objective(task)
    batch = task.sample(6, split="train", seed=0)
    data = chosen.encode(batch)
    targets = torch.full_like(data.tokens, IGNORE)
    targets.view(-1)[data.positions] = data.targets
    found = chosen._batch(data.tokens, targets)
    assert torch.equal(found.targets, batch.targets)
    assert torch.equal(found.inputs, batch.inputs)


def test_the_task_decides_what_is_right():
    """The halting head learns whether the answer is right by the task, not whether it is the target."""

    class Anything(type(SUDOKU)):
        many_answers = "a solution"

        def is_right(self, batch, answers):
            assert ((answers == batch.inputs) | (batch.inputs == self.blank) | batch.scored).all()
            return torch.arange(len(answers)) % 3 > 0

    chosen = objective(Anything(SUDOKU.config), loss="softmax")
    model = model_for(chosen)
    update, _, batch = teach(chosen, model, 1)[0]
    logits, _ = model(batch.inputs)
    assert not (logits.argmax(-1) == batch.targets).all(1).any()
    right = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    halting = F.binary_cross_entropy_with_logits(torch.full((6,), -5.0), right)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()) + 0.5 * halting
    torch.testing.assert_close(update.loss, expected)
    assert update.figures()["exact"] == pytest.approx(4 / 6)
    assert update.figures()["halting_accuracy"] == pytest.approx(2 / 6)
    found = evaluate(model, chosen, batch, batch_size=6)
    assert found["exact"] == pytest.approx(4 / 6)
    assert found["exact_low"] < 4 / 6 < found["exact_high"]
