"""Parts of deep supervision: weights of steps, a curriculum of depth, and the candidate that takes all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.models.recursive import RecursiveState
from zoo.objectives import create_objective
from zoo.objectives.supervision import depth_at, step_weights, winner
from zoo.tasks import create_task
from zoo.tasks.protocol import IGNORE
from zoo.tasks.sudoku import write_csv
from zoo.training.optimizer import parameter_groups
from zoo.training.recipes import read_experiment

SUDOKU = create_task("sudoku", size=4, max_givens=6)
ROWS = 5


def parts(pattern='token_mlp(length=18, norm_axis="time") swiglu', recursion=None, **options):
    chosen = create_objective("deep_supervision", SUDOKU, causal=False, exploration=0.0, **options)
    torch.manual_seed(0)
    model = zoo.create_model(
        pattern,
        d_model=16,
        vocab_size=chosen.vocab_size,
        causal=False,
        placement="post",
        norm="rmsnorm_plain",
        embedding_scale=4.0,
        recursion={"cycles": 2, "updates": 2, "max_steps": 3, **(recursion or {})},
    )
    torch.nn.init.normal_(model.halting.weight, std=0.1)
    return chosen, model.train()


def taught(chosen, model, n_batches=4, carry=None, first=0):
    """The updates of some batches, and what was carried after each."""
    carry = {} if carry is None else carry
    generator, found = torch.Generator().manual_seed(0), []
    for i in range(first, first + n_batches):
        rows = chosen.task.sample(ROWS, split="train", seed=0, start=ROWS * i)
        (update,) = chosen.updates(model, chosen.encode(rows), carry, generator)
        found.append((update, dict(carry)))
    return found


def test_step_weights():
    """Each a factor from the last, with the mean 1; CGAR's are those over their number."""
    for decay, n in ((0.7, 16), (1.0, 5), (1.3, 4), (0.5, 1)):
        weights = step_weights(decay, n)
        torch.testing.assert_close(weights.sum(), torch.tensor(float(n)))
        torch.testing.assert_close(weights[1:], decay * weights[:-1])
        assert (weights > 0).all()


def test_the_weighted_loss_by_hand():
    chosen, model = parts(decay=0.5, loss="softmax", label_smoothing=0.1, halting_weight=0.0)
    torch.nn.init.constant_(model.halting.bias, -5.0)
    torch.nn.init.zeros_(model.halting.weight)
    for step, (update, carry) in enumerate(taught(chosen, model, 3)):
        plain = F.cross_entropy(update.logits, carry["targets"].flatten(), label_smoothing=0.1)
        torch.testing.assert_close(update.loss, plain * (12 / 7, 6 / 7, 3 / 7)[step])


def test_smoothing_is_for_training_only():
    rows = SUDOKU.sample(ROWS, split="test", seed=0)
    losses = [chosen.evaluate(model, rows)[1] for chosen, model in (parts(), parts(label_smoothing=0.3))]
    assert torch.equal(*losses)


def test_depth_of_a_batch():
    stages = ((2, 1, 1), (3, 2, 4))
    assert [depth_at(stages, i) for i in range(7)] == [(1, 1)] * 2 + [(2, 4)] * 3 + [None] * 2
    assert depth_at((), 0) is None


def test_a_curriculum_is_a_shallow_model_first():
    """Batch by batch the loss of a model of that depth, also after a checkpoint."""
    stages = ((1, 1, 1), (2, 1, 3))
    chosen, model = parts(curriculum=stages)
    found = taught(chosen, model, 5)
    plain, state = parts()[0], None
    for (cycles, updates), (update, carry) in zip([(1, 1), (1, 3), (1, 3), (2, 2), (2, 2)], found, strict=True):
        shallow = parts(recursion={"cycles": cycles, "updates": updates})[1]
        shallow.load_state_dict(model.state_dict())
        state = {k: v for k, v in (state or {}).items() if k != "batches"}
        generator = torch.Generator().manual_seed(0)
        data = chosen.encode(SUDOKU.sample(ROWS, split="train", seed=0, start=ROWS * found.index((update, carry))))
        (expected,) = plain.updates(shallow, data, state, generator)
        torch.testing.assert_close(update.loss, expected.loss)
        assert chosen.carries(carry, model, ROWS)
        assert not plain.carries(carry, model, ROWS)
        state = carry
    again = taught(chosen, model, 2, dict(found[2][1]), first=3)
    for (a, _), (b, _) in zip(again, found[3:], strict=True):
        assert torch.equal(a.loss, b.loss)


