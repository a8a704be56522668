"""Checking mixers against the law book: which checks there are, what each finds, and a line for every law."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from zoo.core.errors import UsageError
from zoo.laws import batches, costs, derivatives, openness, order, refusal, training  # noqa: F401 - they enter laws
from zoo.laws.book import LAWS, Law, conditions, named
from zoo.laws.compare import TOLERANCE, LawBroken, device_of, dtype_of, off_inits
from zoo.laws.order import causality, chunk_consistency, rounding
from zoo.pattern import make_word, mixer_config, mixer_of, to_text
from zoo.protocol import Mixer, Place, mixers

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
        word = to_text(make_word(self.mixer.name, self.options)) if self.mixer.name in mixers else self.mixer.name
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
        return off_inits(cls(d_model, config, place=place).double()).float()


def cases_of(cls: type[Mixer], device: str = "cpu") -> list[Case]:
    """The law cases of a mixer, and the first two again in a model that is not causal where that changes the mixer."""
    cases = [Case(cls, options, device=device) for options in cls.law_cases()]
    if not _causal(cases[0]):
        return cases
    ahead = [Case(cls, case.options, causal=False, device=device) for case in cases[:2]]
    return cases + [case for case in ahead if not _causal(case)]


def _causal(case: Case) -> bool:
    config, place = case.mixer.Config(**case.options), Place(layer=1, n_layers=3, causal=case.causal, length=LENGTH)
    with torch.device("meta"):
        return case.mixer(WIDTH, config, place=place).causal


class Finding(NamedTuple):
    """What came of one check.

    Attributes:
        law: the law.
        subject: the word and its options.
        how: the precision and the setting.
        broken: what does not hold, or None.
        note: why the law does not bind the mixer, or what it refuses, or None.
        seconds: processor seconds that it took.
    """

    law: Law
    subject: str
    how: str
    broken: str | None = None
    note: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        told = f": {self.broken}" if self.broken else f" ({self.note})" if self.note else ""
        verb = "does not hold" if self.broken else "holds"
        return f"{self.subject}: law {self.law.number}, {self.law.name}, {verb} in {self.how}{told}"


class Check(NamedTuple):
    """A law for one case, in one precision, with one of its settings."""

    law: Law
    case: Case
    dtype: torch.dtype
    setting: Mapping[str, Any]
    elsewhere: bool = True

    def find(self) -> Finding:
        """What comes of it."""
        return _find(self.law, str(self.case), self.case.build(self.dtype), self.setting, self.elsewhere)


def plan(law: Law, cases: Sequence[Case], *, thorough: bool = False) -> list[Check]:
    """The checks of a law for the cases of a mixer.

    Thorough ones are every case in every precision with every setting. The others are every case in the law's principal
    precision and setting, and the first case in the other precisions and with the other settings.
    """
    checks = []
    for i, case in enumerate(cases):
        first = i == 0
        if (law.cases == "alone" and not first) or (law.cases == "first" and not first and not thorough):
            continue
        if thorough:
            pairs = list(itertools.product(law.dtypes, law.settings))
            pairs += [(law.dtypes[0], setting) for setting in law.rare if first]
        else:
            pairs = [(law.dtypes[0], law.settings[0])]
            if first:
                pairs += [(dtype, law.settings[0]) for dtype in law.dtypes[1:]]
                pairs += [(law.dtypes[0], setting) for setting in law.settings[1 : law.tried]]
        elsewhere = thorough or law.elsewhere == "every" or (law.elsewhere == "first" and first)
        checks += [Check(law, case, dtype, setting, elsewhere) for dtype, setting in pairs]
    return checks


def _find(law: Law, subject: str, mixer: Mixer, setting: Mapping[str, Any], elsewhere: bool = True) -> Finding:
    dtype = dtype_of(mixer)
    how = ", ".join([str(dtype).removeprefix("torch."), *(f"{key}={value}" for key, value in setting.items())])
    began = time.process_time()
    broken, note = None, law.exempts(mixer)
    if note is None:
        try:
            with conditions(law, dtype, elsewhere):
                note = law.check(mixer, **setting)
        except LawBroken as error:
            broken = str(error)
        except Exception as error:
            broken = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Finding(law, subject, how, broken, note, time.process_time() - began)


def examine(
    mixer: Mixer,
    *,
    laws: Sequence[str | int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Finding]:
    """What every law finds of a built mixer, in every precision and with every setting.

    The mixer stays as it is: laws are checked of copies, their parameters moved off their inits by random numbers.

    Args:
        mixer: of any width.
        laws: names or numbers; all by default.
        dtypes: precisions, of those of each law; all of them by default.
        device: that of the mixer by default.

    Raises:
        UsageError: an unknown law.
    """
    chosen = named(laws)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        kept = off_inits(copy.deepcopy(mixer).cpu().double().train()).float()
    device = device_of(mixer) if device is None else device
    subject = to_text(make_word(mixer.name, mixer.config.changed())) if mixer.name in mixers else mixer.name
    for law in chosen:
        for dtype in law.dtypes:
            if dtypes is None or dtype in dtypes:
                for setting in law.settings:
                    yield _find(law, subject, copy.deepcopy(kept).to(device, dtype), setting)


def check(
    mixer: Mixer,
    *,
    laws: Sequence[str | int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | str | None = None,
) -> list[Finding]:
    """What every law finds of a built mixer; arguments as of `examine`.

    Raises:
        LawBroken: the first law that does not hold, in one line.
        UsageError: an unknown law.
    """
    findings = []
    for finding in examine(mixer, laws=laws, dtypes=dtypes, device=device):
        if finding.broken:
            raise LawBroken(str(finding))
        findings.append(finding)
    return findings


def quick(mixer: Any, n: int = 70) -> list[str]:
    """The names of the laws that a copy of a built mixer passes, its parameters moved off their inits.

    Takes a second or so: checked before anything is measured.

    Args:
        mixer: of any width, on any device, in float32 or float64.
        n: steps; beyond the chunks of most forms. Where rounding grows over the steps, as it may in a large
            nonlinear recurrence, the tolerance is 32 times `rounding`.

    Raises:
        LawBroken: what does not hold.
    """
    names = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        mixer = off_inits(copy.deepcopy(mixer))
    try:
        if mixer.causal:
            names.append("chunk consistency")
            chunk_consistency(mixer, n, max(TOLERANCE[dtype_of(mixer)], 32 * rounding(mixer, n)))
        names.append("causality")
        causality(mixer, n)
    except LawBroken as broken:
        raise LawBroken(f"{names[-1]}: {broken}") from None
    return names


class Verdict(NamedTuple):
    """What came of a law for all cases of a word."""

    word: str
    law: Law
    findings: list[Finding]

    @property
    def broken(self) -> list[Finding]:
        """Where it does not hold."""
        return [finding for finding in self.findings if finding.broken]

    @property
    def checked(self) -> list[Finding]:
        """Where it binds the mixer."""
        return [finding for finding in self.findings if finding.note is None or finding.broken]

    @property
    def seconds(self) -> float:
        """Processor seconds."""
        return sum(finding.seconds for finding in self.findings)

    def line(self, times: bool = False) -> str:
        """Number, name and what came of it."""
        n, notes = len(self.checked), sorted({finding.note for finding in self.findings if finding.note})
        if self.broken:
            first, more = self.broken[0], len(self.broken) - 1
            told = f"BROKEN: {first.subject}, {first.how}: {first.broken}" + (f" (and {more} more)" if more else "")
        elif not self.findings:
            told = "not checked of these options"
        elif not n:
            told = f"not checked: {notes[0]}"
        else:
            told = f"holds, {n} check{'' if n == 1 else 's'}" + (f" ({'; '.join(notes)})" if notes else "")
        seconds = f"{self.seconds:7.2f} s  " if times else ""
        return f"{self.law.number:>3}  {self.law.name:<30}{seconds}{told}"

    def data(self) -> dict[str, Any]:
        """The same for a machine."""
        return {
            "word": self.word,
            "number": self.law.number,
            "law": self.law.name,
            "holds": not self.broken,
            "checks": len(self.checked),
            "broken": [str(finding) for finding in self.broken],
            "notes": sorted({finding.note for finding in self.findings if finding.note}),
            "seconds": round(self.seconds, 3),
        }


def cases_of_word(word: str, device: str = "cpu") -> list[Case]:
    """All law cases of a mixer by its name; of a word with options, those options.

    Raises:
        UsageError: an unknown word, options that do not fit, or a device that is not there.
    """
    try:
        torch.empty(1, dtype=torch.float64, device=device)  # MPS has none, and the laws compare with it
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UsageError(f"device={device} cannot be used here: {reason}.") from None
    if word.strip() in mixers:
        return cases_of(mixers[word.strip()], device)
    config = mixer_config(word)
    case = Case(mixer_of(config), config.changed(), device=device)
    case.build()
    return [case]


def verdicts(
    words: Sequence[str], *, laws: Sequence[str | int] | None = None, device: str = "cpu", thorough: bool = False
) -> Iterator[Verdict]:
    """What every law finds of words, one after the other.

    Args:
        words: names of mixers, each with all its law cases, or words with options.
        laws: names or numbers; all by default.
        device: "cpu", "cuda" or another of torch's.
        thorough: as of `plan`.

    Raises:
        UsageError: an unknown word, law or device, or options that do not fit; before anything is checked.
    """
    chosen, cases = named(laws), [cases_of_word(word, device) for word in words]
    return (
        Verdict(word, law, [check.find() for check in plan(law, own, thorough=thorough)])
        for word, own in zip(words, cases, strict=True)
        for law in chosen
    )


def lines(found: Iterator[Verdict], *, times: bool = False) -> Iterator[tuple[str, bool]]:
    """A line for every law below one for its word, a last one for each word, and whether the law holds."""
    for word, group in itertools.groupby(found, key=lambda verdict: verdict.word):
        yield word, True
        said = []
        for verdict in group:
            said.append(verdict)
            yield verdict.line(times), not verdict.broken
        broken = [verdict.law.name for verdict in said if verdict.broken]
        told = f"{len(broken)} of {len(said)} laws are broken: {', '.join(broken)}" if broken else "every law holds"
        seconds = f", in {sum(verdict.seconds for verdict in said):.1f} processor seconds" if times else ""
        yield f"{word}: {told}{seconds}.", True


__all__ = ["LAWS", "Case", "Check", "Finding", "Verdict", "cases_of", "check", "examine", "plan", "quick", "verdicts"]
