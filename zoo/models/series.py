"""The model of series: real vectors through the backbone once, between a linear layer in and one out."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from zoo.core.errors import UsageError
from zoo.door import check_values, zeroed_padding
from zoo.models.config import ModelConfig
from zoo.models.stack import Stack
from zoo.protocol import Context, admit


@final
class SeriesModel(Stack):
    """Real vectors (B, T, inputs) to (B, T, outputs), and the next state.

    Inputs may be of any floating-point type: the model computes in that of its weights. What stands in the padding of
    `context.lengths` is not read. A model that is not causal takes no state and returns `()`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if names := [mixer.name for mixer in self.mixers() if mixer.traits.reads_tokens]:
            raise UsageError(
                f"{names[0]} looks up tokens, and this model reads vectors (inputs={config.inputs}): "
                f"leave {names[0]} out."
            )

    def read(self, inputs: Any, context: Context | None) -> tuple[Tensor, Context]:
        check_values("model", inputs, self.config.inputs or 0)
        context = admit("model", context, len(inputs), inputs.shape[1], inputs.device)
        return zeroed_padding("model", inputs, context.lengths).to(self.compute_dtype()), context
