"""The space of a sweep: which options take which values.

A list is a list of values to go through, unless the option itself takes a list; then it is a list of lists. A mapping
with the name of a distribution is one to draw from: `{log_uniform: [1e-4, 1e-2]}`. Any other value is the same in every
trial.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_args, get_origin

import numpy as np
from pydantic import BaseModel

from zoo.core.errors import UsageError, quoted
from zoo.core.options import Options
from zoo.models.config import ModelConfig
from zoo.objectives.base import objectives
from zoo.tasks.protocol import registry as tasks
from zoo.training.train_options import TrainConfig

SEED, VARIANT = "train.seed", "variant"
DISTRIBUTIONS = ("uniform", "log_uniform", "int", "choice")
MOST_VALUES = 100_000
NEVER_SWEPT = ("name", "out")


class Distribution(NamedTuple):
    """What an option's values are drawn from.

    Attributes:
        kind: one of `DISTRIBUTIONS`.
        values: lowest and highest value, both included; of `choice` the values.
    """

    kind: str
    values: list[Any]

    def draw(self, key: str, seed: int, index: int) -> Any:
        """The value of a key in draw number `index`; no other key or draw changes it."""
        generator = np.random.default_rng([seed, index, zlib.crc32(key.encode())])
        if self.kind == "choice":
            return self.values[int(generator.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "int":
            return int(generator.integers(low, high, endpoint=True))
        share = float(generator.random())
        if self.kind == "uniform":
            found = low + (high - low) * share
        else:
            found = math.exp(math.log(low) + (math.log(high) - math.log(low)) * share)
        return min(max(float(f"{found:.4g}"), low), high)  # as it is written, so that it can be typed again


class Space(NamedTuple):
    """The options of a sweep.

    Attributes:
        axes: keys with the values to go through, in their order.
        drawn: keys with what is drawn from.
        fixed: keys with one value.
    """

    axes: dict[str, list[Any]]
    drawn: dict[str, Distribution]
    fixed: dict[str, Any]


def read_space(given: Mapping[str, Any], base: Mapping[str, Any]) -> Space:
    """The space that keys and their values stand for.

    Args:
        given: dotted keys of an experiment, each with a value, a list or a distribution.
        base: the experiment, which says what task and objective the keys belong to.

    Raises:
        UsageError: a key that cannot differ between trials, an empty list, a value given twice, or a distribution that
            is none.
    """
    space = Space({}, {}, {})
    for key, value in given.items():
        if key in NEVER_SWEPT:
            told = "each trial has a folder of its own below that of the sweep, which out sets"
            raise UsageError(f"{key}={quoted(value)} is not allowed in a sweep: {told}.")
        value = plain(value)
        if isinstance(value, list) and _depth_of(value) > takes_lists(key, base):
            space.axes[key] = _distinct(key, value)
        elif isinstance(value, dict) and len(value) == 1 and next(iter(value)) in DISTRIBUTIONS:
            ((kind, values),) = value.items()
            space.drawn[key] = _distribution(key, kind, values)
        else:
            space.fixed[key] = value
    return space


def plain(value: Any) -> Any:
    """Python's ranges, tuples and arrays as lists, and numpy's numbers as Python's."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Options):
        found = []
        for each in value:
            found.append(plain(each))
            if len(found) > MOST_VALUES:
                raise UsageError(f"A list of a sweep holds more than {MOST_VALUES:,} values.")
        return found
    return value


def takes_lists(key: str, base: Mapping[str, Any]) -> int:
    """How deep a list the option of a dotted key takes; 0 for an option that takes none, and for an unknown one."""
    section, *path = key.split(".")
    owners: dict[str, type[BaseModel]] = {"train": TrainConfig, "model": ModelConfig}
    owner = owners.get(section)
    for name, registry in (("task", tasks), ("objective", objectives)):
        if section == name:
            given = base.get(section, "next_token")
            named = given.get("name", "next_token") if isinstance(given, Mapping) else given
            owner = registry[named].Config if named in registry else None
    annotation: Any = None
    for part in path:
        if owner is None or part not in owner.model_fields:
            return 0
        annotation = owner.model_fields[part].annotation
        inner = [annotation, *get_args(annotation)]
        owner = next((c for c in inner if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return _depth_taken(annotation)


def _depth_taken(annotation: Any) -> int:
    inner = max((_depth_taken(part) for part in get_args(annotation)), default=0)
    return inner + (get_origin(annotation) in (list, tuple) or annotation in (list, tuple))


def _depth_of(value: Any) -> int:
    return 1 + max(map(_depth_of, value), default=0) if isinstance(value, list) else 0


def _distinct(key: str, values: list[Any]) -> list[Any]:
    if not values:
        raise UsageError(f"{key}=[] is not allowed: it should hold at least one value.")
    for i, value in enumerate(values):
        if value in values[:i] and type(value) is type(values[values.index(value)]):
            raise UsageError(f"{key}: {quoted(value)} is given twice.")
    return values


def _distribution(key: str, kind: str, values: Any) -> Distribution:
    where = f"{key}={{{kind}: {quoted(values, 60)}}} is not allowed: "
    if kind == "choice":
        if not isinstance(values, list) or not values:
            raise UsageError(f"{where}choice takes a list of values.")
        return Distribution(kind, values)
    whole = kind == "int"
    numbers = isinstance(values, list) and all(
        isinstance(v, int if whole else int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not numbers or len(values) != 2 or not values[0] < values[1]:
        raise UsageError(f"{where}{kind} takes the lowest and the highest {'whole ' * whole}number.")
    if kind == "log_uniform" and values[0] <= 0:
        raise UsageError(f"{where}the lowest number of log_uniform is above 0.")
    return Distribution(kind, values)


__all__ = ["SEED", "VARIANT", "Distribution", "Space", "plain", "read_space", "takes_lists"]
