"""Law 11: what does not fit is refused at the door, in one line; whole numbers may be of any integer type."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from zoo.core.errors import UsageError
from zoo.laws.book import F32, law
from zoo.laws.compare import assert_close, device_of, dtype_of, gradients, random_like, rebuilt, require, spans
from zoo.pattern import create_mixer, list_mixers
from zoo.protocol import Context, Mixer, State
from zoo.states import fork

B, T = 3, 9
LONGEST_MESSAGE = 400


def refused(what: str, call: Callable[[], Any], *parts: str) -> None:
    """The call ends in a `UsageError` of one line that holds `parts`."""
    try:
        call()
    except UsageError as refusal:
        message = str(refusal)
        require("\n" not in message, f"{what} is refused in more than one line")
        require(len(message) < LONGEST_MESSAGE, f"{what} is refused by a line of {len(message)} characters")
        for part in parts:
            require(part in message, f"{what} is refused without a word of {part!r}: {message}")
    except Exception as error:
        require(False, f"{what} ends in {type(error).__name__}: {error}")
    else:
        require(False, f"{what} is not refused")


class Foreign(NamedTuple):
    """A state of no mixer."""

    h: Tensor


@functools.cache
def _foreign_states(d_model: int) -> list[State]:
    """States of other mixers, for B rows."""
    with torch.device("cpu"):
        known = [Foreign(torch.zeros(B, d_model))]
        for name in list_mixers(kind="sequence"):
            with contextlib.suppress(Exception):  # of one that cannot be built, its own laws say why
                known.append(create_mixer(name, d_model).init_state(B))
        return known


def wrong_contexts(batch: int, steps: int, device: Any) -> list[tuple[str, Any, str]]:
    """Contexts that do not fit (batch, steps): what is wrong, the context, and a word that the message has."""
    whole = torch.full((batch,), steps, device=device)
    real, last = torch.ones(batch, steps, device=device), torch.tensor([steps - 1], device=device)
    found: list[tuple[str, Any, str]] = [
        ("lengths of fewer rows", Context(lengths=whole[:-1]), "lengths"),
        ("lengths of two axes", Context(lengths=whole[:, None]), "lengths"),
        ("lengths in float64", Context(lengths=whole.double()), "lengths"),
        ("bool lengths", Context(lengths=whole.bool()), "lengths"),
        ("a list of lengths", Context(lengths=whole.tolist()), "lengths"),  # type: ignore[arg-type]
        ("resets in float32", Context(resets=real), "resets"),
        ("resets of fewer steps", Context(resets=real.bool()[:, 1:]), "resets"),
        ("resets of fewer rows", Context(resets=real.bool()[1:]), "resets"),
        ("resets in int64", Context(resets=real.long()), "resets"),
        ("timespans of fewer steps", Context(timespans=real[:, 1:]), "timespans"),
        ("timespans of one row", Context(timespans=real[0]), "timespans"),
        ("bool timespans", Context(timespans=real.bool()), "timespans"),
        ("tokens of more steps", Context(tokens=whole[:, None].expand(-1, steps + 1)), "tokens"),
        ("tokens in float32", Context(tokens=real), "tokens"),
        ("a context that is a mapping", {"lengths": whole}, "context"),
    ]
    if torch.device(device).type == "cpu":  # values are looked at there alone
        found += [
            ("negative lengths", Context(lengths=whole - steps - 1), "length"),
            ("lengths beyond T", Context(lengths=whole + 1), "length"),
            ("negative timespans", Context(timespans=-real), "timespans"),
            ("a timespan that is NaN", Context(timespans=real.index_fill(1, last, torch.nan)), "NaN"),
            ("a timespan without end", Context(timespans=real.index_fill(1, last, torch.inf)), "timespans"),
        ]
    return found


def wrong_states(mixer: Mixer) -> list[tuple[str, Any]]:
    """States that are not of this mixer, or not of B rows."""
    D, own = mixer.d_model, mixer.init_state(B)
    leaf = torch.zeros(B, D, device=device_of(mixer))
    wrong: list[tuple[str, Any]] = [("a text", "state"), ("a tensor", leaf), ("a tuple", (leaf,))]
    wrong += [("a tuple of two", (leaf, leaf)), ("a list", [leaf])]
    wrong += [(f"a state of another mixer, {type(s).__name__}", s) for s in _foreign_states(D) if s != ()]
    if not tree_leaves(own):
        return wrong
    wider = _state_of_another_width(mixer, own)
    found = [
        *((what, state) for what, state in wrong if type(state) is not type(own)),
        ("()", ()),
        *((f"a state of {n} rows", mixer.init_state(n)) for n in (B - 1, 1, B + 40)),
        *([("a plain tuple", tuple(own))] if hasattr(own, "_fields") else []),
        ("a state of one axis", tree_map(lambda t: t.flatten(), own)),
        ("a state of one axis more", tree_map(lambda t: t[..., None], own)),
        ("a bool state", tree_map(lambda t: t.bool(), own)),
        *((f"a text as {name}", own._replace(**{name: "state"})) for name in getattr(own, "_fields", ())),
    ]
    return found + ([("a state of another width", wider)] if wider is not None else [])


def _state_of_another_width(mixer: Mixer, own: State) -> State | None:
    """A state of the mixer at twice the width, where its options allow that and its state grows with it."""
    try:
        state = rebuilt(mixer, 2 * mixer.d_model).init_state(B)
    except UsageError:
        return None
    shapes = [[leaf.shape for leaf in tree_leaves(each)] for each in (state, own)]
    return state if shapes[0] != shapes[1] else None


@law(11, "refusal of states", dtypes=(F32,), cases="first")
def refusal_of_states(mixer: Mixer) -> None:
    """A state of another batch, width or mixer is refused, and one that is not taken stays as it is."""
    x = random_like(mixer, B, T, mixer.d_model).to(dtype_of(mixer))
    for what, state in wrong_states(mixer):
        refused(what, partial(mixer, x, state), mixer.name)
        if mixer.causal:
            refused(f"{what}, at a step,", partial(mixer.step, x[:, 0], state), mixer.name)
    if mixer.causal:
        with torch.no_grad():
            _, state = mixer(x)
        before = fork(state)
        few = partial(mixer, x[:1], state) if tree_leaves(state) else partial(mixer, x[:0])
        refused("another batch", few)
        refused("resets in float32", partial(mixer, x, state, Context(resets=torch.ones(B, T, device=x.device))))
        assert_close(state, before, 0.0, "the state after a refusal")


@law(11, "refusal of inputs", dtypes=(F32,), cases="first")
def refusal_of_inputs(mixer: Mixer) -> None:
    """Inputs, lengths, resets and timespans of another shape, type or range are refused."""
    x = random_like(mixer, B, T, mixer.d_model).to(dtype_of(mixer))
    for wrong in (x[:0], x[:, :0], x[0], x[..., 1:], x.long(), x[None], "x"):
        what = f"an input {tuple(wrong.shape)} in {wrong.dtype}" if isinstance(wrong, Tensor) else "a text as input"
        refused(what, partial(mixer, wrong), mixer.name, f"(B, T, {mixer.d_model})")
    for what, context, word in wrong_contexts(B, T, x.device):
        refused(what, partial(mixer, x, None, context), mixer.name, word)
    if mixer.causal:
        refused("a sequence at a step", partial(mixer.step, x, mixer.init_state(B)), mixer.name)
        for what, context, word in wrong_contexts(B, 1, x.device):
            step = partial(mixer.step, x[:, 0], mixer.init_state(B), context)
            refused(f"{what}, at a step,", step, mixer.name, word)


@law(11, "whole numbers", dtypes=(F32,), cases="first")
def whole_numbers(mixer: Mixer) -> None:
    """Lengths and timespans may be of any integer type, and padding may hold any timespan."""
    device = device_of(mixer)
    x = random_like(mixer, B, T, mixer.d_model).to(dtype_of(mixer))
    lengths, timespans = torch.tensor([2, 0, T], device=device), torch.ones(B, T, device=device)

    def outcome(lengths: Tensor, timespans: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), *mixer.parameters()]
        y, state = mixer(inputs[0], None, Context(lengths=lengths, timespans=timespans))
        leaves = [leaf for leaf in tree_leaves((y, state)) if leaf.is_floating_point()]
        return [*tree_leaves((y, state)), *gradients(leaves, inputs)]

    expected = outcome(lengths, timespans)
    for dtype in (torch.int32, torch.uint8):
        assert_close(outcome(lengths.to(dtype), timespans.to(dtype)), expected, 0.0, f"lengths in {dtype}")
    padding = torch.arange(T, device=device) >= lengths[:, None]
    some = spans(B, T, device=device).float()
    wanted = mixer(x, None, Context(lengths=lengths, timespans=some))
    for value in (torch.nan, -1.0, torch.inf):
        got = mixer(x, None, Context(lengths=lengths, timespans=some.masked_fill(padding, value)))
        assert_close(got, wanted, 0.0, f"{value} in the padding")
