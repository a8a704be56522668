"""Verdicts on words: what came of each law for all law cases of a word, a line for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from zoo.laws.book import LAWS, Law, named
from zoo.laws.cases import Case, cases_of_word
from zoo.laws.contract import contract
from zoo.laws.judge import Finding, binding, plan


class Verdict(NamedTuple):
    """What came of a law for the cases of a word.

    Attributes:
        word: as given.
        law: the law.
        findings: of each check.
        unchecked: how many cases of the word are checked for this law only where all is.
    """

    word: str
    law: Law
    findings: list[Finding]
    unchecked: int = 0

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

    @property
    def reason(self) -> str | None:
        """What does not hold, where it first does not."""
        return self.broken[0].broken if self.broken else None

    def line(self, times: bool = False, same_as: int | None = None) -> str:
        """Number, name and what came of it; of a law that is broken for the reason of another, that law's number."""
        n, notes = len(self.checked), sorted({finding.note for finding in self.findings if finding.note})
        if same_as is not None:
            told = f"BROKEN, for the same reason as law {same_as}"
        elif self.broken:
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
            "unchecked_cases": self.unchecked,
            "broken": [str(finding) for finding in self.broken],
            "notes": sorted({finding.note for finding in self.findings if finding.note}),
            "seconds": round(self.seconds, 3),
        }


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
    binding_laws = [binding(chosen, own[0].mixer) for own in cases]
    return itertools.chain.from_iterable(map(partial(_verdicts, thorough=thorough), words, cases, binding_laws))


def _verdicts(word: str, cases: list[Case], laws: list[Law], *, thorough: bool) -> Iterator[Verdict]:
    """The verdicts on one word; that on the contract comes first, alone where it is broken."""
    first = LAWS[contract.__name__]
    form = _verdict(word, cases, first, thorough=thorough)
    if first in laws or form.broken:
        yield form
    if not form.broken:
        for law in laws:
            if law is not first:
                yield _verdict(word, cases, law, thorough=thorough)


def _verdict(word: str, cases: list[Case], law: Law, *, thorough: bool) -> Verdict:
    checks = plan(law, cases, thorough=thorough)
    unchecked = 0 if law.cases == "alone" else sum(case not in [check.case for check in checks] for case in cases)
    return Verdict(word, law, [check.find() for check in checks], unchecked)


def lines(found: Iterator[Verdict], *, times: bool = False) -> Iterator[tuple[str, bool]]:
    """A line for every law below one for its word, a last one for each word, and whether the law holds.

    The last line tells of cases that some laws were not checked of.
    """
    for word, group in itertools.groupby(found, key=lambda verdict: verdict.word):
        yield word, True
        said: list[Verdict] = []
        for verdict in group:
            same = next(
                (v.law.number for v in said if v.broken and verdict.broken[:1] and v.reason == verdict.reason), None
            )
            said.append(verdict)
            yield verdict.line(times, same), not verdict.broken
        broken = [verdict.law.name for verdict in said if verdict.broken]
        told = f"{len(broken)} of {len(said)} laws are broken: {', '.join(broken)}" if broken else "every law holds"
        if broken == [contract.__name__]:
            told = "the contract is broken, and no other law was checked"
        more = f", in {sum(verdict.seconds for verdict in said):.1f} processor seconds" if times else ""
        if partly := [verdict.unchecked for verdict in said if verdict.unchecked]:
            cases = f"the first of {max(partly) + 1} law cases only; --all checks every case in every precision"
            more += f". {len(partly)} of {len(said)} laws were checked of {cases}"
        yield f"{word}: {told}{more}.", True
