"""What `zoo bench` measured, read back from its JSON lines."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from zoo.core.errors import UsageError
from zoo.report.layers import joined, same_layers
from zoo.report.runs import printable
from zoo.report.units import number

OK = "ok"
MIXER = "{mixer}"
"""Stands for the layer in the pattern of the model that it was trained in."""


@dataclass(frozen=True)
class Measurement:
    """One subject in one setting.

    Attributes:
        benchmark: such as "throughput".
        name: the layer, layers or peer with all its names, printable and on one line.
        setting: what the figures belong to: width, length, part.
        record: the whole line.
    """

    benchmark: str
    name: str
    setting: dict[str, Any]
    record: dict[str, Any]

    @property
    def status(self) -> str:
        """`ok`, or why there are no figures."""
        return str(self.record.get("status") or OK)

    @property
    def is_peer(self) -> bool:
        """Whether it is a public layer that was measured beside the zoo's."""
        return bool(self.record.get("peer"))

    @property
    def names(self) -> list[str]:
        """The names that the layer was measured under."""
        same = self.record.get("same")
        return [printable(name) for name in (self.record["name"], *(same if isinstance(same, list) else []))]

    @property
    def pattern(self) -> str:
        """The words of what was built."""
        layers = str(self.setting.get("layers") or "")
        return str(self.record.get("layer") or (layers if MIXER not in layers else "") or self.record["name"])

    @property
    def chance(self) -> float | None:
        """The accuracy of a constant answer, None where it is unknown."""
        return number(self.record.get("chance"))

    def figure(self, key: str, which: str = "value") -> float | None:
        """A figure's median, or its quartile `low` or `high`; None where it has none, or had not learned."""
        figure = self._entry(key) if self.status == OK else {}
        return number(figure.get(which))

    def how(self, key: str) -> str:
        """How a figure came about where it was not simply measured, else empty."""
        how = printable(self._entry(key).get("how") or "")
        return "" if how == "measured" else how

    def _entry(self, key: str) -> Mapping[str, Any]:
        figures = self.record.get("figures")
        entry = figures.get(key) if isinstance(figures, dict) else None
        return entry if isinstance(entry, dict) else {}


def load_measurements(paths: Sequence[str | Path]) -> list[Measurement]:
    """The measurements of all files; of two of the same subject in the same setting, the later one.

    Those of one layer under several names are one: its figures are the medians over them, from the lowest quartile to
    the highest.

    Raises:
        UsageError: a file that cannot be read, or holds a line that `zoo bench` does not write.
    """
    found: dict[str, Measurement] = {}
    for path in paths:
        for m in _read(Path(path)):
            place = [m.record.get(k) for k in ("precision", "threads", "device")]
            found[json.dumps([m.benchmark, m.name, m.setting, place], sort_keys=True, default=str)] = m
    return _merged(list(found.values()))


def _merged(found: Sequence[Measurement]) -> list[Measurement]:
    """Measurements of one layer in one setting as one, in the place of the first."""
    patterns: dict[int, dict[str, None]] = {}
    for m in found:
        if not m.is_peer and isinstance(width := m.setting.get("width"), int):
            patterns.setdefault(width, {})[m.pattern] = None
    layer: dict[Hashable, Hashable] = {
        (width, text): (width, i)
        for width, texts in patterns.items()
        for i, group in enumerate(same_layers(texts, width))
        for text in group
    }
    places: dict[Hashable, list[Measurement]] = {}
    for m in found:
        own = (m.setting.get("width"), m.pattern)
        subject = layer.get(own, m.name) if not m.is_peer else m.name
        setting = {k: v for k, v in m.setting.items() if k != "layers" or MIXER in str(v)}
        place = [m.record.get(k) for k in ("precision", "threads", "device")]
        key = json.dumps([m.benchmark, subject, setting, place], sort_keys=True, default=str)
        places.setdefault(key, []).append(m)
    return [_pooled(same) if len(same) > 1 else same[0] for same in places.values()]


def _pooled(same: Sequence[Measurement]) -> Measurement:
    """Measurements of one layer as one."""
    names = list(dict.fromkeys(name for m in same for name in m.names))
    known = [m for m in same if m.status == OK] or list(same)
    first, *_ = known
    given = first.record.get("figures")
    figures: dict[str, Any] = given if isinstance(given, dict) else {}
    pooled: dict[str, Any] = {}
    for key in figures:
        values = {
            which: [v for m in known if (v := m.figure(key, which)) is not None]
            for which in ("value", "low", "high", "n")
        }
        if all(values.values()):
            spread = {"low": min(values["low"]), "high": max(values["high"]), "n": sum(values["n"])}
            pooled[key] = {**figures[key], "value": median(values["value"]), **spread}
    record = {**first.record, "name": names[0], "same": names[1:], "figures": pooled}
    return replace(first, name=joined(names), record=record)


def _read(path: Path) -> list[Measurement]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}.") from None
    found = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not {"benchmark", "name", "setting"} <= record.keys():
            raise UsageError(f"{str(path)!r} is damaged at line {n}: expected what `zoo bench` writes.")
        setting = record["setting"] if isinstance(record["setting"], dict) else {}
        m = Measurement(printable(record["benchmark"]), "", setting, record)
        found.append(replace(m, name=joined(m.names)))
    return found
