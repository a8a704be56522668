"""A residual kind in one file: each channel of a step's output has a learned factor."""

import torch
from pydantic import Field
from torch import nn

import zoo.residual
from zoo.core.options import Options


@zoo.residual.register("layer_scale")
class LayerScale(zoo.residual.Connection):
    """x + w y, with w (D,) small at first (Touvron et al. 2021, arXiv 2103.17239, section 2)."""

    class Config(Options):
        """start: the first value of w."""

        start: float = Field(default=0.1, gt=0)

    def __init__(self, d_model, config, *, index, eps):
        super().__init__(d_model, config, index=index, eps=eps)
        self.weight = nn.Parameter(torch.full((d_model,), config.start))

    @classmethod
    def law_cases(cls):
        return [{}, {"start": 0.2}]

    def forward(self, stream):
        return stream, stream, None  # what the step reads, what is kept, and nothing for `write`

    def write(self, stream, y, weights):
        return stream + self.weight * y

    def flops_per_token(self):
        return 0  # no product of matrices
