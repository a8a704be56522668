"""What `zoo bench` writes, and what is read back from it: one JSON object a line, a record.

`zoo bench X --out FOLDER` keeps `FOLDER/X.jsonl`, whose every line is one cell of a benchmark: one subject in one
setting. `zoo bench` writes all keys; of a file from elsewhere only the first three are needed:

    benchmark   such as "throughput"
    name        the subject: a word or a pattern ("mamba2", "short_conv mha"), or a peer ("torch.nn.LSTM")
    setting     what the figures belong to; with the benchmark, the name, precision, threads and device it is unique in
                a file
    same        further names that stand for the same layer at this width: one row is theirs too
    layer       the word or pattern with what `zoo bench` settled in it, such as "mha(n_heads=4)"; of trainings, that of
                the whole model; "" of a peer
    peer        whether it is a public layer measured beside the zoo's
    status      "ok", or why there are no figures: "over budget" | "no memory" | "not offered" | "breaks a law" |
                "failed" | "not learned" | "stopped by the clock" (a training that had not learned when its steps, or
                its budget of seconds, ended)
    why         one line that explains any other status, else ""
    figures     {name of figure: {"value": median, "low": first quartile, "high": third quartile, "n": runs, "how": H}};
                H is the source of the value: "measured", "formula" (computed by the layer, not measured) or
                "random cache" (measured from a key-value cache filled with random numbers, not by a prefill)
    slices      {name of slice: {value as text: {name of figure: number}}}, else {}
    chance      the accuracy on 2,048 test rows of always giving the answer that is most frequent in validation rows;
                null where nothing is answered
    conditions  other settings: budget in seconds, repeats, test rows, seeds, learning rates
    laws        the checks that the subject passed in the same process before anything was measured
    n_parameters, precision ("float32" | "bfloat16"), threads, device ("cpu" or the GPU's name)
    backends    {op: [forms that ran]}, as in a run's `result.json`
    machine, versions, commit    as in a run's `result.json`
    date        when, in ISO 8601, UTC

The settings and figures of each benchmark are described in its own file, such as `zoo/benchmarks/throughput.py`.
Numbers are plain, sizes in bytes, rates in tokens a second.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from zoo.core.errors import UsageError
from zoo.core.readers import read_text
from zoo.report.layers import joined, same_layers
from zoo.report.units import number, printable

OK = "ok"
MIXER = "{mixer}"
"""Stands for what is measured in the pattern of a whole model."""


class Figure(TypedDict):
    """The median of several values, their quartiles and their number; `how` where it was not simply measured."""

    value: float
    low: NotRequired[float]
    high: NotRequired[float]
    n: NotRequired[int]
    how: NotRequired[str]


@dataclass(frozen=True)
class Record:
    """One cell of a benchmark; the module's docstring says what each field holds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    benchmark: str
    name: str
    setting: dict[str, Any]
    same: list[str] = field(default_factory=list)
    layer: str = ""
    peer: bool = False
    status: str = OK
    why: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)
    slices: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    chance: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    laws: list[str] = field(default_factory=list)
    n_parameters: int | None = None
    precision: str = "float32"
    threads: int = 0
    device: str = "cpu"
    backends: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def key(self) -> Hashable:
        """What a later measurement of the same thing has in common with it."""
        return self.key_of(self.name)

    def key_of(self, name: Hashable) -> Hashable:
        """The key of a record that is like it under another name."""
        return self.benchmark, name, json.dumps(self.setting, sort_keys=True), self.place

    @property
    def place(self) -> tuple[str, int, str]:
        """How and where it was measured, beside the setting: precision, threads and device."""
        return self.precision, self.threads, self.device

    @property
    def names(self) -> list[str]:
        """All names of the layer, each printable on one line."""
        return [printable(name) for name in (self.name, *self.same)]

    @property
    def title(self) -> str:
        """All names of the layer as one."""
        return joined(self.names)

    @property
    def label(self) -> str:
        """The title of its row in a table, which says where it is a peer."""
        return self.title + (" (peer)" if self.peer else "")

    @property
    def pattern(self) -> str:
        """The words of what was built."""
        layers = str(self.setting.get("layers") or "")
        return self.layer or (layers if MIXER not in layers else "") or self.name

    def value(self, figure: str, which: str = "value") -> float | None:
        """A figure's median, or its quartile `low` or `high`, or `n`; None where there is none, or none was learned."""
        found: Any = self.figures.get(figure, {}) if self.status == OK else {}
        return number(found.get(which))

    def how(self, figure: str) -> str:
        """The source of a figure that was not simply measured, else empty."""
        how = printable(self.figures[figure].get("how", "")) if figure in self.figures else ""
        return "" if how == "measured" else how

    def line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))


