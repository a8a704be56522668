"""How a learned order of unmasking is trained: answers are tried in many orders, and orders of right answers rewarded.

Hong et al. 2025 (arXiv 2510.05725, UPO): a policy chooses which masked cell a trained, frozen model unmasks next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.models.modes import evaluation_mode
from zoo.models.policy import Policy, Seen
from zoo.objectives.base import Encoded, Update
from zoo.objectives.diffusion import cells_of
from zoo.tasks.protocol import Batch, Task, take

Read = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""From rows (n, T) and timespans to the model's logits (n, T, vocab of the task) and features (n, T, D)."""

NOT_LEARNED = (
    "the model has no learned order, which init=RUN objective.unmasking_order={} trains of a run with masked_diffusion"
)


class OrderTraining(Options, label="objective.unmasking_order"):
    """How the order of unmasking is learned.

        loss = mean over passes of  -min(r A, clip(r, 1 - clip, 1 + clip) A) + kl * KL(policy || reference)

    Every puzzle of a batch is answered `group` times, one cell a pass, each cell drawn from the policy; tokens are the
    most probable ones. A = (reward - mean of the group) / (deviation of the group + 1e-4), where the reward is 1 for a
    right answer (`Task.is_right`) and 0 otherwise; r is the ratio of the probability of the chosen cell to that when it
    was drawn (GRPO). Groups whose answers are all right, or all wrong, are left out, unless all groups are. The
    divergence from the reference is exact for each pass, while the authors estimate that of whole answers.

    Attributes:
        group: answers of each puzzle.
        updates: optimizer steps for a batch, each of an equal part of its passes, drawn at random.
        clip: see above; 0.5 in the authors' code.
        kl: see above.
    """

    group: int = Field(default=8, ge=2)
    updates: int = Field(default=4, ge=1)
    clip: float = Field(default=0.5, gt=0, lt=1)
    kl: float = Field(default=0.01, ge=0)


def policy_of(model: Any) -> Policy:
    """The policy of a model.

    Raises:
        UsageError: it has none.
    """
    policy = getattr(model, "unmasking_policy", None)
    if policy is None:
        raise UsageError(f'order="learned" is not allowed: {NOT_LEARNED}.')
    return policy


class Passes(NamedTuple):
    """Passes in which one cell each was unmasked.

    Attributes:
        rows: (m,) the answer that a pass belongs to.
        seen: what the policy saw, (m, T, ...).
        chosen: (m,) the cell.
        log_p: (m,) the logarithm of the probability with which it was drawn.
    """

    rows: Tensor
    seen: Seen
    chosen: Tensor
    log_p: Tensor


