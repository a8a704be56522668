"""Oscillators: the motion is the exact one, and rows hide what they say they hide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from zoo import tasks
from zoo.tasks.oscillators import motion


def integrated(stiffness, damping, position, velocity, times):
    """(L, k) places by scipy's integrator, an independent way to the same motion."""
    k = len(position)

    def slope(_, state):
        x, v = state[:k], state[k:]
        return np.concatenate([v, -stiffness @ x - 2 * damping * v])

    found = solve_ivp(
        slope, (0, times[-1]), [*position, *velocity], method="DOP853", t_eval=times, rtol=1e-10, atol=1e-12
    )
    return found.y[:k].T


@pytest.mark.parametrize(("k", "damping", "spread"), [(1, 0.0, 0.0), (2, 0.05, 0.0), (3, 0.4, 0.3), (5, 0.1, 0.2)])
def test_motion_is_that_of_an_integrator(k, damping, spread):
    task = tasks.create_task("oscillators", n_oscillators=k, damping=damping, spread=spread, coupling=0.8, noise=0.0)
    keys = np.arange(3, dtype=np.uint64) + 5
    stiffness, c, position, velocity = task._system(keys)
    times = np.sort(np.random.default_rng(0).uniform(0.01, 30, (3, 40)), axis=1)
    found = motion(stiffness, c, position, velocity, times)
    for i in range(3):
        own = stiffness if stiffness.ndim == 2 else stiffness[i]
        expected = integrated(own, c, position[i], velocity[i], times[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-6, atol=1e-7)


def test_rows_hold_the_exact_motion_at_their_times():
    """What is not observed is 0, what is observed is the motion and its noise, targets are the motion alone."""
    task = tasks.create_task("oscillators", noise=0.3, min_steps=20)
    batch = task.sample(200, split="train", seed=3)
    there = torch.arange(task.seq_len) < batch.lengths[:, None]
    seen = batch.inputs[..., -1] == 1
    assert torch.equal(seen, there & ~batch.mask)
    assert (batch.inputs[~seen] == 0).all()
    assert (batch.targets[~there] == 0).all()
    assert seen[:, 0].all()
    off = (batch.inputs[..., :-1] - batch.targets)[seen]
    assert off.std().item() == pytest.approx(0.3, rel=0.03)
    assert abs(off.mean().item()) < 0.01
    clean = tasks.create_task("oscillators", noise=0.0, min_steps=20).sample(200, split="train", seed=3)
    assert torch.equal(clean.targets, batch.targets)
    torch.testing.assert_close(clean.inputs[..., :-1][seen], clean.targets[seen])


def test_times_determine_the_motion():
    """The same places follow from the timespans of the row, from the state that its number gives."""
    task = tasks.create_task("oscillators", n_oscillators=3)
    batch = task.sample(20, split="test", seed=1)
    from zoo.tasks import random, strings

    keys = strings.keys_for_split(random.row_keys("test", 1, 0, 20), "test")
    times = batch.timespans.double().cumsum(1).numpy()
    np.testing.assert_allclose(motion(*task._system(keys), times), batch.targets.numpy(), atol=1e-4)


@pytest.mark.parametrize("sampling", ["exponential", "uniform", "regular"])
def test_timespans_are_distributed_as_named(sampling):
    spans = (
        tasks.create_task("oscillators", sampling=sampling, interval=0.5).sample(500, split="train", seed=0).timespans
    )
    assert spans.mean().item() == pytest.approx(0.5, rel=0.02)
    expected = {"exponential": 0.5, "uniform": 0.5 / 3**0.5, "regular": 0.0}[sampling]
    assert spans.std().item() == pytest.approx(expected, rel=0.03, abs=1e-6)


def test_gaps_are_of_the_lengths_asked_for():
    task = tasks.create_task("oscillators", held_out=0.0, gap_steps=(3, 5), gaps=1)
    batch = task.sample(400, split="train", seed=0)
    sizes = batch.mask.sum(1)
    assert set(sizes.tolist()) == {3, 4, 5}
    changes = (batch.mask[:, 1:] != batch.mask[:, :-1]).sum(1)
    assert (changes <= 2).all(), "one gap is one run"
    many = tasks.create_task("oscillators", held_out=0.0, gap_steps=(3, 3), gaps=4).sample(50, split="train", seed=0)
    assert many.mask.sum(1).max() > 6
    none = tasks.create_task("oscillators", held_out=0.5, gaps=0).sample(50, split="train", seed=0)
    assert (none.mask.sum(1) == 24).all()
    ahead = tasks.create_task("oscillators", held_out=0.0, gaps=0, forecast=7).sample(5, split="train", seed=0)
    assert torch.equal(ahead.mask, (torch.arange(48) >= 41).expand(5, -1))


def test_without_timespans_the_rest_is_the_same():
    told, untold = (tasks.create_task("oscillators", timespans=given) for given in (True, False))
    a, b = (task.sample(20, split="validation", seed=0) for task in (told, untold))
    assert b.timespans is None
    assert not untold.irregular_times
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.targets, b.targets)


def test_the_trivial_predictor_repeats_what_was_last_observed():
    task = tasks.create_task("oscillators", n_steps=20, min_steps=15, gap_steps=(3, 5))
    batch = task.sample(30, split="train", seed=0)
    trivial = task.trivial(batch)
    for row in range(30):
        last = None
        for t in range(20):
            if batch.inputs[row, t, -1] == 1:
                last = batch.inputs[row, t, :-1]
            assert torch.equal(trivial[row, t], last)
    score = task.score(batch, trivial)
    assert score["mse_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_steps": 60}, "min_steps=60 is more than n_steps=48"),
        ({"gap_steps": (9, 4)}, r"gap_steps=\[9, 4\] is not allowed"),
        ({"frequencies": (3.0, 1.0)}, r"frequencies=\[3.0, 1.0\] is not allowed"),
        ({"n_steps": 11}, "rows of 11 steps are too short"),
        ({"gaps": 0, "held_out": 0.0}, "ask for nothing"),
        ({"damping": 1.0}, "damping=1 is too large: from the lowest frequency, 1, on nothing oscillates"),
        ({"sampling": "poisson"}, "sampling='poisson' is not allowed"),
        ({"noise": -1.0}, "noise=-1.0 is not allowed"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(tasks.UsageError, match=message) as refusal:
        tasks.create_task("oscillators", **options)
    assert "\n" not in str(refusal.value)
