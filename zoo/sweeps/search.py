"""How a sweep goes through its space: over a grid, by random draws, or with trials that are ended early."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from zoo.core import yaml_text
from zoo.core.errors import UsageError, quoted
from zoo.core.options import Options

_CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\)\s*)?", re.DOTALL)


class Search(Options, label="sweep.search"):
    """The search of a sweep, written `grid`, `random(20)` or `asha(n=20, grace=100)`.

    Attributes:
        name: grid runs every combination of the lists. random draws from the distributions as well, `n` times for each
            combination. asha does as random where there are distributions, else as grid, and ends trials early.
        n: number of draws.
        seed: seed of the draws.
        grace: of asha, steps before which no trial is ended; by default `train.eval_every`.
        reduction: of asha, at `grace`, `grace * reduction`, `grace * reduction ** 2` and so on steps a trial goes on if
            its validation figure is among the best 1 / `reduction` of those that came so far.
        by: of asha, keys; trials that differ in one of them are not measured against each other.
    """

    name: Literal["grid", "random", "asha"] = "grid"
    n: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    grace: int | None = Field(default=None, ge=1)
    reduction: float = Field(default=4.0, gt=1)
    by: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Any:
        """The search that a text, or a mapping with the key `name`, stands for.

        Raises:
            UsageError: no text of this kind, or a wrong option.
        """
        return super().of(cls.read(value))

    @staticmethod
    def read(value: Any) -> Any:
        """The options that a text stands for; a mapping as it is.

        Raises:
            UsageError: no text of this kind.
        """
        if isinstance(value, str):
            value = _read_call(value)
        if isinstance(value, Mapping) and isinstance(value.get("by"), list):
            value = {**value, "by": tuple(value["by"])}
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> Search:
        if self.name == "random" and self.n is None:
            raise UsageError("sweep.search: random needs the number of draws, such as random(20).")
        for option in ("grace", "reduction", "by"):
            if self.name != "asha" and option in self.model_fields_set:
                raise UsageError(f"sweep.search: {option} belongs to asha, not to {self.name}.")
        if self.name == "grid" and self.n is not None:
            raise UsageError("sweep.search: grid takes no number of draws; random(20) draws.")
        return self


def _read_call(text: str) -> dict[str, Any]:
    match = _CALL.fullmatch(text)
    if match is None:
        raise UsageError(f"search={quoted(text)} is not allowed: it should be grid, random(20) or asha(n=20).")
    options: dict[str, Any] = {"name": match[1]}
    for i, part in enumerate(re.split(r",(?![^\[]*\])", match[2]) if (match[2] or "").strip() else []):
        key, mark, value = part.rpartition("=")
        if not mark and i:
            raise UsageError(f"search={quoted(text)} is not allowed: write {part.strip()} as key=value.")
        options[key.strip() or "n"] = yaml_text.load(value, "search")
    return options


__all__ = ["Search"]