class OrderTeacher:
    """Teaches the policy of a model.

    Args:
        task: of the rows; it judges answers.
        policy: what is trained.
        model: the frozen model; it is in evaluation mode while it answers.
        read: one pass of the model.
        mask: the mask token.
        how: the options.
    """

    def __init__(self, task: Task, policy: Policy, model: nn.Module, read: Read, mask: int, how: OrderTraining):
        self.task, self.policy, self.model, self.read, self.mask, self.how = task, policy, model, read, mask, how

    def updates(self, data: Encoded, batch: Batch, generator: torch.Generator, parts: int = 1) -> Iterator[Update]:
        """The losses of a batch; `batch` has its rows as the task judges them."""
        c, n, device = self.how, len(data.tokens), data.tokens.device
        again = torch.arange(n, device=device).repeat_interleave(c.group)
        timespans = None if data.timespans is None else data.timespans[again]
        with evaluation_mode(self.model), torch.no_grad():
            answers, passes = self.tried(
                data.tokens[again], cells_of(data)[again], timespans, generator=generator, parts=parts
            )
        rewarded = take(batch, again)
        right = self.task.is_right(rewarded, answers[:, -batch.targets.shape[1] :])
        advantage = advantages(right.to(passes.log_p).view(n, c.group)).flatten()
        said = _Said.of(data, answers, right, c.group)
        telling = (advantage != 0)[passes.rows].nonzero().squeeze(1)
        if not len(telling):  # nothing but the divergence from the reference is left to learn from
            telling = torch.arange(len(passes.rows), device=device)
        for drawn in torch.randperm(len(telling), generator=generator).to(device).chunk(c.updates):
            these = telling[drawn]
            pieces = these.chunk(parts)
            for i, piece in enumerate(pieces):
                rows, share = passes.rows[piece], len(piece) / len(these)
                seen, spans = passes.seen.of(piece), None if timespans is None else timespans[rows]
                loss, metrics = self.loss(
                    self.policy(seen, spans), seen.reference, passes.chosen[piece], passes.log_p[piece], advantage[rows]
                )
                yield said.update(share * loss, metrics, share, first=i == 0, last=i == len(pieces) - 1)

    def tried(
        self,
        tokens: Tensor,
        cells: Tensor,
        timespans: Tensor | None = None,
        *,
        generator: torch.Generator,
        parts: int = 1,
    ) -> tuple[Tensor, Passes]:
        """Rows (n, T) answered in orders that are drawn from the policy, and the passes that this took.

        Args:
            tokens: with any tokens at the cells.
            cells: (n, T) bool, those of the answers.
            timespans: (n, T), where the task has irregular times.
            generator: of the orders, on the CPU.
            parts: in how many parts the model reads the rows.
        """
        tokens = tokens.masked_fill(cells, self.mask)
        found: list[Passes] = []
        while (masked := cells & (tokens == self.mask)).any():
            noise = -(-torch.rand(tokens.shape, generator=generator).log()).log()
            for rows in masked.any(1).nonzero().squeeze(1).chunk(parts):
                spans = None if timespans is None else timespans[rows]
                logits, hidden = self.read(tokens[rows], spans)
                seen = self.policy.see(tokens[rows], hidden, logits, masked[rows])
                scores = self.policy(seen, spans)
                chosen = (scores + noise.to(scores)[rows]).argmax(1, keepdim=True)
                log_p = scores.log_softmax(1).gather(1, chosen).squeeze(1)
                found.append(Passes(rows, seen, chosen.squeeze(1), log_p))
                tokens[rows[:, None], chosen] = logits.argmax(-1).gather(1, chosen)
        if not found:
            raise UsageError("unmasking_order: no row of this batch has a cell to unmask.")
        seen = Seen(*(torch.cat(parts) for parts in zip(*(each.seen for each in found), strict=True)))
        rows, chosen, log_p = (torch.cat([getattr(each, k) for each in found]) for k in ("rows", "chosen", "log_p"))
        return tokens, Passes(rows, seen, chosen, log_p)

    def loss(
        self, scores: Tensor, reference: Tensor, chosen: Tensor, log_p: Tensor, advantage: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of passes (m,) with the policy's scores (m, T), and figures of them; see `OrderTraining`."""
        masked = reference > -math.inf
        now = scores.log_softmax(1)
        ratio = (now.gather(1, chosen[:, None]).squeeze(1) - log_p).exp()
        clipped = ratio.clamp(1 - self.how.clip, 1 + self.how.clip)
        gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
        apart = (now - reference.log_softmax(1)).masked_fill(~masked, 0.0)
        kl = (now.exp() * apart).sum(1).mean()
        figures = {"kl": kl.detach(), "clipped": (ratio != clipped).float().mean()}
        return self.how.kl * kl - gain, figures


def advantages(rewards: Tensor) -> Tensor:
    """Rewards (n, group) to how much better each is than the others of its group; 0 where all are alike."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


class _Said(NamedTuple):
    """The answers of a batch as an update shows them: the first part of a step has all, the others none."""

    predicted: Tensor
    targets: Tensor
    rows: Tensor
    right: Tensor

    @classmethod
    def of(cls, data: Encoded, answers: Tensor, right: Tensor, group: int) -> _Said:
        each = torch.arange(group, device=answers.device)[:, None]
        row, step = data.rows * group + each, data.positions % data.tokens.shape[1]
        predicted = answers[row, step].flatten()
        return cls(predicted, data.targets.repeat(group), row.flatten(), right)

    def update(self, loss: Tensor, metrics: dict[str, Tensor], share: float, *, first: bool, last: bool) -> Update:
        shown = self if first else _Said(*(t[:0] for t in self))
        logits = loss.new_zeros(0, 1)
        return Update(loss, logits, shown.targets, shown.rows, metrics, share, last, shown.predicted, shown.right)


__all__ = ["NOT_LEARNED", "OrderTeacher", "OrderTraining", "Passes", "Read", "advantages", "policy_of"]
