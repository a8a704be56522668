"""Coupled, damped oscillators, seen at irregular times and through gaps; the motion is known exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from scipy.special import ndtri
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.chart import chart
from zoo.tasks.protocol import Batch, Split, Task, check_request, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATE, _TIMES, _LENGTH, _GAPS, _ORDER, _NOISE, _FREQUENCIES = range(7)  # purposes of a row's random numbers
Reals = NDArray[np.float64]


def motion(stiffness: Reals, damping: float, position: Reals, velocity: Reals, times: Reals) -> Reals:
    """The exact solution of x'' + 2 damping x' + stiffness x = 0 at given times.

    The eigenvectors of the stiffness part the motion into modes, each a damped sine:
    q(t) = exp(-c t) (q_0 cos(w t) + (q'_0 + c q_0) / w sin(w t)), w^2 = eigenvalue - c^2.

    Args:
        stiffness: (..., k, k), symmetric, its eigenvalues above damping^2.
        damping: c.
        position: (n, k) at time 0.
        velocity: (n, k) at time 0.
        times: (n, L).

    Returns:
        (n, L, k) positions.
    """
    squares, modes = np.linalg.eigh(stiffness)
    q, speed = (np.einsum("...ij,ni->nj" if modes.ndim == 2 else "nij,ni->nj", modes, x) for x in (position, velocity))
    w = np.sqrt(squares - damping**2)
    angle = np.atleast_2d(w)[:, None] * times[..., None]
    sines = ((speed + damping * q) / w)[:, None] * np.sin(angle)
    moved = np.exp(-damping * times)[..., None] * (q[:, None] * np.cos(angle) + sines)
    return np.einsum("ij,nlj->nli" if modes.ndim == 2 else "nij,nlj->nli", modes, moved)


@register("oscillators")
class Oscillators(Task):
    """Predict where coupled oscillators are at times when they were not observed.

    Neighbours in a row of k oscillators are coupled by springs: x_i'' = -w_i^2 x_i - 2 c x_i' + s sum_j (x_j - x_i).
    All start from random places with random speeds. The steps of a row are moments at irregular times. With
    n_oscillators=1, n_steps=8 (`.` is not scored):

        ```
        inputs      0.9   0.4     0     0     0  -0.3     0   0.5     place, or 0 where it was not observed
                      1     1     0     0     0     1     0     1     whether it was observed
        timespans   0.3   0.5   0.2   0.9   0.1   0.4   0.7   0.2     since the step before
        targets       .     .   0.1  -0.6  -0.7     .   0.4     .     the exact place, without noise
        ```

    In a gap, several steps in a row are not observed. Single steps are held out too. Every step that was not observed
    is predicted: a causal model predicts it from the past, one with causal=False from both sides. The trivial predictor
    repeats the last observed places. Slices: `gap`, the longest run of steps without an observation, rounded up to the
    next of 1, 2, 3, 4, 6, 8, 12, ...

    Rows of the splits are disjoint: the 64-bit number from which a row is made belongs to one split.
    """

    class Config(Options):
        """Options of `oscillators`."""

        n_oscillators: Annotated[int, Field(ge=1, le=64)] = 2
        """k."""
        coupling: Annotated[float, Field(ge=0, le=1e6)] = 0.5
        """s, stiffness of the springs between neighbours."""
        damping: Annotated[float, Field(ge=0, le=1e3)] = 0.05
        """c: amplitudes fall as exp(-c t)."""
        frequencies: tuple[Annotated[float, Field(gt=0, le=1e3)], Annotated[float, Field(gt=0, le=1e3)]] = (1.0, 2.0)
        """w_1 and w_k, the lowest and the highest of the own angular frequencies, which are evenly spaced."""
        spread: Annotated[float, Field(ge=0, lt=1)] = 0.0
        """A row's frequencies are multiplied by factors from 1 - spread to 1 + spread; 0: all rows have one system."""
        n_steps: PositiveInt = 48
        """Steps of a row."""
        min_steps: PositiveInt | None = None
        """Fewest steps of a row, for rows of different lengths."""
        sampling: Literal["exponential", "uniform", "regular"] = "exponential"
        """Distribution of the timespans."""
        interval: Annotated[float, Field(gt=0, le=1e3)] = 0.4
        """Mean of the timespans."""
        gaps: NonNegativeInt = 1
        """Number of gaps of a row."""
        gap_steps: tuple[PositiveInt, PositiveInt] = (4, 10)
        """Fewest and most steps of a gap."""
        held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
        """Share of the other steps that are not observed."""
        forecast: NonNegativeInt = 0
        """Steps at the end of a row, none of which is observed."""
        noise: Annotated[float, Field(ge=0, le=1e3)] = 0.05
        """Standard deviation of the noise on what is observed."""
        timespans: bool = True
        """Give the timespans. Without them, only the order of the steps is known."""

    layout = "series"
    trivial_predictor = "the last observed places"
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        c, k = config, config.n_oscillators
        least = c.n_steps if c.min_steps is None else c.min_steps
        if least > c.n_steps:
            raise UsageError(f"oscillators: min_steps={least} is more than n_steps={c.n_steps}.")
        for name, (low, high) in (("gap_steps", c.gap_steps), ("frequencies", c.frequencies)):
            if low > high:
                raise UsageError(f"oscillators: {name}=[{low}, {high}] is not allowed: the first is the smaller one.")
        if (needed := 2 + c.forecast + (c.gap_steps[1] if c.gaps else 0)) > least:
            told = f"a gap, the forecast, and an observation before and after take {needed}"
            raise UsageError(f"oscillators: rows of {least} steps are too short: {told}.")
        if not c.gaps and not c.held_out and not c.forecast:
            raise UsageError("oscillators: gaps=0, held_out=0 and forecast=0 ask for nothing: set one of them.")
        if c.damping >= (slowest := c.frequencies[0] * (1 - c.spread)):
            told = f"from the lowest frequency, {slowest:g}, on nothing oscillates"
            raise UsageError(f"oscillators: damping={c.damping:g} is too large: {told}.")
        self.n_inputs, self.n_outputs, self.seq_len = k + 1, k, c.n_steps
        self.irregular_times = c.timespans
        self.own = np.linspace(*c.frequencies, k)
        apart = np.eye(k) - np.eye(k, k=1)
        self.springs = c.coupling * (apart[:-1].T @ apart[:-1])

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        c = self.config
        keys = strings.keys_for_split(random.row_keys(split, seed, start, n), split)
        lengths = np.full(n, c.n_steps)
        if c.min_steps is not None:
            lengths = c.min_steps + random.below(random.fold(keys, _LENGTH), c.n_steps - c.min_steps + 1)
        spans = self._spans(keys)
        places = motion(*self._system(keys), np.cumsum(spans, axis=1))
        there = np.arange(c.n_steps) < lengths[:, None]
        asked = self._asked(keys, lengths) & there
        noise = ndtri(random.uniform(random.bits(random.fold(keys, _NOISE), places[0].size))).reshape(places.shape)
        observed = there & ~asked
        seen = np.where(observed[..., None], places + c.noise * noise, 0.0)
        inputs = np.concatenate([seen, observed[..., None]], axis=2)
        return Batch(
            torch.from_numpy(inputs.astype(np.float32)),
            torch.from_numpy(np.where(there[..., None], places, 0.0).astype(np.float32)),
            {"gap": torch.from_numpy(strings.length_bucket(_longest(asked)))},
            torch.from_numpy(np.where(there, spans, 1.0).astype(np.float32)) if c.timespans else None,
            lengths=None if c.min_steps is None else torch.from_numpy(lengths),
            mask=torch.from_numpy(asked),
        )

    def _spans(self, keys: random.Keys) -> Reals:
        """(n, L) timespans."""
        c = self.config
        u = random.uniform(random.bits(random.fold(keys, _TIMES), c.n_steps))
        if c.sampling == "regular":
            return np.full_like(u, c.interval)
        return c.interval * (2 * u if c.sampling == "uniform" else -np.log(u))

    def _system(self, keys: random.Keys) -> tuple[Reals, float, Reals, Reals]:
        """Stiffness, damping, and the places and speeds at the start, as `motion` takes them."""
        c, k = self.config, self.config.n_oscillators
        normal = ndtri(random.uniform(random.bits(random.fold(keys, _STATE), 2 * k)))
        own = self.own
        if c.spread:
            u = random.uniform(random.bits(random.fold(keys, _FREQUENCIES), k))
            own = own * (1 + c.spread * (2 * u - 1))
        stiffness = own[..., None] ** 2 * np.eye(k) + self.springs
        return stiffness, c.damping, normal[:, :k], normal[:, k:] * own

    def _asked(self, keys: random.Keys, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n, L) bool, the steps that are not observed; the first always is."""
        c, (low, high) = self.config, self.config.gap_steps
        steps, end = np.arange(c.n_steps), (lengths - c.forecast)[:, None]
        words = random.bits(random.fold(keys, _GAPS), 2 * c.gaps) if c.gaps else np.zeros((len(keys), 0), np.uint64)
        size = low + random.below(words[:, : c.gaps], high - low + 1)
        first = 1 + random.below(words[:, c.gaps :], end - 1 - size)
        inside = (steps >= first[..., None]) & (steps < (first + size)[..., None])
        asked = inside.any(1) | (steps >= end)
        left = ~asked & (steps > 0)
        order = np.where(left, random.uniform(random.bits(random.fold(keys, _ORDER), c.n_steps)), 2.0)
        rank = order.argsort(1, kind="stable").argsort(1, kind="stable")
        most = np.ceil(c.held_out * left.sum(1) - 1e-9)
        return asked | (rank < most[:, None])

    def trivial(self, batch: Batch) -> Tensor:
        """The last observed places."""
        seen = batch.inputs[..., -1] > 0
        steps = torch.arange(seen.shape[1]).where(seen, torch.zeros((), dtype=torch.int64)).cummax(1).values
        places = batch.inputs[..., :-1]
        return places.gather(1, steps[..., None].expand(-1, -1, places.shape[2]))

    def _row(self, batch: Batch, row: int) -> tuple[Reals, Reals, NDArray[np.bool_], Reals]:
        """Times, inputs, which steps are scored, and targets of a row."""
        n = self.seq_len if batch.lengths is None else int(batch.lengths[row])
        spans = torch.ones(n) if batch.timespans is None else batch.timespans[row, :n]
        assert batch.mask is not None
        found = spans.cumsum(0), batch.inputs[row, :n], batch.mask[row, :n], batch.targets[row, :n]
        times, inputs, asked, targets = (tensor.numpy() for tensor in found)
        return times, inputs, asked, targets

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        times, inputs, asked, targets = self._row(batch, row)
        lines = []
        for i in range(self.config.n_oscillators):
            points = {"o": (times[~asked], inputs[~asked, i]), "x": (times[asked], targets[asked, i])}
            if predictions is not None:
                points["+"] = (times[asked], predictions[row, : len(times), i].numpy()[asked])
            lines += [f"oscillator {i + 1}", *chart(points), ""]
        axis = "time" if batch.timespans is not None else "step (the times are not given)"
        marks = "o observed, x to predict" + ("" if predictions is None else ", + predicted, # both")
        lines.append(f"{axis} from {times[0]:.3g} to {times[-1]:.3g}; {marks}")
        if predictions is not None:
            one = slice(row, row + 1)
            score = self.score(self._one(batch, one), predictions[one])
            lines.append(f"mse {score['mse']:.4g}; {self.trivial_predictor}: {score['trivial_mse']:.4g}")
        return "\n".join(lines)

    @staticmethod
    def _one(batch: Batch, rows: slice) -> Batch:
        return Batch(batch.inputs[rows], batch.targets[rows], mask=None if batch.mask is None else batch.mask[rows])

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """Places over time: what was observed, the gaps, the exact places in them, and predictions over these."""
        from matplotlib.figure import Figure

        times, inputs, asked, targets = self._row(batch, row)
        k = self.config.n_oscillators
        figure = Figure(figsize=(8, 0.8 + 1.5 * k), layout="constrained")
        every = figure.subplots(k, sharex=True, squeeze=False)[:, 0]
        for i, axes in enumerate(every):
            for first, last in _runs(asked):
                left = times[max(first - 1, 0)]
                axes.axvspan(left, times[min(last + 1, len(times) - 1)], color="0.92", linewidth=0)
            axes.plot(times, targets[:, i], color="0.75", linewidth=1, label="exact")
            axes.plot(times[~asked], inputs[~asked, i], "o", color="0.2", markersize=4, label="observed")
            style = {"markerfacecolor": "white", "markersize": 4.5, "linestyle": "none"}
            axes.plot(times[asked], targets[asked, i], marker="o", color="tab:blue", label="to predict", **style)
            if predictions is not None:
                said = predictions[row, : len(times), i].numpy()
                axes.plot(times[asked], said[asked], "x", color="tab:red", markersize=5, label="predicted")
            axes.set_ylabel(f"oscillator {i + 1}")
            axes.spines[["top", "right"]].set_visible(False)
        every[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=8)
        every[-1].set_xlabel("time" if batch.timespans is not None else "step (the times are not given)")
        return figure


def _longest(asked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(n,) length of the longest run of true in each row."""
    steps = np.arange(1, asked.shape[1] + 1)
    since = steps - np.maximum.accumulate(np.where(asked, 0, steps), axis=1)
    return since.max(1)


def _runs(asked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last step of every run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], asked, [False]]).astype(np.int8)))
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
