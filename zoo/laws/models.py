"""Law 11 of a whole model: tokens, contexts and states that do not fit are refused, any integer type serves."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from zoo.laws.compare import assert_close, device_of
from zoo.laws.refusal import B, Foreign, T, refused, wrong_contexts
from zoo.protocol import Context


@torch.no_grad()
def refusal_of_a_model(model: nn.Module, vocab_size: int) -> None:
    """What does not fit a model of tokens is refused in one line, and tokens may be of any integer type.

    Raises:
        LawBroken: what does not hold.
    """
    device = device_of(model)
    tokens = torch.randint(vocab_size, (B, T), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device)
    wrong: list[tuple[str, Any]] = [("no rows", tokens[:0]), ("no steps", tokens[:, :0]), ("one row", tokens[0])]
    wrong += [("tokens of three axes", tokens[None]), ("tokens in float64", tokens.double())]
    wrong += [("bool tokens", tokens.bool()), ("a list", [[1, 2]]), ("a text", "tokens")]
    for what, given in wrong:
        refused(what, partial(model, given), "tokens", "(B, T)")
    if device.type == "cpu":
        at = torch.tensor([1], device=device)
        for given in (tokens - vocab_size, tokens + vocab_size, tokens.index_fill(1, at, -100)):
            refused("a token out of the vocabulary", partial(model, given), "tokens", f"vocab_size={vocab_size}")
    for what, context, word in wrong_contexts(B, T, device):
        refused(what, partial(model, tokens, None, context), "model", word)
    leaf = torch.zeros(B, T, device=device)
    states = {"a text": "state", "a tensor": leaf, "a tuple": (leaf,), "a foreign state": Foreign(leaf)}
    for what, state in states.items():
        refused(what, partial(model, tokens, state))
    lengths = torch.tensor([2, 5, T], device=device)
    expected = tree_leaves(model(tokens, None, Context(lengths=lengths)))
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        found = tree_leaves(model(tokens.to(dtype), None, Context(lengths=lengths.to(dtype))))
        assert_close(found, expected, 0.0, f"tokens in {dtype}")