_ADAPTER = TypeAdapter(Record)


def figure(values: float | Sequence[float], how: str = "measured") -> Figure:
    """A figure from one value or from those of several runs."""
    values = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"value": statistics.median(values), "low": low, "high": high, "n": len(values), "how": how}


def read(path: str | Path) -> list[Record]:
    """The records of a file, in order.

    Raises:
        UsageError: a file that cannot be read, or a line that is no record.
    """
    found = []
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append(_ADAPTER.validate_json(line))
            except ValidationError:
                raise UsageError(f"{str(path)!r} is damaged at line {n}: expected what `zoo bench` writes.") from None
    return found


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """Records in the order of their first appearance; of two of the same key the later one.

    Old ones under a name that is now one of several of a new record's layer are left out.
    """
    new = list(new)
    renamed = {r.key_of(name) for r in new for name in r.same}
    return list({r.key: r for r in [*(r for r in old if r.key not in renamed), *new]}.values())


# ---- records of several files, to be compared


def load_records(paths: Sequence[str | Path]) -> list[Record]:
    """The records of all files; of two of the same subject in the same setting, the later one.

    Those of one layer under several names are one: its figures are the medians over them, from the lowest quartile to
    the highest.

    Raises:
        UsageError: a file that cannot be read, or holds a line that `zoo bench` does not write.
    """
    found = [r for path in paths for r in read(path)]
    return _by_layer(list({r.key_of(r.title): r for r in found}.values()))


def _by_layer(found: Sequence[Record]) -> list[Record]:
    """Records of one layer in one setting as one, in the place of the first."""
    patterns: dict[int, dict[str, None]] = {}
    for r in found:
        if not r.peer and isinstance(width := r.setting.get("width"), int):
            patterns.setdefault(width, {})[r.pattern] = None
    layers: dict[Hashable, Hashable] = {
        (width, text): (width, i)
        for width, texts in patterns.items()
        for i, group in enumerate(same_layers(texts, width))
        for text in group
    }
    groups: dict[Hashable, list[Record]] = {}
    for r in found:
        width = r.setting.get("width")
        own = (width, r.pattern) if isinstance(width, int) and not r.peer else None
        subject = layers.get(own, r.title)
        groups.setdefault(replace(r, setting=own_setting(r)).key_of(subject), []).append(r)
    return [_pooled(same) if len(same) > 1 else same[0] for same in groups.values()]


def own_setting(r: Record) -> dict[str, Any]:
    """The setting without a pattern of the model in which the subject itself stands, as older records have it."""
    return {k: v for k, v in r.setting.items() if k != "layers" or MIXER in str(v)}


def _pooled(same: Sequence[Record]) -> Record:
    """Records of one layer as one."""
    names = list(dict.fromkeys(name for r in same for name in r.names))
    known = [r for r in same if r.status == OK] or list(same)
    first, *_ = known
    pooled: dict[str, Figure] = {}
    for key, given in first.figures.items():
        values = {
            which: [v for r in known if (v := r.value(key, which)) is not None]
            for which in ("value", "low", "high", "n")
        }
        if all(values.values()):
            spread: Figure = {"value": statistics.median(values["value"]), "low": min(values["low"])}
            pooled[key] = {**given, **spread, "high": max(values["high"]), "n": int(sum(values["n"]))}
    return replace(first, name=names[0], same=names[1:], figures=pooled)
