"""Where the first weights of a training come from: the options `init` of an experiment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from zoo.core.errors import UsageError, closest, quoted
from zoo.core.options import Options
from zoo.core.readers import check_path


class Init(Options, label="init"):
    """The first weights of a training. `init=runs/x` is short for `init.source=runs/x`.

    Names of weights are those of `model.state_dict()`, such as `backbone.steps.0.mixers.0.out_proj.weight`. Patterns
    are shell patterns: `*` stands for any text, dots included.

    Attributes:
        source: a run folder, one of its checkpoints, a folder of `zoo.save`, or the folder of a published checkpoint.
            Of a run with `train.ema` the running average is taken. None for a model that was given as an object.
        which: checkpoint of a run: "best" by validation, "last", or the name of one, such as "step_300".
        only: patterns of the weights to take, by default all; the others start as in any training.
        skip: patterns of weights not to take.
        resize_vocab: give the model the vocabulary that the task needs, if it is larger than the source's. The rows of
            the source's tokens are kept; those of the others start as in any training.
        on_mismatch: what to do with a weight to be taken that has another shape, belongs to another word or stands in
            one of the two models only: "refuse", or "fresh", which leaves it out.
        digest: digest of the source's weights, which is filled in. A source with other weights is refused.
    """

    source: str | None = None
    which: str = "best"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    resize_vocab: bool = False
    on_mismatch: Literal["refuse", "fresh"] = "refuse"
    digest: str | None = None

    @field_validator("only", "skip", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("source", mode="after")
    @classmethod
    def _is_path(cls, value: str | None) -> str | None:
        if value is not None:
            check_path(value, "init.source")
        return value

    def takes(self, name: str) -> bool:
        """Whether a weight of this name is to be taken."""
        wanted = any(fnmatchcase(name, pattern) for pattern in self.only)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.skip)

    def check_patterns(self, names: list[str]) -> None:
        """Refuse a pattern that matches none of the names of weights.

        Raises:
            UsageError: it names the pattern and what the weights are called.
        """
        for option in ("only", "skip"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(name, pattern) for name in names):
                    places = list(dict.fromkeys(re.sub(r"(\.mixers\.\d+)\..*", r"\1.*", name) for name in names))
                    known = ", ".join(places[:8]) + (", ..." if len(places) > 8 else "")
                    told = f"init.{option}={quoted(pattern)} matches no weight.{closest(pattern, [*names, *places])}"
                    raise UsageError(f"{told} There are: {known}.")


def as_init(value: Any) -> Any:
    """The section `init` of an experiment, given as a path, as the mapping that it stands for."""
    if isinstance(value, str | Path):
        return {"source": str(value)}
    return dict(value) if isinstance(value, Mapping) else value


__all__ = ["Init", "as_init"]
