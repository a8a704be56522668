"""Several paths of thinking: which answer a vote takes, early ends, noise, and symmetric forms of a puzzle."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.objectives import create_objective
from zoo.objectives.draws import RowDraws
from zoo.objectives.paths import Path, agreeing, chosen, taken
from zoo.tasks import create_task
from zoo.tasks.protocol import take

SUDOKU = create_task("sudoku", size=4, max_givens=6)
MAZE = create_task("maze", size=7)
COPY = create_task("copy", seq_len=12, symbols=6)


def parts(task=SUDOKU, **options):
    made = create_objective("deep_supervision", task, causal=False, **options)
    torch.manual_seed(0)
    model = zoo.create_model(
        'token_mlp(length=49, norm_axis="time") swiglu',
        d_model=16,
        vocab_size=made.vocab_size,
        causal=False,
        placement="post",
        norm="rmsnorm_plain",
        embedding_scale=4.0,
        recursion={"cycles": 1, "updates": 2, "max_steps": 4},
    )
    torch.nn.init.normal_(model.halting.weight)
    torch.nn.init.zeros_(model.halting.bias)
    torch.nn.init.normal_(model.embedding.weight)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made, model


def path(answer, sure, steps, moved=0.0):
    n = len(answer)
    return Path(
        torch.arange(n * 2.0).view(n, 1, 2), torch.tensor(answer), torch.tensor(sure), torch.tensor(steps), moved
    )


def test_votes_by_hand():
    """Three paths of three rows, ties to the surest and then to the first."""
    found = [
        path([[1], [1], [1]], [0.0, 3.0, 2.0], [2, 9, 3], torch.tensor([3.0, 1.0, 1.0])),
        path([[2], [2], [1]], [1.0, 2.0, 2.0], [2, 9, 2], torch.tensor([2.0, 1.0, 0.0])),
        path([[1], [2], [3]], [-1.0, 1.0, 5.0], [3, 4, 2], torch.tensor([1.0, 0.5, 0.5])),
    ]
    assert agreeing(found).tolist() == [[2, 1, 2], [1, 2, 2], [2, 2, 1]]
    assert chosen(found, "halt").tolist() == [1, 0, 2]
    assert chosen(found, "first").tolist() == [1, 2, 2]
    assert chosen(found, "settled").tolist() == [2, 2, 1]
    assert chosen(found, "majority").tolist() == [0, 1, 0]
    assert taken(found, "first", "answer").tolist() == [[2], [2], [3]]


def walked(made, model, rows):
    """All thoughts of all paths, by path and step."""
    data = made.encode(rows)
    return [[thought for _, thought in made.walk(model, data, attempt)] for attempt in made.attempts()]


def count_rows(model, monkeypatch):
    """The rows of every supervision step from now on."""
    counted, think = [], type(model).think

    def counting(self, tokens, *args, **options):
        counted.append(len(tokens))
        return think(self, tokens, *args, **options)

    monkeypatch.setattr(type(model), "think", counting)
    return counted


@torch.no_grad()
def test_the_first_that_says_right(monkeypatch):
    """Of several paths the one that halts first, and of one path the answer at which it halts; in fewer steps."""
    rows = SUDOKU.sample(24, split="test", seed=0)
    for starts in (1, 3):
        made, model = parts(starts=starts, vote="first")
        halts = torch.stack([thought.halt for path in walked(made, model.eval(), rows) for thought in path])
        model.halting.bias[0] -= halts.quantile(0.8)  # the head says "right" in a fifth of the steps
        whole = walked(made, model, rows)
        expected, kinds = [], set()
        for row in range(24):
            halts = [(step, -float(t.halt[row]), k) for k, p in enumerate(whole) for step, t in enumerate(p)
                     if t.halt[row] > 0]  # fmt: skip
            never = [(3, -float(p[-1].halt[row]), k) for k, p in enumerate(whole)]
            step, _, k = min(halts or never)
            kinds.add((step, bool(halts)))
            expected.append(model.logits(whole[k][step].hidden)[row, :, : SUDOKU.vocab_size].argmax(-1))
        assert len(kinds) > 2, "rows should end in different ways"
        counted = count_rows(model, monkeypatch)
        found = made.predict(model, rows)
        assert torch.equal(found, torch.stack(expected))
        assert torch.equal(made.evaluate(model, rows)[0], found)
        assert sum(counted) < 2 * 24 * 4 * starts
        frames = list(made.solve(model, rows))
        assert len(frames) == 4
        assert torch.equal(frames[-1].tokens, found)


@torch.no_grad()
def test_noise_tells_paths_apart():
    """From the model's own start; each row and step has its own, whatever the batch; none is none."""
    rows = SUDOKU.sample(6, split="test", seed=0)
    made, model = parts(starts=2, noise=0.3)
    first, second = walked(made, model.eval(), rows)
    assert not torch.equal(first[0].hidden, second[0].hidden)
    data = made.encode(rows)
    alone = data._replace(tokens=data.tokens[2:3])
    one = [thought for _, thought in made.walk(model, alone, next(made.attempts()))]
    for whole, single in zip(first, one, strict=True):
        torch.testing.assert_close(whole.hidden[2], single.hidden[0])
    quiet, _ = parts(noise=0.0)
    (plain,) = walked(quiet, model, rows)
    faint, _ = parts(noise=1e-9)
    (close,) = walked(faint, model, rows)
    torch.testing.assert_close(close[-1].hidden, plain[-1].hidden)
    from_random, _ = parts(starts=2, noise=1e-9, random_start=True)
    assert (walked(from_random, model, rows)[0][0].hidden - plain[0].hidden).abs().max() > 1e-3


