"""Duo's curriculum: the signal of a noise level, soft inputs and their loss, and the end of the curriculum."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from torch import nn

import zoo
from zoo.cli import main
from zoo.objectives import create_objective
from zoo.objectives.gaussian import Curriculum, level_of, signal_of, softened
from zoo.objectives.uniform_diffusion import bound_of
from zoo.tasks import create_task

SUDOKU = create_task("sudoku", size=4, max_givens=6)
K = SUDOKU.vocab_size


def objective(task=SUDOKU, curriculum=None, **options):
    return create_objective("uniform_diffusion", task, causal=False, curriculum=curriculum, **options)


@pytest.mark.parametrize("n_values", [2, 10, 100])
@pytest.mark.parametrize("level", [-3.0, -1.0, 1.5])
def test_the_signal_is_that_of_the_largest_number(n_values, level):
    """The share of 20,000 drawn vectors whose largest number is the clean token's; the rest are spread evenly."""
    n, clean = 20_000, n_values // 3
    noise = torch.randn(n, n_values, generator=torch.Generator().manual_seed(n_values))
    soft = softened(torch.full((n,), clean), torch.full((n,), level), noise, 0.1)
    assert torch.allclose(soft.weights.sum(1), torch.ones(n))
    assert torch.equal(soft.weights.argmax(1), soft.found)
    [a], _ = signal_of(torch.tensor([level]), n_values)
    exact = torch.full((n_values,), float(1 - a) / n_values)
    exact[clean] += float(a)
    found = torch.bincount(soft.found, minlength=n_values) / n
    assert ((found - exact).abs() <= 4.5 * (exact * (1 - exact) / n).sqrt() + 1e-9).all()


def series(levels, n_values, terms=230):
    """The signal and its rate as sums of powers of the ratio m of signal to noise, as Duo's code has them.

    c = exp(-m^2 / 2) sum_n m^n M_n with M_n = integral of z^n p(z) P(z)^(K-1) / n!; of the derivative by m, the sum of
    m^n (I_n - m M_n), I_n having z^(n+1) in place of z^n. The authors end the sums at 150 terms.
    """
    z = torch.linspace(-18, 18, 1801, dtype=torch.float64)
    weight = (-z.square() / 2 + (n_values - 1) * torch.special.log_ndtr(z)).exp() * 0.02 / math.sqrt(2 * math.pi)
    m, n = (-levels / 2).exp()[:, None], torch.arange(terms, dtype=torch.float64)
    M, more = ((z ** (n[:, None] + k) * weight).sum(1) for k in (0, 1))
    power = (n * m.log() - torch.lgamma(n + 1) - m.square() / 2).exp()
    scale = n_values / (n_values - 1)
    c, by_m = (power * M).sum(1), (power * (more - m * M)).sum(1)
    return scale * (c - 1 / n_values), scale * by_m * -m[:, 0] / 2


@pytest.mark.parametrize("n_values", [2, 10, 30_522])
def test_the_signal_and_its_rate_are_those_of_the_series(n_values):
    levels = torch.linspace(-3.5, -1.75, 8, dtype=torch.float64)
    found, expected = signal_of(levels, n_values), series(levels, n_values)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    step = 1e-5
    slope = (signal_of(levels + step, n_values)[0] - signal_of(levels - step, n_values)[0]) / (2 * step)
    torch.testing.assert_close(found[1], slope, rtol=1e-7, atol=1e-12)


def test_default_levels_have_the_published_signals():
    published = signal_of(torch.tensor([-3.5, -1.75]), 30_522)[0].tolist()
    assert published == pytest.approx([0.9417, 0.0487], abs=1e-4)
    curriculum = Curriculum(batches=1)
    assert curriculum.levels_among(30_522) == pytest.approx((-3.5, -1.75), abs=1e-9)
    for n_values in (2, 10, 1000):
        levels = curriculum.levels_among(n_values)
        assert signal_of(torch.tensor(levels), n_values)[0].tolist() == pytest.approx(published, abs=1e-6)
    assert level_of(0.5, 10) == pytest.approx(level_of(0.5000001, 10), abs=1e-5)
    assert Curriculum(batches=1, levels=(-2.0, -1.0)).levels_among(10) == (-2.0, -1.0)


