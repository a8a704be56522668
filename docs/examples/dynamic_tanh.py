"""A norm in one file: a tanh in place of a norm."""

import torch
from pydantic import Field
from torch import nn

import zoo.norms
from zoo.core.options import Options
from zoo.protocol import Norm


@zoo.norms.register("dynamic_tanh")
class DynamicTanh(Norm):
    """y = w tanh(a x) + b, with a learned number a (Zhu et al. 2025, arXiv 2503.10622)."""

    class Config(Options):
        """start: the first value of a."""

        start: float = Field(default=0.5, gt=0)

    def __init__(self, d_model, config, *, eps, axis="channels"):
        super().__init__(d_model, config, eps=eps, axis=axis)
        self.slope = nn.Parameter(torch.tensor(config.start))
        self.weight, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))

    @classmethod
    def law_cases(cls):
        return [{}, {"start": 0.8}]

    def forward(self, x):
        return self.weight * torch.tanh(self.slope * x) + self.bias
