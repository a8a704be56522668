"""What the laws are checked of: a word with one set of options, and all law cases of a name."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from zoo.core.errors import UsageError
from zoo.core.registry import Registry
from zoo.laws.compare import off_inits, spelled
from zoo.laws.patterns import OfPattern
from zoo.laws.stand_ins import StandIn, stand_in_class
from zoo.pattern import Word, list_mixers, make_word, mixer_config, mixer_of, parse, to_text
from zoo.pattern.named import read_named
from zoo.protocol import NODES, Mixer, Place, mixers, norms
from zoo.residual import residuals

WIDTH = 32
LENGTH = 300
"""For how many steps a mixer with weights for each is built."""


@dataclass(frozen=True)
class Case:
    """A mixer class with one set of options, in a model that is causal or not, on a device."""

    mixer: type[Mixer]
    options: dict[str, Any] = field(default_factory=dict)
    causal: bool = True
    device: str = "cpu"

    def __str__(self) -> str:
        word = subject_of(self.mixer, self.options)
        word = word if self.causal else f"{word}, looking ahead"
        return word if self.device == "cpu" else f"{word} on {self.device}"

    def build(self, dtype: torch.dtype = torch.float64, d_model: int = WIDTH, **options: Any) -> Mixer:
        """The mixer with parameters moved off their inits; the same ones in float64 and float32, on every device."""
        config = self.mixer.Config(**{**self.options, **options})
        return copy.deepcopy(_built(self.mixer, d_model, config, self.causal)).to(self.device, dtype)


@functools.lru_cache(maxsize=64)  # of the cases of a few words
def _built(cls: type[Mixer], d_model: int, config: Any, causal: bool) -> Mixer:
    """A mixer of which every case gets a copy; in float32."""
    place = Place(layer=1, n_layers=3, causal=causal, length=LENGTH)
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(1)
        return spelled(off_inits(cls(d_model, config, place=place).double()).float())


def cases_of(cls: type[Mixer], device: str = "cpu") -> list[Case]:
    """The law cases of a mixer, and the first two again in a model that is not causal where that changes the mixer."""
    options = cls.law_cases()
    given = isinstance(options, list) and options and all(isinstance(each, dict) for each in options)
    for each in options if given else []:
        try:
            cls.Config(**each)
        except UsageError as error:
            raise UsageError(f"law_cases of {cls.name}: {error}") from None
    cases = [Case(cls, each, device=device) for each in (options if given else [{}])]  # else law 0 says what is wrong
    if not _causal(cases[0]):
        return cases
    ahead = [Case(cls, case.options, causal=False, device=device) for case in cases[:2]]
    return cases + [case for case in ahead if not _causal(case)]


def _causal(case: Case) -> bool:
    config, place = case.mixer.Config(**case.options), Place(layer=1, n_layers=3, causal=case.causal, length=LENGTH)
    try:
        with torch.device("meta"):
            return case.mixer(WIDTH, config, place=place).causal
    except UsageError:
        raise
    except Exception:  # law 0 says so
        return True


def subject_of(cls: type[Mixer], options: dict[str, Any]) -> str:
    """A word with its options, as it is written."""
    if issubclass(cls, StandIn | OfPattern):
        return cls.text(options)
    return to_text(make_word(cls.name, options)) if cls.name in mixers else cls.name


def cases_of_word(word: str, device: str = "cpu") -> list[Case]:
    """All law cases of a mixer, a norm or a residual kind by its name; of one with options, those options; of a
    pattern, its steps, and in evaluation too where tokens may leave loops.

    Raises:
        UsageError: an unknown word, options that do not fit, a device that is not there, or a class that cannot be
            built.
    """
    try:
        torch.empty(1, dtype=torch.float64, device=device)  # MPS has none, and the laws compare with it
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UsageError(f"device={device} cannot be used here: {reason}.") from None
    name, bracket, _ = word.strip().partition("(")
    other: Registry[Any] | None = None
    if name in NODES or not name.isidentifier() or name in mixers:
        nodes = parse(word).nodes
        if len(nodes) > 1 or not isinstance(nodes[0], Word) or nodes[0].step.changed():
            return _cases_of_pattern(to_text(parse(word)), device)
    if name.isidentifier() and name not in mixers:
        other = next((registry for registry in (norms, residuals) if name in registry), None)
        if other is None:
            known = [*list_mixers(), *norms.names(), *residuals.names()]
            refused = next((registry for registry in (norms, residuals) if registry.refusal(name)), mixers)
            raise refused.unknown(name, known, "mixer, norm or residual kind")
    if not bracket and name.isidentifier():
        return cases_of(mixers[name] if other is None else stand_in_class(other[name]), device)
    if other is not None:
        return [Case(stand_in_class(other[name]), read_named(other, word).config.changed(), device=device)]
    config = mixer_config(word)
    case = Case(mixer_of(config), config.changed(), device=device)
    case.build()
    return [case]


def backbone_cases(device: str = "cpu") -> list[Case]:
    """The backbones that the laws are checked of: every node, nested; and one that looks ahead."""
    ahead = {"pattern": "loop(2, shortcut(swiglu, mha swiglu) bidirectional(min_gru), gate=True, exit=0.6)"}
    cases = [Case(OfPattern, options, device=device) for options in OfPattern.law_cases()]
    return [*cases, Case(OfPattern, ahead, causal=False, device=device)]


def _cases_of_pattern(pattern: str, device: str) -> list[Case]:
    """A backbone that is causal where its words can be, and otherwise one that looks ahead."""
    case = Case(OfPattern, {"pattern": pattern}, device=device)
    try:
        case.build()
    except UsageError:
        ahead = Case(OfPattern, case.options, causal=False, device=device)
        try:
            ahead.build()
        except UsageError:
            ahead = case
        case = ahead
    mixer = case.build()  # raises what is wrong with the causal one
    evaluated = Case(OfPattern, {**case.options, "evaluate": True}, case.causal, device)
    return [case, evaluated] if evaluated.build().traits != mixer.traits else [case]
