"""Regression in context (Garg et al., "What can transformers learn in-context?", NeurIPS 2022, arXiv 2208.01066)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from scipy.special import ndtri
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.chart import chart
from zoo.tasks.protocol import Batch, Split, Task, check_request, register
from zoo.tasks.scores import LOWER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WEIGHTS, _POINTS, _NOISE, _DIMS, _KEPT = range(5)  # purposes of a row's random numbers
Reals = NDArray[np.float64]


@register("in_context_regression")
class InContextRegression(Task):
    """Predict the value of an unknown linear function, which examples in the row define.

    A row has examples of one function y = w x: the point x_1, its value y_1, the point x_2, and so on. With dims=2,
    n_points=3 (`.` is not scored):

        ```
        inputs    -1.62    0  -0.61    0  -2.73    0        x, or 0 where the step is a value
                   0.47    0   0.09    0   0.23    0
                      0 0.93      0 0.30      0 1.25        y, or 0 where the step is a point
                      0    1      0    1      0    1        whether the step is a value
        targets    0.93    .   0.30    .   1.25    .        the value of the point
        ```

    Points and weights are normal, the weights divided by sqrt(dims), so that values have variance 1. The model predicts
    the value at each point, having read the examples before it; it has to be causal. `sparse` keeps that number of
    weights and sets the others to 0; `min_dims` draws how many coordinates of points and weights are used; the others
    are 0. `noise` is added to the values that are read, not to those that are predicted.

    The score has `oracle_mse`, the mean squared error of least squares (of the least norm where the examples do not
    determine the weights; with `noise` ridge regression, which is Bayes' estimate), and `mse_first`, `mse_middle` and
    `mse_last`, the errors of the model at the first point, at point number dims + 1, where noiseless examples determine
    the function, and at the last one. The trivial predictor is 0. Slices: `dims`, the coordinates that are used.

    Rows of the splits are disjoint: the 64-bit number from which a row is made belongs to one split.
    """

    class Config(Options):
        """Options of `in_context_regression`."""

        dims: Annotated[int, Field(ge=1, le=1024)] = 5
        """Coordinates of a point; Garg et al. have 20."""
        min_dims: PositiveInt | None = None
        """Fewest coordinates that are used, for rows of different difficulty; by default all are."""
        n_points: Annotated[int, Field(ge=2)] | None = None
        """Points of a row, by default 2 dims + 1, as Garg et al. have it."""
        sparse: PositiveInt | None = None
        """Number of weights that are not 0, by default all; Garg et al. have 3 of 20."""
        noise: Annotated[float, Field(ge=0, le=1e3)] = 0.0
        """Standard deviation of the noise on the values of the examples."""

    layout = "series"
    lower_is_better = LOWER_IS_BETTER | {"oracle_mse", "mse_first", "mse_middle", "mse_last"}
    n_outputs = 1
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        least = c.dims if c.min_dims is None else c.min_dims
        if least > c.dims:
            raise UsageError(f"in_context_regression: min_dims={least} is more than dims={c.dims}.")
        if c.sparse is not None and c.sparse > least:
            raise UsageError(
                f"in_context_regression: sparse={c.sparse} is more than the {least} coordinates of a point."
            )
        self.n_points = c.n_points or 2 * c.dims + 1
        self._least = least
        self.n_inputs, self.seq_len = c.dims + 2, 2 * self.n_points

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        c, rows = self.config, random.row_keys(split, seed, start, n)
        keys = strings.keys_for_split(rows, split)
        used = self._least + random.below(random.fold(keys, _DIMS), c.dims - self._least + 1)
        there = np.arange(c.dims) < used[:, None]
        kept = there
        if c.sparse is not None:
            order = np.where(there, random.uniform(random.bits(random.fold(keys, _KEPT), c.dims)), 2.0)
            kept = order.argsort(1).argsort(1) < c.sparse
        weights = np.where(kept, _normal(random.fold(keys, _WEIGHTS), c.dims), 0.0)
        weights /= np.sqrt(kept.sum(1))[:, None]
        points = _normal(random.fold(keys, _POINTS), self.n_points * c.dims).reshape(n, self.n_points, c.dims)
        points = np.where(there[:, None], points, 0.0).astype(np.float32)
        values = np.einsum("npd,nd->np", points, weights)
        seen = values + c.noise * _normal(random.fold(keys, _NOISE), self.n_points)
        inputs = np.zeros((n, self.n_points, 2, self.n_inputs), dtype=np.float32)
        inputs[:, :, 0, : c.dims] = points
        inputs[:, :, 1, c.dims], inputs[:, :, 1, c.dims + 1] = seen, 1.0
        targets = np.zeros((n, self.n_points, 2, 1), dtype=np.float32)
        targets[:, :, 0, 0] = values
        mask = np.broadcast_to(np.arange(self.seq_len) % 2 == 0, (n, self.seq_len)).copy()
        return Batch(
            torch.from_numpy(inputs.reshape(n, self.seq_len, -1)),
            torch.from_numpy(targets.reshape(n, self.seq_len, 1)),
            {"dims": torch.from_numpy(used)},
            mask=torch.from_numpy(mask),
        )

    def oracle(self, batch: Batch) -> Tensor:
        """(n, L, 1) answers of least squares, at each point from the examples before it."""
        points, seen = self._examples(batch)
        d, used = self.config.dims, (points != 0).any(1).sum(1)
        prior = self.config.noise**2 * used  # of the noise to a weight's variance, 1 / used
        found = np.zeros((len(points), self.n_points, 2, 1))
        for i in range(1, self.n_points):
            x, y = points[:, :i], seen[:, :i]
            if self.config.noise:
                square = x.swapaxes(1, 2) @ x + prior[:, None, None] * np.eye(d)
                weights = np.linalg.solve(square, x.swapaxes(1, 2) @ y[..., None])
            else:
                weights = np.linalg.pinv(x) @ y[..., None]
            found[:, i, 0] = (points[:, i, None] @ weights)[:, 0]
        return torch.from_numpy(found.reshape(batch.targets.shape))

    def _examples(self, batch: Batch) -> tuple[Reals, Reals]:
        """Points (n, n_points, dims), and the values (n, n_points) that are read."""
        pairs = batch.inputs.cpu().double().numpy().reshape(-1, self.n_points, 2, self.n_inputs)
        return pairs[:, :, 0, : self.config.dims], pairs[:, :, 1, self.config.dims]

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`oracle_mse`, and the errors at the first point, at point number dims + 1 and at the last one."""

        def errors(answers: Tensor) -> Tensor:
            return (answers.double() - batch.targets.double())[:, ::2, 0].square()

        own = errors(predictions)
        middle = min(self.config.dims, self.n_points - 1)
        return {
            "oracle_mse": errors(self.oracle(batch)).mean(1),
            "mse_first": own[:, 0],
            "mse_middle": own[:, middle],
            "mse_last": own[:, -1],
        }

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        values, oracle, said = self._curves(batch, row, predictions)
        number = np.arange(1.0, self.n_points + 1)
        marks = {"o": (number, values), "x": (number, oracle)}
        told = "o the value of each point, x least squares from the examples before it"
        if said is not None:
            marks["+"] = (number, said)
            told += ", + predicted, # several"
        return "\n".join([*chart(marks), f"points 1 to {self.n_points}: {told}"])

    def _curves(self, batch: Batch, row: int, predictions: Tensor | None) -> tuple[Reals, Reals, Reals | None]:
        """Values, least squares' and predicted ones of a row's points."""
        one = Batch(batch.inputs[row : row + 1], batch.targets[row : row + 1])
        answers = [one.targets[0], self.oracle(one)[0], None if predictions is None else predictions[row]]
        values, oracle, said = (None if t is None else t[::2, 0].double().cpu().numpy() for t in answers)
        assert values is not None
        assert oracle is not None
        return values, oracle, said

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """Values, least squares and predictions by the number of the point."""
        from matplotlib.figure import Figure

        values, oracle, said = self._curves(batch, row, predictions)
        number = np.arange(1, self.n_points + 1)
        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(number, values, "o", color="0.2", label="value")
        axes.plot(number, oracle, color="tab:green", label="least squares")
        if said is not None:
            axes.plot(number, said, "x", color="tab:red", label="predicted")
        axes.axvline(self.config.dims + 0.5, color="0.8", zorder=0)
        axes.set_xlabel("point; from the line on, the examples before it determine the function")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def _normal(keys: random.Keys, count: int) -> Reals:
    """(n, count) standard normal numbers."""
    return ndtri(random.uniform(random.bits(keys, count)))
