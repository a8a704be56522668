"""Parity of bits that arrive as events at irregular times (Lechner and Hasani 2020, arXiv 2006.04418, section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random, strings
from zoo.tasks.protocol import IGNORE, Batch, Split, Task, check_request, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register("event_xor")
class EventXOR(Task):
    """Decide whether the number of ones is odd, in a sequence of bits that is given only at its changes.

    The bits 1 1 0 1 1 1, with max_length=8 (`.` is `IGNORE`):

        ```
        inputs      2  1  2  0  0  0  0  0        a run of ones, of zeros, of ones
        timespans   2  1  3  1  1  1  1  1        and how long each was
        targets     .  .  2  .  .  .  .  .        five ones: odd
        ```

    An event is at the end of a run of equal bits. Its token is the bit (1 for 0, 2 for 1), and its timespan is the time
    since the previous event, so only the timespans determine the answer. The target is 1 for even, 2 for odd. 0 is
    padding, with timespan 1. Lengths are uniform. A string of bits belongs to one split. The score has `scaled`,
    2 accuracy - 1: 0 for guessing. Slices: `length`, bits rounded up to the next of 2, 3, 4, 6, 8, 12, 16, ...
    """

    class Config(Options):
        """Options of `event_xor`."""

        min_length: PositiveInt = 2
        """Fewest bits."""
        max_length: PositiveInt = 32
        """Most bits, and so most events."""
        answers: strings.Answers = "last"
        """Targets at the end only, or after every event too."""
        time_unit: Annotated[float, Field(gt=0, le=1e30)] = 1.0
        """Duration of one bit."""

    layout = "next_token"
    irregular_times = True
    overlap = "Tokens alone repeat; in tokens and timespans together the splits are disjoint."
    vocab_size = 3
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        low, high = config.min_length, config.max_length
        if low > high:
            raise UsageError(f"event_xor: min_length={low} is more than max_length={high}.")
        instances = sum(2.0**n for n in range(low, min(high, 64) + 1))
        strings.check_instances(self.name, instances, f"min_length={low}, max_length={high}")
        self.seq_len = high

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        bits = strings.draw_for_split(random.row_keys(split, seed, start, n), split, self._bits)
        length = torch.from_numpy(strings.length_bucket((bits > 0).sum(1)))
        inputs, values = np.zeros_like(bits), np.zeros_like(bits)
        timespans = np.ones(bits.shape, dtype=np.float32)
        ends = (bits > 0) & (bits != np.pad(bits[:, 1:], ((0, 0), (0, 1))))
        row, at = ends.nonzero()
        event = (np.cumsum(ends, axis=1) - 1)[row, at]
        inputs[row, event] = bits[row, at]
        timespans[row, event] = (at - np.where(event > 0, np.roll(at, 1), -1)) * self.config.time_unit
        values[row, event] = 1 + (np.cumsum(bits == 2, axis=1) % 2)[row, at]
        targets = strings.answers_at(values, inputs > 0, self.config.answers)
        return Batch(
            torch.from_numpy(inputs), torch.from_numpy(targets), {"length": length}, torch.from_numpy(timespans)
        )

    def _bits(self, keys: random.Keys) -> strings.Tokens:
        """(n, max_length) strings of 1 (for the bit 0) and 2, padded with 0."""
        c = self.config
        lengths = c.min_length + random.below(random.fold(keys, 0), c.max_length - c.min_length + 1)
        bits = 1 + random.below(random.bits(random.fold(keys, 1), c.max_length), 2)
        bits[np.arange(c.max_length) >= lengths[:, None]] = 0
        return bits

    def row_scores(self, batch: Batch, predictions: Tensor) -> dict[str, Tensor]:
        """`scaled`: 0 for guessing, 1 for all right."""
        return {"scaled": strings.scaled(batch, predictions, 0.5)}

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        assert batch.timespans is not None
        n = int((batch.inputs[row] > 0).sum())
        bits = [str(token - 1) for token in batch.inputs[row, :n].tolist()]
        spans = batch.timespans[row, :n].tolist()
        signal = "".join(bit * round(span / self.config.time_unit) for bit, span in zip(bits, spans, strict=True))
        lines = {"event": bits, "timespan": [f"{span:g}" for span in spans]}
        answer = {1: "even", 2: "odd"}
        lines["ones"] = [answer.get(t, "") for t in batch.targets[row, :n].tolist()]
        if predictions is not None:
            said = [answer.get(p, "?") for p in predictions[row, :n].tolist()]
            pairs = zip(lines["ones"], said, strict=True)
            lines["predicted"] = ["" if not t else p if p == t else p + "!" for t, p in pairs]
        return f"bits       {signal}\n\n{strings.columns(lines)}"

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """The signal as a step line with its events."""
        from matplotlib.figure import Figure

        assert batch.timespans is not None
        n = int((batch.inputs[row] > 0).sum())
        times = np.cumsum(batch.timespans[row, :n].numpy())
        bits, targets = batch.inputs[row, :n].numpy() - 1, batch.targets[row, :n].tolist()
        figure = Figure(figsize=(8, 2.2), layout="constrained")
        axes = figure.add_subplot()
        axes.step([0, *times], [bits[0], *bits], where="pre", color="0.2")
        axes.plot(times, bits, "o", color="tab:blue")
        for i, target in enumerate(targets):
            if target == IGNORE:
                continue
            said = target if predictions is None else int(predictions[row, i])
            text = {1: "even", 2: "odd"}.get(said, "?")
            axes.annotate(
                text,
                (times[i], bits[i]),
                (6, -3),
                textcoords="offset points",
                color="tab:green" if said == target else "tab:red",
                weight="bold",
            )
        axes.set_yticks([0, 1])
        axes.set_ylim(-0.3, 1.3)
        axes.set_xlim(0, times[-1] * 1.1)
        axes.set_xlabel("time (events at the dots)")
        axes.set_ylabel("bit")
        axes.spines[["top", "right"]].set_visible(False)
        return figure