@torch.no_grad()
def test_damping_and_noise_at_every_application_are_eqrs():
    """Two steps written out: z <- d z + (1 - d) f(z + y + x) + noise, and so for y, with the row's own noise."""
    rows = SUDOKU.sample(5, split="test", seed=0)
    made, model = parts(starts=2, damping=0.3, noise=0.2, noise_at="application", eval_steps=2)
    data = made.encode(rows)
    x = model.double()._inputs(data.tokens, None)
    for number, path in enumerate(walked(made, model.eval(), rows)):
        y, z = (leaf.to(x.dtype) for leaf in model.init_state(*data.tokens.shape))
        z = z[:, 0]
        for step, thought in enumerate(path, 1):
            draws = RowDraws.of(data).at(None, number).at(None, step)
            for call, old in enumerate("zzy"):
                h = z + y + x if old == "z" else y + z
                f = model.norm(model.backbone(h, None, zoo.Context())[0])
                new = 0.3 * (z if old == "z" else y) + 0.7 * f + 0.2 * draws.normal(call, *y.shape[1:]).to(y)
                y, z = (y, new) if old == "z" else (new, z)
            torch.testing.assert_close(thought.state.answer, y)
            torch.testing.assert_close(thought.state.latents[:, 0], z)


@torch.no_grad()
def test_a_row_has_its_own_noise_at_every_application():
    rows = SUDOKU.sample(8, split="test", seed=0)
    made, model = parts(starts=2, damping=0.05, noise=0.3, noise_at="application", vote="first")
    together = made.predict(model, rows)
    for i in range(8):
        assert torch.equal(made.predict(model, take(rows, slice(i, i + 1))), together[i : i + 1])


@torch.no_grad()
def test_noise_falls_to_none():
    """Of three steps, the deviation of the last is 0, and that of the second half."""
    rows = SUDOKU.sample(4, split="test", seed=0)
    for noise_at in ("step", "application"):
        made, model = parts(noise=0.4, noise_schedule="linear", noise_at=noise_at, eval_steps=3)
        (thoughts,) = walked(made, model.eval(), rows)
        tokens = made.encode(rows).tokens
        without = model.think(tokens, thoughts[1].state)
        assert torch.equal(without.hidden, thoughts[2].hidden)
        assert not torch.equal(model.think(tokens, thoughts[0].state).hidden, thoughts[1].hidden)
        half, _ = parts(noise=0.2, noise_at=noise_at, eval_steps=3)
        full, _ = parts(noise=0.4, noise_at=noise_at, eval_steps=3)
        assert torch.equal(walked(full, model, rows)[0][0].hidden, thoughts[0].hidden)
        assert not torch.equal(walked(half, model, rows)[0][0].hidden, thoughts[0].hidden)


