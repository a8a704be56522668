"""The command `zoo bench`, and studies. The names here are those that your own benchmark needs (docs/adding.md)."""

from importlib import import_module
from typing import Any

if __name__ != "zoo.benchmarks":  # from the root of a checkout, where a second copy would have registries of its own
    raise ImportError("benchmarks is zoo.benchmarks now.")

# Names are imported when they are first used: most need torch.
_LATER = {
    **dict.fromkeys(("NoFigure", "Request", "cell"), "zoo.benchmarks.cells"),
    **dict.fromkeys(("BenchmarkOptions", "Count", "Lengths", "Width", "Widths", "option"), "zoo.benchmarks.options"),
    **dict.fromkeys(("pivot", "spread"), "zoo.benchmarks.tables"),
    **dict.fromkeys(("Benchmark", "Curve", "Head", "Plot", "Table", "register"), "zoo.report.benchmark"),
    "Axis": "zoo.report.charts",
    **dict.fromkeys(("Record", "figure"), "zoo.report.records"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
