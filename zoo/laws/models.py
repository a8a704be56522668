"""Law 11 of whole models and backbones: inputs, contexts and states that do not fit are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.backbone import Backbone
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
    _refuses_company(model, "model", tokens)
    lengths = torch.tensor([2, 5, T], device=device)
    expected = tree_leaves(model(tokens, None, Context(lengths=lengths)))
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        found = tree_leaves(model(tokens.to(dtype), None, Context(lengths=lengths.to(dtype))))
        assert_close(found, expected, 0.0, f"tokens in {dtype}")


@torch.no_grad()
def refusal_of_vectors(module: Any, width: int) -> None:
    """What does not fit a model of real vectors, or a backbone, is refused in one line.

    Args:
        module: reads (B, T, width); `init_state` and `step` are its own.
        width: numbers of a vector.

    Raises:
        LawBroken: what does not hold.
    """
    device = device_of(module)
    x = torch.randn(B, T, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device)
    who = "backbone" if isinstance(module, Backbone) else "model"
    wrong: list[tuple[str, Any]] = [("no rows", x[:0]), ("no steps", x[:, :0]), ("one row", x[0]), ("a text", "x")]
    wrong += [("another width", torch.cat([x, x], -1)), ("whole numbers", x.long()), ("a list", [[[1.0]]])]
    for what, given in wrong:
        refused(what, partial(module, given), who, f"(B, T, {width})")
    _refuses_company(module, who, x)
    refused("a sequence for a step", partial(module.step, x, module.init_state(B)), who, f"(B, {width})")


def _refuses_company(module: nn.Module, who: str, inputs: Tensor) -> None:
    """Contexts and states that do not fit (B, T, ...) inputs."""
    for what, context, word in wrong_contexts(B, T, inputs.device):
        refused(what, partial(module, inputs, None, context), who, word)
    leaf = torch.zeros(B, T, device=inputs.device)
    states = {"a text": "state", "a tensor": leaf, "a tuple": (leaf,), "a foreign state": Foreign(leaf)}
    for what, state in states.items():
        refused(what, partial(module, inputs, state))
