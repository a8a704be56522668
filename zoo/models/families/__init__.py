"""Published architectures as presets: a name with a size is a set of model options."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable
from typing import Any

from tasks.registry import discover, unknown

Preset = Callable[[], dict[str, Any]]


class Families:
    """Presets by name, `family-size`; every file of this package enters its own with `families.add`."""

    def __init__(self) -> None:
        self._presets: dict[str, Preset] = {}

    def add(self, family: str, sizes: dict[str, dict[str, Any]]) -> None:
        """Enter `family-size` for every size, each with its model options."""
        for size, options in sizes.items():
            self._presets[f"{family}-{size}"] = functools.partial(dict, options)

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a shell pattern, sorted."""
        discover(__name__)
        return sorted(fnmatch.filter(self._presets, pattern))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> Preset:
        if name not in self:
            raise unknown("model", name, self.names())
        return self._presets[name]


families = Families()
