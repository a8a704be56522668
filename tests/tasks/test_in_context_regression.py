from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import SPLITS


def regression(**options):
    return tasks.create_task("in_context_regression", **options)


def parts(task, batch):
    """Points, values that are read, and exact values."""
    inputs, targets = batch.inputs.double().numpy(), batch.targets.double().numpy()
    d = task.config.dims
    assert (inputs[:, ::2, d:] == 0).all()
    assert (inputs[:, 1::2, :d] == 0).all()
    assert (inputs[:, 1::2, d + 1] == 1).all()
    return inputs[:, ::2, :d], inputs[:, 1::2, d], targets[:, ::2, 0]


@pytest.mark.parametrize("options", [{}, {"dims": 8, "min_dims": 3, "n_points": 20, "sparse": 2}, {"noise": 0.5}])
@pytest.mark.parametrize("split", SPLITS)
def test_rows(options, split):
    task = regression(**options)
    c = task.config
    batch = task.sample(200, split=split, seed=0)
    points, seen, values = parts(task, batch)
    assert (batch.mask.numpy() == (np.arange(task.seq_len) % 2 == 0)).all()
    used = (points != 0).any(1).sum(1)
    assert used.tolist() == batch.slices["dims"].tolist()
    assert set(used) == set(range(c.min_dims or c.dims, c.dims + 1))
    weights = (np.linalg.pinv(points) @ values[..., None])[..., 0]
    np.testing.assert_allclose((points @ weights[..., None])[..., 0], values, atol=1e-5)
    assert ((abs(weights) > 1e-6).sum(1) == np.minimum(used, c.sparse or c.dims)).all()
    assert values.var() == pytest.approx(1, abs=0.25)
    assert (seen - values).std() == pytest.approx(c.noise, rel=0.1, abs=1e-6)


def test_least_squares_is_the_oracle():
    """Noiseless examples determine the function once there are as many as coordinates; before, errors fall evenly."""
    task = regression(dims=4, n_points=9)
    batch = task.sample(3000, split="test", seed=0)
    errors = (task.oracle(batch) - batch.targets.double())[:, ::2, 0].square().mean(0)
    expected = torch.tensor([1.0, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0]).double()
    torch.testing.assert_close(errors, expected, atol=0.08, rtol=0)
    score = task.score(batch, task.oracle(batch).float())
    assert score["mse"] == pytest.approx(score["oracle_mse"], rel=1e-4)
    assert score["mse"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert score["mse_middle"] == pytest.approx(0, abs=1e-6)
    assert score["mse_first"] == pytest.approx(errors[0].item())
    assert score["mse_ratio"] == pytest.approx(2.5 / 9, abs=0.03)


def test_the_oracle_reads_no_later_example():
    task = regression(noise=0.3)
    batch = task.sample(5, split="test", seed=0)
    changed = batch.inputs.clone()
    changed[:, 7:] = 9.0
    found = task.oracle(batch._replace(inputs=changed))[:, :7]
    torch.testing.assert_close(found, task.oracle(batch)[:, :7])


def test_with_noise_the_oracle_is_ridge_regression():
    """No other strength of the ridge has a smaller error."""
    task = regression(dims=3, min_dims=2, noise=0.7, n_points=6)
    batch = task.sample(6000, split="train", seed=0)
    points, seen, values = parts(task, batch)
    used = batch.slices["dims"].numpy()

    def error(strength):
        ridge = strength * 0.49 * used[:, None, None] * np.eye(3)
        x, y = points[:, :5], seen[:, :5]
        weights = np.linalg.solve(x.swapaxes(1, 2) @ x + ridge, x.swapaxes(1, 2) @ y[..., None])
        return np.square((points[:, 5, None] @ weights)[:, 0, 0] - values[:, 5])

    oracle = (task.oracle(batch) - batch.targets.double())[:, -2, 0].square().numpy()
    np.testing.assert_allclose(oracle, error(1), rtol=1e-6)
    assert all(error(strength).mean() > oracle.mean() for strength in (0.1, 0.4, 2.5, 10))


def test_the_trivial_predictor():
    task = regression()
    batch = task.sample(2000, split="validation", seed=0)
    score = task.score(batch, torch.zeros_like(batch.targets))
    assert score["mse"] == score["trivial_mse"] == pytest.approx(1, abs=0.1)
    assert score["mse_ratio"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_dims": 6}, "min_dims=6 is more than dims=5"),
        ({"sparse": 6}, "sparse=6 is more than the 5 coordinates of a point"),
        ({"n_points": 1}, "n_points"),
        ({"dim": 4}, "Did you mean 'dims'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        regression(**options)
    assert "\n" not in str(error.value)
