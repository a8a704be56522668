"""Law 0: the form of what a mixer gives back, without which no other law can be checked, and of its law cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.core.errors import UsageError
from zoo.laws.book import BF16, F32, law
from zoo.laws.compare import LawBroken, dtype_of, random_like, require
from zoo.laws.stand_ins import StandIn
from zoo.protocol import Mixer, check_state

B, T = 2, 3


@law(0, "contract", dtypes=(F32, BF16))
@torch.no_grad()
def contract(mixer: Mixer) -> None:
    """`init_state`, `forward` and `step` give back what the contract says."""
    x = random_like(mixer, B, T, mixer.d_model).to(dtype_of(mixer))
    if isinstance(mixer, StandIn):
        mixer.check_form()
    else:
        _require_state("init_state returns", mixer.init_state(B))
        state = _require_pass("forward", mixer(x), mixer, x)
        if mixer.causal:
            _require_pass("step", mixer.step(x[:, 0], state), mixer, x[:, 0])
        flops = mixer.flops_per_token(T)
        right = type(flops) is int and flops >= 0
        require(right, f"flops_per_token returns {flops!r:.40}, expected a whole number from 0")
    with torch.enable_grad():
        y, _ = mixer(x.clone().requires_grad_() + 0)  # no leaf: what is written to is for law 5 to say
        require(y.requires_grad, "the outputs of forward have no gradient: they are detached")


@law(0, "law cases", dtypes=(F32,), cases="alone")
def law_cases(mixer: Mixer) -> None:
    """`law_cases` sets every option to another value than its default at least once; `backend` has a law of its own."""
    cls = type(mixer)
    cases = cls.law_cases()
    require(isinstance(cases, list) and all(isinstance(case, dict) for case in cases), "law_cases is no list of dicts")
    changed = {option for case in cases for option in cls.Config(**case).changed()}
    unchanged = [option for option in cls.Config.model_fields if option not in changed | {"backend"}]
    require(not unchanged, f"law_cases never sets {', '.join(unchanged)} to a value other than the default")


def _require_pass(method: str, result: Any, mixer: Mixer, x: Tensor) -> Any:
    """The next state, where the method returned (y, next state) of the right forms."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise LawBroken(f"{method} returns {_form(result)}, expected (y, next state)")
    y, state = result
    right = isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype
    require(right, f"{method} returns {_form(y)} as y, expected {_form(x)} as of x")
    _require_state(f"{method} returns", state)
    try:
        check_state(mixer.name, mixer, state, B, x.dtype)
    except UsageError as misfit:
        raise LawBroken(f"{method} returns another state than init_state: {misfit}") from None
    return state


def _require_state(what: str, state: Any) -> None:
    """A state is a tuple of tensors, best a NamedTuple, or a nest of such tuples; `()` where there is none."""
    rule = "a state is a NamedTuple of tensors, or () where there is none"
    require(isinstance(state, tuple), f"{what} {_form(state)} as a state: {rule}")
    for part in state:
        if not isinstance(part, Tensor):
            _require_state(f"{what} a tuple with", part)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{len(value)} values" if type(value) is tuple else f"a {type(value).__name__}"
