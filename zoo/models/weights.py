"""What became of the weights of a model that were put into another one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Transfer(NamedTuple):
    """What became of the weights of a model that were put into another one. Names are those of its `state_dict`.

    Attributes:
        kept: weights with the values of the source.
        resized: weights with a row for every token id, of another number of rows: those of the source, then new ones.
        fresh: weights of the new model with new values.
        left: weights of the source that the new model does not have, or does not take.
    """

    kept: tuple[str, ...]
    resized: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"{len(self.kept)} weights kept"]
        for what, names in (("resized", self.resized), ("new", self.fresh), ("left out", self.left)):
            if names:
                told.append(f"{len(names)} {what} ({grouped(names)})")
        return ", ".join(told)


def grouped(names: Iterable[str], most: int = 6) -> str:
    """Names of weights in one line, those of one mixer as `backbone.steps.4.mixers.0.*`."""
    groups = list(dict.fromkeys(re.sub(r"(.*\.mixers\.\d+)\..*", r"\1.*", name) for name in names))
    return ", ".join(groups[:most]) + (f" and {len(groups) - most} more" if len(groups) > most else "")


__all__ = ["Transfer", "grouped"]
