"""An objective in one file: the next token, with less weight on easy answers."""

from dataclasses import replace

import torch.nn.functional as F
from pydantic import Field

from zoo.objectives.base import register
from zoo.objectives.next_token import NextToken


@register("focal")
class Focal(NextToken):
    """`next_token` with the focal loss (Lin et al. 2017, arXiv 1708.02002, equation 4): -(1 - p)^gamma log p.

    Answers that already have a high probability p have little weight. Auxiliary losses are added unchanged.
    """

    class Config(NextToken.Config):
        """gamma: 0 is cross entropy."""

        gamma: float = Field(default=2.0, ge=0)

    def updates(self, model, data, carry, generator):
        for update in super().updates(model, data, carry, generator):
            surprise = F.cross_entropy(update.logits, update.targets, reduction="none")
            weight = (1 - (-surprise).exp()) ** self.config.gamma
            yield replace(update, loss=update.loss + ((weight - 1) * surprise).mean())
