"""A learned order of unmasking: a small network that says which masked cell of an answer is unmasked next."""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.models.config import ModelConfig
from zoo.models.ends import make_backbone
from zoo.norms import make_norm
from zoo.protocol import Context


def sureness(p: Tensor, measure: str) -> Tensor:
    """How sure predictions p (..., tokens) are, (...): larger is surer.

    Args:
        p: probabilities.
        measure: "confidence": the largest of them. "margin": the difference between the two largest. "entropy": minus
            the entropy in nats.
    """
    if measure == "entropy":
        return torch.special.xlogy(p, p).sum(-1)
    two = p.topk(min(2, p.shape[-1]), -1).values
    return two[..., 0] - two[..., 1] if measure == "margin" and two.shape[-1] > 1 else two[..., 0]


class Seen(NamedTuple):
    """What a policy sees of rows with masked cells.

    Attributes:
        tokens: (n, T), with masks.
        hidden: (n, T, D) the model's features.
        best: (n, T, `probabilities`) the largest probabilities of each cell, in falling order.
        reference: (n, T) figures of the reference, minus infinity but at masked cells.
    """

    tokens: Tensor
    hidden: Tensor
    best: Tensor
    reference: Tensor

    def of(self, rows: Tensor) -> Seen:
        """Some of the rows."""
        return Seen(*(t[rows] for t in self))


@final
class Policy(nn.Module):
    """Scores of the masked cells, whose softmax is the probability of each to be unmasked next (Hong et al. 2025, arXiv
    2510.05725, UPO).

        score = reference / temperature + w . norm(f(features + W [best probabilities, is masked]))

    f are layers of any pattern that reads both ways. w begins at zero, so that a policy begins as its reference, for
    which the authors train theirs beforehand.

    Options: `ModelConfig.unmasking_policy`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.unmasking_policy is None:
            raise UsageError("A policy of unmasking needs `unmasking_policy`, its options; {} takes the defaults.")
        self.config, d = config.unmasking_policy, config.d_model
        self.read = nn.Linear(self.config.probabilities + 1, d, bias=False)
        self.backbone = make_backbone(config, self.config.pattern)
        self.norm = make_norm(config.norm if config.placement != "post" else "none", d, config.norm_eps)
        self.score = nn.Linear(d, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def see(self, tokens: Tensor, hidden: Tensor, logits: Tensor, masked: Tensor) -> Seen:
        """What the policy sees: tokens (n, T), the model's features (n, T, D) of them, the logits (n, T, vocab of the
        task), and which cells (n, T) are masked and may be chosen."""
        p = logits.softmax(-1)
        n = self.config.probabilities
        best = F.pad(p.topk(min(n, p.shape[-1]), -1).values, (0, max(n - p.shape[-1], 0)))
        reference = sureness(p, self.config.reference) / self.config.temperature
        return Seen(tokens, hidden, best.to(hidden.dtype), reference.masked_fill(~masked, -math.inf))

    def forward(self, seen: Seen, timespans: Tensor | None = None) -> Tensor:
        """Scores (n, T), minus infinity where nothing may be chosen."""
        masked = (seen.reference > -math.inf).to(seen.best.dtype)[..., None]
        x = seen.hidden + self.read(torch.cat([seen.best, masked], -1))
        x, _ = self.backbone(x, None, Context(timespans=timespans, tokens=seen.tokens))
        return seen.reference + self.score(self.norm(x)).squeeze(-1).to(seen.reference.dtype)


__all__ = ["Policy", "Seen", "sureness"]
