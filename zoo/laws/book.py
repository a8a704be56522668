"""The law book: what a law is, and the list of all of them.

A law is a function of a built mixer that raises `LawBroken` where it does not hold. It enters the book by `@law(...)`,
which says in which precisions, with which settings and of which mixers it is checked.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch.utils._device import _device_constructors

from zoo.core.errors import UsageWarning, unknown
from zoo.ops.choices import fixed_choices
from zoo.protocol import Mixer

Check = Callable[..., str | None]
"""Raises LawBroken, or returns what there is to say of it, such as a refusal that the law allows."""
Exemption = Callable[[Mixer], str | None]
"""Why a law does not bind a mixer, or None where it does."""

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
EVERY = (F32, F64, BF16)


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        number: that of the list in `zoo/protocol.py`; some of its laws are checked in several parts.
        name: of this part.
        check: of a mixer, and of one of the settings.
        dtypes: in which it is checked, the principal one first.
        settings: keyword arguments of the check, the principal ones first. Where all is checked, each in the principal
            precision, and the last in every precision.
        tried: how many of the settings are checked of the first case where not all is checked; all by default.
        brief: whether the check takes `brief=True`, the same inputs by fewer routes: for the other cases, and the other
            precisions of the first one, where not all is checked.
        covering: whether the last of the settings, the rare ones among them, includes the others, and stands for them
            where all is checked.
        rare: further settings, checked of the first case of a mixer alone, and only where all is checked.
        cases: "every" case of a mixer; the "first" one, and the others where all is checked; or that "alone". Laws of
            every case are those that most options can break: order, documents, lengths, forms, gradients, costs.
        unless: why it does not bind a mixer.
        traced: whether it traces graphs.
        by_score: whether routing ops choose by their scores in bfloat16 too.
    """

    number: int
    name: str
    check: Check
    dtypes: tuple[torch.dtype, ...] = (F64,)
    settings: tuple[Mapping[str, Any], ...] = ({},)
    tried: int | None = None
    brief: bool = False
    covering: bool = False
    rare: tuple[Mapping[str, Any], ...] = ()
    cases: Literal["every", "first", "alone"] = "every"
    unless: tuple[Exemption, ...] = ()
    traced: bool = False
    by_score: bool = False

    def exempts(self, mixer: Mixer) -> str | None:
        """Why the law does not bind a mixer, or None where it does."""
        return next((why for exemption in self.unless if (why := exemption(mixer))), None)


LAWS: dict[str, Law] = {}
"""All laws by name, in order of number."""


def law(number: int, name: str, **how: Any) -> Callable[[Check], Check]:
    """Function decorator: the function becomes the check of a law."""

    def enter(check: Check) -> Check:
        LAWS[name] = Law(number, name, check, **how)
        for entered in sorted(LAWS.values(), key=lambda entry: entry.number):
            LAWS[entered.name] = LAWS.pop(entered.name)
        return check

    return enter


def looks_ahead(mixer: Mixer) -> str | None:
    """An exemption: it has no state."""
    return None if mixer.causal else "it looks ahead, and has no state"


def mixes_channels(mixer: Mixer) -> str | None:
    """An exemption: it sees no other step."""
    return "it mixes over channels" if mixer.kind == "channel" else None


def couples_rows(mixer: Mixer) -> str | None:
    """An exemption: its rows depend on each other."""
    return mixer.traits.couples_rows


def not_compilable(mixer: Mixer) -> str | None:
    """An exemption: it cannot be compiled."""
    return mixer.traits.not_compilable


@contextlib.contextmanager
def conditions(law: Law, dtype: torch.dtype) -> Iterator[None]:
    """Under which a law is checked, so that what is wrong elsewhere is wrong here.

    Uninitialised memory holds NaN, or the largest integer. What is made without a device, where it should be made on
    that of the mixer, comes out on one that holds no numbers: so a law on a CPU fails at what would fail on a GPU. (In
    float32, or in the one precision of a law; not where a graph is traced, which would trace that too.) In bfloat16
    routing ops choose by place.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UsageWarning)  # such as of a kernel that cannot be built
        stack.enter_context(poisoned_memory())
        if not law.traced and (dtype == F32 or F32 not in law.dtypes):
            stack.enter_context(made_elsewhere())
        if dtype == BF16 and not law.by_score:
            stack.enter_context(fixed_choices())
        yield


@contextlib.contextmanager
def made_elsewhere() -> Iterator[None]:
    """What is made without a device comes out on the meta device, but under a `torch.device` that is entered within.

    As under `torch.device("meta")`, which passes every operation through Python, and not only those that make tensors:
    that takes a third of what the check of a small layer takes.
    """
    depth = torch._C._len_torch_function_stack()

    def elsewhere(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is None and torch._C._len_torch_function_stack() <= depth:
                kwargs["device"] = "meta"
            return make(*args, **kwargs)

        return made

    with contextlib.ExitStack() as stack:
        for module, name in _makers():
            stack.enter_context(mock.patch.object(module, name, elsewhere(getattr(module, name))))
        yield


@functools.cache
def _makers() -> list[tuple[Any, str]]:
    """Where torch's functions stand that make tensors on the default device: modules and names."""
    from torch._decomp import decompositions_for_jvp  # noqa: F401 - forward mode imports it, which scripts some of them

    modules = (torch, torch.fft, torch.nested, torch.sparse)
    makers = [(make, make.__name__.removeprefix("fft_")) for make in _device_constructors()]
    return [(module, name) for make, name in makers for module in modules if getattr(module, name, None) is make]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory (torch.empty and its kin) holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def named(wanted: Sequence[str | int] | None) -> list[Law]:
    """The laws with these names or numbers; all of them by default.

    Raises:
        UsageError: a name or a number of no law.
    """
    if wanted is None:
        return list(LAWS.values())
    numbers = sorted({entry.number for entry in LAWS.values()})
    found: dict[str, Law] = {}
    for name in map(str, wanted):
        if name not in LAWS and name not in map(str, numbers):
            raise unknown("law", name, [*LAWS, *map(str, numbers)])
        found |= {entry.name: entry for entry in LAWS.values() if name in (entry.name, str(entry.number))}
    return [entry for entry in LAWS.values() if entry.name in found]
