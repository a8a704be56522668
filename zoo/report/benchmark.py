"""The contract of a benchmark of `zoo bench`, and what is drawn and tabled of its records.

A benchmark is one file in `zoo/benchmarks/`, or one that `ZOO_IMPORT` names: it registers a class that declares its
options, measures its cells, and says which tables, plots and columns its records make. The command `zoo bench NAME`,
its page, and the part of a report about it are made from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from zoo.core.registry import Registry
from zoo.report.charts import Axis, HeatMap, Panel
from zoo.report.records import Record

RATE = Axis("tokens a second", "count", log=True)
LENGTH = Axis("length", "length", log=True)
CONTEXT = Axis("context", "length", log=True)
ACCURACY = Axis("accuracy", "percent")


class Table(NamedTuple):
    """Texts in rows, and a title."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Curve:
    """A figure over a setting, or one figure of each subject.

    Attributes:
        figure: its name in the records.
        y: its axis.
        over: the setting on the x axis; empty where the figure is one of the whole subject.
        x: the axis of that setting.
        where: settings that a record must have.
        title: of the panel.
    """

    figure: str
    y: Axis
    over: str = ""
    x: Axis = LENGTH
    where: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""


Maps = Callable[[Sequence[Record], Mapping[str, str]], list[Panel | HeatMap]]
"""Panels of a benchmark's own: from its records, and the ids of rows by the title of their subject."""


@dataclass(frozen=True)
class Plot:
    """A chart of a benchmark's records.

    Attributes:
        name: for links and files.
        title: its heading.
        caption: how to read it.
        parts: what is drawn, each with a panel for every setting that the records differ in. A curve without `over`
            is drawn as bars.
    """

    name: str
    title: str
    caption: str
    parts: Sequence[Curve | Maps]


class Head(NamedTuple):
    """A column in the report's table of layers: a figure in the setting that most layers have it in."""

    title: str
    curve: Curve
    best: Literal["max", "min"]


class Benchmark(ABC):
    """What `zoo bench NAME` measures.

    The first paragraph of the docstring of a benchmark is its line in `zoo bench --help`; all of it stands at the top
    of its page.

    Attributes:
        Config: its options, a subclass of `zoo.benchmarks.options.BenchmarkOptions`.
        title: the heading of its page.
        peers: whether public layers are measured beside those that were named.
        plots: what is drawn of its records.
        heads: its columns in the report's table of layers.
        order: its place among the benchmarks, the lowest first.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    title: ClassVar[str]
    peers: ClassVar[bool] = True
    plots: ClassVar[Sequence[Plot]] = ()
    heads: ClassVar[Sequence[Head]] = ()
    order: ClassVar[int] = 100

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def label(cls) -> str:
        """Its name on the command line, in records and of its files: with - for _."""
        return cls.name.replace("_", "-")

    @abstractmethod
    def cells(self, request: Any) -> Iterator[Record]:
        """Measure: the record of each cell, as soon as it is made.

        Args:
            request: the subjects, the device and the budget, a `zoo.benchmarks.cells.Request`.
        """

    @classmethod
    @abstractmethod
    def tables(cls, found: Sequence[Record]) -> list[Table]:
        """The tables of the page, of records that may come from several calls."""


def _wrong(cls: type[Benchmark]) -> str | None:
    config: Any = cls.Config
    if not hasattr(config, "wrong"):
        return "its Config is no subclass of BenchmarkOptions"
    if not isinstance(getattr(cls, "title", None), str):
        return "it lacks title, a text"
    for what, kind in (("plots", Plot), ("heads", Head)):
        found = getattr(cls, what)
        if not (isinstance(found, tuple | list) and all(isinstance(each, kind) for each in found)):
            return f"its {what} are no tuple of {kind.__name__}"
    return config.wrong()


benchmarks: Registry[type[Benchmark]] = Registry("benchmark", "zoo.benchmarks", base=Benchmark, check=_wrong)
register = benchmarks.register


def in_order() -> list[type[Benchmark]]:
    """All benchmarks, as they are listed and drawn."""
    return sorted((benchmarks[name] for name in benchmarks.names()), key=lambda cls: cls.order)
