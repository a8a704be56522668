"""Checking mixers against the law book: which checks there are, and what each finds."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.core.errors import UsageError, raised_at
from zoo.laws import batches, costs, derivatives, openness, order, pieces, refusal, training  # noqa: F401 - they enter laws
from zoo.laws.book import LAWS, Law, conditions, named
from zoo.laws.cases import Case, subject_of
from zoo.laws.compare import TOLERANCE, LawBroken, device_of, dtype_of, off_inits, spelled
from zoo.laws.contract import contract
from zoo.laws.order import causality, chunk_consistency, rounding
from zoo.laws.stand_ins import StandIn, stand_in
from zoo.protocol import Mixer, Norm
from zoo.residual import Connection


def _told(error: Exception, cls: type[Mixer]) -> str:
    """An error in a few words, with the line of the file of a mixer class, or of what it stands for."""
    found = cls.of if issubclass(cls, StandIn) else cls
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    where = raised_at(error, Path(file).parent) if file else ""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return (text.removeprefix("UsageError: ") if isinstance(error, UsageError) else text) + where


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

    def find(self) -> Finding:
        """What comes of it."""
        try:
            mixer = self.case.build(self.dtype)
        except Exception as error:
            how, broken = str(self.dtype).removeprefix("torch."), f"it cannot be built: {_told(error, self.case.mixer)}"
            return Finding(self.law, str(self.case), how, broken)
        return _find(self.law, str(self.case), mixer, self.setting)


def plan(law: Law, cases: Sequence[Case], *, thorough: bool = False) -> list[Check]:
    """The checks of a law for the cases of a mixer.

    Thorough ones are every case in every precision: with every setting in the principal one, and in the others with the
    last, which also stands for all where it covers them.
    The rest are the first case in every precision, and every other case in the law's principal precision and setting
    where the law is checked of every case; all but the first case in the principal precision by fewer routes, where the
    law has a brief form.
    """
    checks = []
    brief = {**law.settings[0], "brief": True} if law.brief else law.settings[0]
    for i, case in enumerate(cases):
        first = i == 0
        if (law.cases == "alone" and not first) or (law.cases == "first" and not first and not thorough):
            continue
        if thorough:
            settings = law.settings + (law.rare if first else ())
            pairs = [(law.dtypes[0], setting) for setting in (settings[-1:] if law.covering else settings)]
            pairs += [(dtype, law.settings[-1]) for dtype in law.dtypes[1:]]
        else:
            pairs = [(law.dtypes[0], law.settings[0] if first else brief)]
            if first:
                pairs += [(dtype, brief) for dtype in law.dtypes[1:]]
                pairs += [(law.dtypes[0], setting) for setting in law.settings[1 : law.tried]]
        checks += [Check(law, case, dtype, setting) for dtype, setting in pairs]
    return checks


def _find(law: Law, subject: str, mixer: Mixer, setting: Mapping[str, Any]) -> Finding:
    dtype = dtype_of(mixer)
    how = ", ".join([str(dtype).removeprefix("torch."), *(f"{key}={value}" for key, value in setting.items())])
    began = time.process_time()
    broken, note = None, law.exempts(mixer)
    if note is None:
        try:
            with conditions(law, dtype):
                note = law.check(mixer, **setting)
        except LawBroken as error:
            broken = str(error)
        except Exception as error:
            broken = _told(error, type(mixer))
    return Finding(law, subject, how, broken, note, time.process_time() - began)


def examine(
    mixer: Mixer | Norm | Connection,
    *,
    laws: Sequence[str | int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Finding]:
    """What every law finds of a built mixer, in every precision and with every setting.

    The mixer stays as it is: laws are checked of copies, their parameters moved off their inits by random numbers. The
    contract comes first, and where it is broken nothing else is checked.

    Args:
        mixer: of any width; or a norm, or the residual operator of a step.
        laws: names or numbers; all by default.
        dtypes: precisions, of those of each law; all of them by default.
        device: that of the mixer by default.

    Raises:
        UsageError: an unknown law.
    """
    if isinstance(mixer, Norm | Connection):
        mixer = stand_in(mixer)
    chosen = binding(named(laws), type(mixer))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        kept = spelled(off_inits(copy.deepcopy(mixer).cpu().double().train()).float())
    device = device_of(mixer) if device is None else device
    subject = subject_of(type(mixer), mixer.config.changed())
    first = LAWS[contract.__name__]
    for law in chosen if first in chosen else [first, *chosen]:
        for dtype in law.dtypes:
            if dtypes is None or dtype in dtypes:
                for setting in law.settings:
                    finding = _find(law, subject, copy.deepcopy(kept).to(device, dtype), setting)
                    if law in chosen or finding.broken:
                        yield finding
                    if law is first and finding.broken:
                        return


def binding(laws: Sequence[Law], cls: type[Mixer]) -> list[Law]:
    """Those laws that a class of mixers is checked for.

    Raises:
        UsageError: none of the laws is for what it stands for.
    """
    if not issubclass(cls, StandIn):
        return list(laws)
    found = [law for law in laws if law.name in cls.laws]
    if not found:
        raise UsageError(f"{cls.name} is no mixer; its laws are {', '.join(cls.laws)}.")
    return found


def check(
    mixer: Mixer | Norm | Connection,
    *,
    laws: Sequence[str | int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | str | None = None,
) -> list[Finding]:
    """What every law finds of a built mixer, norm or residual operator; arguments as of `examine`.

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
        mixer = spelled(off_inits(copy.deepcopy(mixer)))
    try:
        if isinstance(mixer, Mixer):
            _require_contract(mixer)
        if mixer.causal:
            names.append("chunk consistency")
            chunk_consistency(mixer, n, max(TOLERANCE[dtype_of(mixer)], 32 * rounding(mixer, n)))
        names.append("causality")
        causality(mixer, n)
    except LawBroken as broken:
        raise LawBroken(f"{names[-1] if names else 'contract'}: {broken}") from None
    return names


def _require_contract(mixer: Mixer) -> None:
    try:
        contract(mixer)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise LawBroken(_told(error, type(mixer))) from error
