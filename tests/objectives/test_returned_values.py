"""What an objective of one's own gives back is checked: a mistake is one line that names it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import zoo
from zoo.core.errors import UsageError
from zoo.objectives.next_token import NextToken
from zoo.tasks import create_task

UPDATE = r"expected an Update\(loss, logits, targets, rows\)"
FAULTS = {
    "updates yields nothing": ("updates", lambda found: iter(()), "updates yielded nothing, expected at least one"),
    "updates returns an update": ("updates", next, f"updates returned a Update, expected to yield {UPDATE[9:]}"),
    "updates yields a loss": ("updates", lambda found: (u.loss for u in found), rf"yielded a Tensor \(\), {UPDATE}"),
    "a loss of rows": (
        "updates",
        lambda found: (replace(u, loss=u.loss.expand(4)) for u in found),
        r"updates yielded a loss a Tensor \(4,\), expected one number: take its mean",
    ),
    "encode returns a tuple": ("encode", tuple, r"encode returned a tuple, expected an Encoded\(tokens"),
    "evaluate returns a loss": (
        "evaluate",
        lambda found: found[1],
        r"evaluate returned a Tensor .*, expected \(predict",
    ),
    "evaluate returns other rows": (
        "evaluate",
        lambda found: (found[0][:, 1:], found[1]),
        r"evaluate returned predictions \(4, 63\), expected \(predictions \(4, 64\), loss\)",
    ),
    "solve yields nothing": ("solve", lambda found: iter(()), "solve yielded nothing, expected at least one Frame"),
    "solve yields tokens": ("solve", lambda found: (f.tokens for f in found), r"expected a Frame\(tokens, hidden\)"),
}


def broken(method, change):
    def changed(self, *args):
        return change(getattr(NextToken, method)(self, *args))

    return type("Own", (NextToken,), {method: changed, "name": "own"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_named(fault):
    method, change, message = FAULTS[fault]
    task = create_task("mqar", seq_len=64, n_pairs=4)
    objective = broken(method, change)(NextToken.Config(), task, causal=True)
    model = zoo.create_model("short_conv", d_model=16, vocab_size=task.vocab_size)
    batch = task.sample(4, split="train", seed=0)
    data = NextToken(NextToken.Config(), task, causal=True).encode(batch)
    calls = {
        "encode": lambda: objective.encode(batch),
        "updates": lambda: list(objective.updates(model, data, {}, torch.Generator())),
        "solve": lambda: list(objective.solve(model, batch)),
        "evaluate": lambda: objective.evaluate(model, batch),
    }
    with pytest.raises(UsageError, match=f"^The objective 'own': .*{message}"):
        calls[method]()
