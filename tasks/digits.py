"""Pictures of handwritten digits as series, read pixel by pixel or row by row (scikit-learn's copy of the UCI set)."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.tasks import random
from zoo.tasks.protocol import IGNORE, SPLITS, Batch, Split, Task, check_request, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHADES = " .:-=+*#%@"


@register("digits")
class Digits(Task):
    """Name the digit of a picture of 8 x 8 pixels, which is read as a series.

    With order="rows" a step is a row of 8 pixels, from 0 (white) to 1 (black); the class is predicted at the last one:

        ```
        inputs      ....:+*-  ...+@#..  ..       8 steps of 8 pixels
        targets     .         .         .     3  at the last step
        ```

    With order="pixels" a step is one pixel, so that a row has 64 steps, from left to right and from top to bottom; with
    order="permuted" the pixels come in one random order, the same for all pictures, which leaves no neighbourhoods.

    There are 1,797 pictures (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998), as
    scikit-learn ships them. A picture belongs to one split, by its content: 1,356 train, 237 validation and 204 test.
    A split shows all its pictures in a random order before one comes again. There is no augmentation.
    """

    class Config(Options):
        """Options of `digits`."""

        order: Literal["pixels", "rows", "permuted"] = "pixels"
        """What a step is, and in which order pixels are read."""
        order_seed: int = Field(default=0, ge=0, le=2**63 - 1)
        """Which random order `permuted` is."""

    layout = "series"
    overlap = "There are 1,797 pictures: each split repeats its own. No picture is in two splits."
    n_classes = 10
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        if importlib.util.find_spec("sklearn") is None:
            raise UsageError(
                'digits reads files of scikit-learn, which is missing: pip install "sequence-zoo[digits]".'
            )
        if config.order_seed and config.order != "permuted":
            raise UsageError(f'digits: order_seed={config.order_seed} belongs to order="permuted".')
        self.n_inputs, self.seq_len = (8, 8) if config.order == "rows" else (1, 64)
        self.places = np.arange(64)
        if config.order == "permuted":
            self.places = random.permutation(random.mix(config.order_seed), 64)

    def sample(self, n: int, *, split: Split, seed: int, start: int = 0) -> Batch:
        check_request(n, split, start)
        pictures, digits = _pictures(split)
        numbers, size = np.arange(start, start + n), len(digits)
        chosen = np.empty(n, dtype=np.int64)
        for epoch in np.unique(numbers // size).tolist():
            here = numbers // size == epoch
            chosen[here] = random.permutation(random.row_keys(split, seed, epoch, 1), size)[numbers[here] % size]
        inputs = pictures[chosen][:, self.places].reshape(n, self.seq_len, self.n_inputs)
        targets = np.full((n, self.seq_len), IGNORE)
        targets[:, -1] = digits[chosen]
        return Batch(
            torch.from_numpy(np.ascontiguousarray(inputs)),
            torch.from_numpy(targets),
            {"digit": torch.from_numpy(digits[chosen])},
        )

    def _picture(self, batch: Batch, row: int) -> NDArray[np.float32]:
        """(8, 8) the picture of a row."""
        picture = np.empty(64, dtype=np.float32)
        picture[self.places] = batch.inputs[row].numpy().ravel()
        return picture.reshape(8, 8)

    def render(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> str:
        shades = np.round(self._picture(batch, row) * (len(_SHADES) - 1)).astype(int)
        lines = ["".join(2 * _SHADES[shade] for shade in line).rstrip() for line in shades]
        steps = "8 steps of 8 pixels" if self.config.order == "rows" else "64 steps of a pixel"
        permuted = ", in a random order" if self.config.order == "permuted" else ""
        lines += ["", f"read as   {steps}{permuted}", f"digit     {int(batch.targets[row, -1])}"]
        if predictions is not None:
            said, right = int(predictions[row, -1]), int(batch.targets[row, -1])
            lines.append(f"predicted {said}{'' if said == right else '!'}")
        return "\n".join(lines)

    def draw(self, batch: Batch, row: int = 0, predictions: Tensor | None = None) -> Figure:
        """The picture beside the series that is read."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 2.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 2.4))
        left.imshow(self._picture(batch, row), cmap="gray_r", vmin=0, vmax=1)
        left.set_axis_off()
        digit = int(batch.targets[row, -1])
        said = digit if predictions is None else int(predictions[row, -1])
        told = str(digit) if predictions is None else f"{digit}, predicted {said}"
        left.set_title(told, color="black" if said == digit else "tab:red")
        right.plot(np.arange(1, self.seq_len + 1), batch.inputs[row].numpy(), color="0.2", linewidth=1)
        right.set_xlabel("step")
        right.set_ylabel("ink")
        right.spines[["top", "right"]].set_visible(False)
        return figure


@cache
def _pictures(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pictures (n, 64), from 0 to 1, and their digits (n,) of a split."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    here = random.split_of(random.contents(pixels.astype(np.uint8))) == SPLITS.index(split)
    return (pixels[here] / 16).astype(np.float32), digits[here].astype(np.int64)