@torch.no_grad()
def test_candidates_start_where_they_were_trained():
    rows = SUDOKU.sample(3, split="test", seed=0)
    made, model = parts(starts=3, candidates=2)
    for k, thoughts in enumerate(walked(made, model.eval(), rows)):
        torch.testing.assert_close(
            thoughts[0].hidden, model.think(rows.inputs, model.init_state(3, 16, start=k)).hidden
        )


@torch.no_grad()
@pytest.mark.parametrize("task", [SUDOKU, MAZE], ids=["sudoku", "maze"])
def test_symmetric_forms_are_mapped_back(task):
    """Every form's answer in the puzzle's coordinates: that of solving the turned puzzle, turned back."""
    rows = task.sample(4, split="test", seed=0)
    made, model = parts(task, votes=4)
    whole = made.paths(model, rows)
    plain, _ = parts(task)
    assert torch.equal(whole[0].answer, plain.predict(model, rows))
    for form in range(1, 4):
        symmetry = task.symmetry(form)
        turned = rows._replace(inputs=symmetry.turn(rows.inputs), targets=symmetry.turn(rows.targets))
        assert torch.equal(symmetry.turn(whole[form].answer), plain.predict(model, turned))
    assert len({tuple(each.answer.flatten().tolist()) for each in whole}) > 1


def test_a_majority_of_a_model_that_knows_no_symmetry():
    made, model = parts(starts=2, votes=3, vote="majority")
    rows = SUDOKU.sample(5, split="test", seed=0)
    found = made.paths(model, rows)
    assert len(found) == 6
    best = chosen(found, "majority")
    assert torch.equal(
        made.predict(model, rows), torch.stack([found[k].answer[i] for i, k in enumerate(best.tolist())])
    )
    assert made.passes(model, rows) == 4 * 6


def test_all_paths_of_one_row_can_be_watched():
    """The taken one first; each as long as it was walked; its last answer is the one that is scored."""
    made, model = parts(starts=3, vote="first")
    rows = SUDOKU.sample(12, split="test", seed=0)
    found = made.paths(model.eval(), rows, every_step=True)
    model.halting.bias.data[0] -= torch.cat([path.halts for path in found]).quantile(0.8)
    lengths = set()
    for row in range(12):
        one = take(rows, slice(row, row + 1))
        named = made.solutions(model, one)
        assert sorted(name.split(",")[0] for name, _ in named) == ["path 1", "path 2", "path 3"]
        assert [name.endswith(", taken") for name, _ in named] == [True, False, False]
        assert torch.equal(named[0][1][-1].tokens, made.predict(model, one))
        assert len(list(made.solve(model, one))) == max(len(frames) for _, frames in named)
        lengths |= {len(frames) for _, frames in named}
    assert len(lengths) > 1
    ((name, frames),) = parts()[0].solutions(model, one)
    assert (name, len(frames)) == ("", 4)


def test_refusals():
    for task, options, message in (
        (SUDOKU, {"votes": 10**6}, "votes=1000000 is too large: sudoku has 3072 symmetries"),
        (MAZE, {"votes": 9}, "votes=9 is too large: maze has 8 symmetries, the one that changes nothing among them"),
        (COPY, {"votes": 2}, "votes=2 needs symmetries, and copy has none"),
        (SUDOKU, {"vote": "majority"}, "chooses among several starts: set objective.starts"),
        (SUDOKU, {"vote": "frist"}, "vote='frist' is not allowed"),
        (SUDOKU, {"noise": -1.0}, "noise=-1.0 is not allowed"),
        (SUDOKU, {"damping": 1.0}, "damping=1.0 is not allowed"),
        (SUDOKU, {"noise_at": "steps"}, "noise_at='steps' is not allowed"),
        (SUDOKU, {"noise_at": "application", "training_noise": 0.1, "candidates": 2}, 'set noise_at="step"'),
    ):
        with pytest.raises(zoo.UsageError, match=message) as refusal:
            parts(task, **options)
        assert "\n" not in str(refusal.value)