def test_one_candidate_is_today():
    """To the bit, whatever else is carried."""
    (chosen, model), (plain, same) = parts(candidates=1), parts()
    for (a, carry), (b, expected) in zip(taught(chosen, model), taught(plain, same), strict=True):
        assert torch.equal(a.loss, b.loss)
        assert carry.keys() == expected.keys()
        assert all(torch.equal(carry[name], expected[name]) for name in carry)


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("random", [False, True])
def test_the_candidate_of_least_loss_takes_all(latents, random):
    recursion = {"latents": latents}
    chosen, model = parts(recursion=recursion, candidates=3, random_start=random, loss="softmax")
    carry = {}
    taught(chosen, model, 1, carry)  # so that the y and z are no starts
    carry["halted"] = torch.zeros_like(carry["halted"])
    before = {name: tensor.clone() for name, tensor in carry.items()}
    losses, thoughts = [], []
    for k in range(3):
        thought = model.think(before["tokens"], RecursiveState(before["answer"], before["latents"][:, k]))
        each = F.cross_entropy(model.logits(thought.hidden).mT, before["targets"], reduction="none").mean(1)
        losses.append(each)
        thoughts.append(thought)
    best = torch.stack(losses).argmin(0)
    assert len(best.unique()) > 1
    ((update, after),) = taught(chosen, model, 1, carry, first=1)
    torch.testing.assert_close(update.metrics["answer_loss"], torch.stack(losses).amin(0).mean().detach())
    for row, k in enumerate(best.tolist()):
        torch.testing.assert_close(after["answer"][row], thoughts[k].state.answer[row])
        for other in range(3):
            torch.testing.assert_close(after["latents"][row, other], thoughts[other].state.latents[row])
    grads = torch.autograd.grad(update.loss, list(model.backbone.parameters()))
    halting = [F.binary_cross_entropy_with_logits(t.halt, torch.zeros(ROWS), reduction="none") for t in thoughts]
    own = torch.stack([losses[k][i] + 0.5 * halting[k][i] for i, k in enumerate(best.tolist())]).mean()
    assert not update.right.any()
    for a, b in zip(grads, torch.autograd.grad(own, list(model.backbone.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert chosen.carries(after, model, ROWS)
    assert not parts(recursion=recursion)[0].carries(after, model, ROWS)


def test_only_scored_cells_choose_the_winner():
    chosen, model = parts(candidates=2)
    rows = SUDOKU.sample(ROWS, split="train", seed=0)
    fresh = chosen._fresh(model, rows.inputs.shape)
    targets = rows.targets.clone()
    targets[:, 3:] = IGNORE
    carry = {"tokens": rows.inputs, "targets": targets, **fresh}
    chosen_first, _ = winner(model, carry, chosen._nats, {})
    carry["targets"] = torch.where(targets == IGNORE, targets, rows.targets)
    assert torch.equal(winner(model, carry, chosen._nats, {})[0].latents, chosen_first.latents)


def test_starts_with_a_number():
    """The same in every model of these sizes, and different from each other."""
    model = parts()[1]
    torch.manual_seed(1)
    other = parts()[1]
    starts = [model.init_state(2, 16, start=k) for k in range(3)]
    assert not torch.equal(starts[1].latents, starts[2].latents)
    assert torch.equal(starts[0].latents, model.init_state(2, 16).latents)
    assert torch.equal(starts[1].latents, other.init_state(2, 16, start=1).latents)
    assert torch.equal(starts[1].answer, starts[0].answer)
    assert abs(float(starts[1].latents.std()) - 1) < 0.5


@pytest.mark.parametrize("options", [{}, {"noise_at": "application", "damping": 0.1}])
def test_noise_in_training_is_drawn_for_the_whole_batch(options):
    quiet, loud = parts(damping=options.get("damping", 0.0)), parts(training_noise=0.5, **options)
    first, _ = taught(*quiet, 1)[0]
    assert not torch.equal(first.loss, taught(*loud, 1)[0][0].loss)
    assert torch.equal(taught(*loud, 1)[0][0].loss, taught(*loud, 1)[0][0].loss)
    chosen, model = loud
    data = chosen.encode(SUDOKU.sample(ROWS, split="train", seed=0))
    halves = []
    for rows in (slice(0, 2), slice(2, ROWS)):
        (part,) = chosen.updates(model, data, {}, torch.Generator().manual_seed(0), rows=rows)
        halves.append(part.loss)
    torch.testing.assert_close(sum(halves), taught(*loud, 1)[0][0].loss)
    thirds = [part.loss for part in chosen.updates(model, data, {}, torch.Generator().manual_seed(0), parts=3)]
    torch.testing.assert_close(sum(thirds), sum(halves))


def test_the_fast_recipe(tmp_path, monkeypatch):
    """It takes the public files, and Muon moves the matrices of the blocks alone."""
    monkeypatch.chdir(tmp_path)
    rows = create_task("sudoku", n_givens=40).sample(6, split="train", seed=0)
    boards = [(tokens - 1).numpy().astype("uint8") for tokens in (rows.inputs, rows.targets)]
    for name, part in (("train.csv", slice(0, 4)), ("test.csv", slice(4, 6))):
        write_csv(name, boards[0][part], boards[1][part], [0] * len(boards[0][part]))
    files = {"task.path": "train.csv", "task.test_path": "test.csv", "task.n_puzzles": None}
    experiment = read_experiment("sudoku-9x9-fast", files)
    task, made, config = experiment.build()
    assert torch.equal(task.sample(2, split="test", seed=0).inputs.sort(0)[0], rows.inputs[4:].sort(0)[0])
    assert made.length == 81
    with torch.device("meta"):
        model = zoo.create_model(config)
    groups = parameter_groups(model, muon=True)
    assert len(groups["matrices"]) == 2 * (3 + 3)
    blocks = 2 * (3 * 82 * 256 + 3 * 512 * 1536)
    assert sum(p.numel() for p in groups["matrices"]) == blocks
    ends = (11 + 1) * 512 + 11 * 512 + 11 + 2 * 512 + 2  # tokens, the register, the head and the halting head
    assert sum(p.numel() for p in model.parameters()) == blocks + ends
    train = experiment.train
    assert train.lr * train.weight_decay == pytest.approx(1e-4)
    assert train.muon_lr * train.muon_weight_decay == pytest.approx(1e-4)


def test_refusals():
    for options, message in (
        ({"candidates": 0}, "candidates=0 is not allowed"),
        ({"decay": 0.0}, "decay=0.0 is not allowed"),
        ({"curriculum": [[10, 0, 1]]}, "curriculum"),
        ({"curriculum": [[10, 1]]}, "curriculum"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 is not allowed"),
    ):
        with pytest.raises(zoo.UsageError, match=message) as refusal:
            parts(**options)
        assert "\n" not in str(refusal.value)
