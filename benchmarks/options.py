"""Types of the options of benchmarks: what `zoo bench` parses from text, and how it refuses what is not allowed.

A benchmark's `Config` is a `BenchmarkOptions` of these. Each field becomes an option of the command of the same name
(with - for _), with its default, and its `description` as the help. Python code may give values in place of text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.protocol import MIN_WIDTH
from zoo.training.recipes import parse_overrides
from zoo.training.train_options import TrainConfig

MOST_WIDTH, MOST_TOKENS, MOST_RUNS, MOST_SEEDS = 2**16, 2**30, 10**6, 1000
MOST_SECONDS = 1e6
"""What options take at most: far beyond any use, and within what the machine's numbers hold."""


def _flag(info: ValidationInfo) -> str:
    """What a field is called on the command line."""
    return f"--{(info.field_name or '').replace('_', '-')}"


def whole_numbers(value: Any, info: ValidationInfo, *, most: int = MOST_TOKENS) -> tuple[int, ...]:
    """Whole numbers from 1, rising, each once; text has commas, and K and M stand for 1024 and 1024 x 1024."""
    found = value
    if isinstance(value, str):
        units = {"K": 2**10, "M": 2**20}
        try:
            found = [
                int(part.rstrip("KMkm")) * units.get(part[-1:].upper(), 1) for part in value.replace(" ", "").split(",")
            ]
        except ValueError:
            raise UsageError(
                f"{_flag(info)} {value!r:.60} is not allowed: give whole numbers by commas, such as 1K,4K,1M."
            ) from None
    if not isinstance(found, Sequence) or not all(type(n) is int for n in found):
        raise UsageError(f"{_flag(info)} {value!r:.60} is not allowed: give whole numbers.")
    if max(found, default=0) > most:
        raise UsageError(f"{_flag(info)} {value!r:.60} is not allowed: it should be at most {most:,}.")
    if not found or min(found) < 1:
        raise UsageError(f"{_flag(info)} {','.join(map(str, found))!r} is not allowed: give whole numbers from 1.")
    return tuple(sorted(set(found)))


def _fractions(value: Any, info: ValidationInfo) -> tuple[float, ...]:
    """Numbers, in text by commas."""
    try:
        found = tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 <= number < math.inf for number in found):
        raise UsageError(f"{_flag(info)} {value!r:.60} is not allowed: give numbers by commas, none below 0.")
    return found


def _above_zero(most: float) -> Callable[[Any, ValidationInfo], Any]:
    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int | float) and not 0 < value <= most:
            raise UsageError(f"{_flag(info)} {value:g} is not allowed: it should be above 0 and at most {most:,.0f}.")
        return value

    return check


def pairs(value: Any) -> dict[str, Any]:
    """`["KEY=VALUE"]` as a mapping."""
    return dict(value) if isinstance(value, Mapping) else parse_overrides(value)


def training_options(value: Any) -> dict[str, Any]:
    """`["lr=1e-3"]` as keys of an experiment, without those that the benchmark sets."""
    if isinstance(value, Mapping):
        return dict(value)
    found = {f"train.{key}": value for key, value in parse_overrides(value).items()}
    for key in ("device", "precision", "time_budget", "threads", "seed"):
        if f"train.{key}" in found:
            raise UsageError(f"--train {key}=... is not allowed: that is what options of zoo bench are for.")
    TrainConfig(**{key.removeprefix("train."): value for key, value in found.items()})
    return found


Lengths = Annotated[tuple[int, ...], BeforeValidator(whole_numbers)]
"""Numbers of tokens: `256,1K,4K`."""
Widths = Annotated[tuple[int, ...], BeforeValidator(functools.partial(whole_numbers, most=MOST_WIDTH))]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_fractions)]
"""Numbers from 0: `1e-3,3e-3`."""
Share = Annotated[float, BeforeValidator(_above_zero(1))]
Seconds = Annotated[float, BeforeValidator(_above_zero(MOST_SECONDS))]
Runs = Annotated[int, BeforeValidator(_above_zero(MOST_RUNS))]
Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
"""Of tokens or rows."""
Width = Annotated[int, Field(ge=MIN_WIDTH, le=MOST_WIDTH)]
Seeds = Annotated[int, Field(ge=1, le=MOST_SEEDS)]
Pairs = Annotated[dict[str, Any], BeforeValidator(pairs)]
"""`KEY=VALUE`, as often as wanted."""
Training = Annotated[dict[str, Any], BeforeValidator(training_options)]
"""Options of a training, `KEY=VALUE`, as keys of an experiment."""


def option(default: Any, help: str, *, least: int | None = None, most: int | None = None) -> Any:
    """A field of a `Config`: its default, which may be text that its type reads, its help, and its bounds."""
    return Field(default, description=help, ge=least, le=most)


def _unread(kind: Any) -> str | None:
    """The name of a type that no option of the command can have, or None."""
    parts = [part for part in get_args(kind) if part not in (Ellipsis, NoneType)]
    if get_origin(kind) in (Union, UnionType) and len(parts) == 1:
        return _unread(parts[0])
    if get_origin(kind) is tuple and all(part in (int, float, str) for part in parts):
        return None
    if kind in (bool, int, float, str) or (get_origin(kind) or kind) is dict:
        return None
    return getattr(kind, "__name__", None) if isinstance(kind, type) and not parts else str(kind)


SHARED = frozenset(
    ("words", "device", "precision", "threads", "no_peers", "imports", "out", "pages", "missing", "as_json")
)
"""Options of `zoo bench` itself, by the names of the parameters of `zoo.benchmarks.command.shared`."""


class BenchmarkOptions(Options):
    """The options of a benchmark: `budget`, which every one has, and its own. Where it has `repeats`, that is the
    number of runs of a cell."""

    model_config = ConfigDict(validate_default=True)
    _most: ClassVar[int] = MOST_TOKENS

    budget: Seconds = option(10.0, "Seconds of a cell.")

    @classmethod
    def wrong(cls) -> str | None:
        """What is wrong with an option that the command is made from, in a few words, or None."""
        for name, field in cls.model_fields.items():
            if field.is_required():
                return f"its option {name} has no default"
            if (kind := _unread(field.annotation)) is not None:
                known = "bool, int, float, str, a tuple of numbers or texts, or dict"
                return f"its option {name} is of type {kind}, which the command cannot read: use {known}"
        try:
            cls()
        except UsageError as error:
            return f"a default does not fit: {str(error).partition(': ')[2].rstrip('.')}"
        return None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name in SHARED & cls.model_fields.keys():
            raise UsageError(f"an option of a benchmark cannot be called {name!r}, as one of all benchmarks is")