def test_the_temperature_moves_by_its_logarithm():
    curriculum = Curriculum(batches=6, constant=2, start=0.1, end=0.001)
    found = [curriculum.temperature(i) for i in range(8)]
    assert found[:6] == pytest.approx([0.1, 0.1, 0.1, 10**-1.5, 0.01, 10**-2.5])
    assert found[6:] == [None, None]
    assert Curriculum(batches=2, constant=2, start=0.1, end=0.001).temperature(1) == 0.1


class Watched(nn.Module):
    """Predicts from the sum of what is read at a cell, and keeps what it read."""

    def __init__(self, vocab_size, n_values=K):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(vocab_size, n_values, generator=generator, dtype=torch.float64))
        self.config, self.read = zoo.ModelConfig(pattern="mlp", vocab_size=vocab_size), []

    def features(self, inputs, state, context):
        self.read.append((inputs, context.tokens))
        if inputs.ndim == 2:
            inputs = nn.functional.one_hot(inputs, len(self.table))
        return inputs.double() @ self.table, ()

    def logits(self, hidden):
        return hidden


def defined(p, z, x, a):
    """Duo's integrand for a signal that falls at the rate 1, with sums written out."""
    v = [K * a * p[j] + 1 - a for j in range(K)]
    u = [K * a * (j == x) + 1 - a for j in range(K)]
    return (K / v[z] - K / u[z] - sum(u[j] / u[z] * math.log(v[j] * u[z] / (v[z] * u[j])) for j in range(K))) / (K * a)


