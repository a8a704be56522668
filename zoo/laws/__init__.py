"""The law book: what every mixer is checked for (`zoo/protocol.py` lists the laws), as functions of a built mixer.

zoo.laws.check(zoo.create_mixer("fading_memory", d_model=32))       # raises LawBroken, or returns what was found
zoo laws fading_memory                                              # the same in the shell, a line for every law
"""

from zoo.laws.book import LAWS, Law, poisoned_memory
from zoo.laws.cases import Case, cases_of
from zoo.laws.compare import (
    TOLERANCE,
    LawBroken,
    assert_close,
    assert_close_gradients,
    error,
    noise,
    off_inits,
    spans,
    spelled,
)
from zoo.laws.judge import Check, Finding, check, examine, plan, quick
from zoo.laws.models import refusal_of_a_model, refusal_of_vectors
from zoo.laws.rows import batch_mates
from zoo.laws.verdicts import Verdict, verdicts

__all__ = [
    "LAWS",
    "TOLERANCE",
    "Case",
    "Check",
    "Finding",
    "Law",
    "LawBroken",
    "Verdict",
    "assert_close",
    "assert_close_gradients",
    "batch_mates",
    "cases_of",
    "check",
    "error",
    "examine",
    "noise",
    "off_inits",
    "plan",
    "poisoned_memory",
    "quick",
    "refusal_of_a_model",
    "refusal_of_vectors",
    "spans",
    "spelled",
    "verdicts",
]