@pytest.mark.parametrize("task", [SUDOKU, create_task("text", seq_len=12)], ids=["puzzle", "text"])
def test_inputs_and_loss_are_duos_on_the_same_draws(task):
    """Times, noise, softmax, signal and rate by the authors' formulas, from the objective's own random numbers."""
    n, temperature, (least, greatest) = 6, 0.05, (-3.0, -0.5)
    chosen = objective(task, {"batches": 1, "start": temperature, "levels": [least, greatest]}, time_bins=4)
    V = task.vocab_size
    data, model = chosen.encode(task.sample(n, split="train", seed=0)), Watched(chosen.vocab_size, V)
    [update] = chosen.updates(model, data, {}, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    t = 1e-3 + (1 - 1e-3) * (torch.rand(n, generator=generator) + torch.arange(n)).double() / n
    noise = torch.randn(len(data.positions), V, generator=generator).double()
    g = least + (greatest - least) * t
    signal, rate = series(g, V)
    rate = -rate * (greatest - least)
    [(read, looked_up)] = model.read
    first = V if not task.is_language else 0
    total = 0.0
    counts = torch.bincount(data.rows, minlength=n)
    for i, (position, x) in enumerate(zip(data.positions.tolist(), data.targets.tolist(), strict=True)):
        row, place = divmod(position, data.tokens.shape[1])
        alpha, sigma = torch.sigmoid(-g[row]).sqrt(), torch.sigmoid(g[row]).sqrt()
        w = alpha * nn.functional.one_hot(torch.tensor(x), V) + sigma * noise[i]
        own = read[row, place + 1]
        torch.testing.assert_close(own[first : first + V].double(), (w / temperature).softmax(0), rtol=2e-4, atol=1e-7)
        assert own.sum() == pytest.approx(1, abs=1e-5)
        assert looked_up[row, place + 1] == first + w.argmax()
        p = (own.double() @ model.table.detach()).softmax(0)
        a, z = signal[row], w.argmax()
        nats = bound_of(p.log()[None], z[None], torch.tensor([x]), a[None])
        if V == K:
            assert float(nats) == pytest.approx(defined(p.tolist(), int(z), x, float(a)), rel=1e-9)
        total += float(rate[row] * nats) / int(counts[row]) / n
    assert update.loss.item() == pytest.approx(total, rel=1e-5)
    outside = torch.ones_like(data.tokens, dtype=torch.bool)
    outside.view(-1)[data.positions] = False
    assert torch.equal(read[:, 1:][outside].argmax(-1), data.tokens[outside])
    bins = ((1 - signal) * 4).long().clamp(0, 3)
    assert torch.equal(looked_up[:, 0], chosen.first_bin + bins)


def test_over_all_levels_a_flat_model_has_the_log_of_the_tokens():
    """The rate of the signal makes the mean over evenly drawn levels the integral of the bound."""
    levels = [level_of(a, K) for a in (1 - 2e-6, 2e-6)]
    chosen = objective(curriculum={"batches": 10**6, "levels": levels})
    model = Watched(chosen.vocab_size)
    nn.init.zeros_(model.table)
    data, generator, carry = chosen.encode(SUDOKU.sample(64, split="train", seed=0)), torch.Generator(), {}
    losses = torch.stack([next(chosen.updates(model, data, {}, generator)).loss.detach() for _ in range(60)])
    assert abs(losses.mean() - math.log(K)) < 4 * losses.std() / 60**0.5 + 1e-3
    assert not carry


def test_after_the_curriculum_a_batch_has_the_bits_of_one_without():
    chosen, plain = objective(curriculum={"batches": 2}), objective()
    torch.manual_seed(0)
    model = zoo.create_model("gqa", d_model=16, vocab_size=chosen.vocab_size, causal=False)
    rows, carry = SUDOKU.sample(5, split="train", seed=0), {}
    data = chosen.encode(rows)
    for batch in range(4):
        updates = [
            list(each.updates(model, data, carry if each is chosen else {}, torch.Generator().manual_seed(batch)))
            for each in (chosen, plain)
        ]
        losses = [update.loss for [update] in updates]
        assert torch.equal(*losses) == (batch >= 2)
        assert chosen.carries(carry, model, 5)
    assert carry["batches"].tolist() == [2] * 5
    assert not chosen.carries(carry, model, 4)
    assert not chosen.carries({"batches": carry["batches"].float()}, model, 5)
    assert not plain.carries(carry, model, 5)
    same = torch.equal(*(each.evaluate(model, rows)[1] for each in (chosen, plain)))
    assert same


@pytest.mark.parametrize("options", [{}, {"self_conditioning": True}])
def test_parts_of_a_batch_add_up_to_the_whole(options):
    chosen = objective(curriculum={"batches": 5, "start": 0.1}, **options)
    torch.manual_seed(0)
    model = zoo.create_model("gqa engram(n_slots=64)", d_model=16, vocab_size=chosen.vocab_size, causal=False).double()
    data = chosen.encode(SUDOKU.sample(6, split="train", seed=0))

    def losses(**how):
        carry: dict = {}
        found = [u.loss.item() for u in chosen.updates(model, data, carry, torch.Generator().manual_seed(1), **how)]
        return sum(found), len(carry["batches"])

    whole, _ = losses()
    assert losses(parts=3) == (pytest.approx(whole, rel=1e-9), 6)
    first, second = losses(rows=slice(0, 2)), losses(rows=slice(2, 6))
    assert first[0] + second[0] == pytest.approx(whole, rel=1e-9)
    assert (first[1], second[1]) == (2, 4)


def test_training_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = {"steps": 4, "batch_size": 4, "eval_every": 4, "eval_rows": 4, "test_rows": 4}
    model = {"pattern": "mha", "d_model": 16, "causal": False}
    made = {"task": {"name": "sudoku", "size": 4}, "model": model, "objective": "uniform_diffusion", "train": train}
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "train",
                "made.yaml",
                "objective.curriculum.batches=2",
                "objective.curriculum.start=0.01",
                "out=run",
                "--quiet",
            ]
        )
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["objective"]["curriculum"]
    assert saved == {"batches": 2, "constant": 0, "start": 0.01, "end": 0.001, "levels": None}


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ({}, r"objective.curriculum needs 'batches', which was not given"),
        ({"batches": 0}, "batches=0 is not allowed"),
        ({"batches": 5, "tau": 1.0}, "Unknown option of objective.curriculum 'tau'"),
        ({"batches": 5, "constant": 6}, "constant=6 is more than batches=5"),
        ({"batches": 5, "start": 0.0}, "start=0.0 is not allowed"),
        ({"batches": 5, "levels": [-1.0, -2.0]}, "the least noise level comes first"),
        ({"batches": 5, "levels": [-1.0]}, "levels"),
        ({"batches": 5, "levels": [-12.0, -1.0]}, "at -12.0 the signal among 6 tokens is 1"),
        ({"batches": 5, "levels": [-3.0, 40.0]}, "at 40.0 the signal among 6 tokens is 0"),
        (7, "curriculum=7 is not allowed"),
    ],
)
def test_refusals(curriculum, message):
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        objective(curriculum=curriculum)
    assert "\n" not in str(refusal.value)
