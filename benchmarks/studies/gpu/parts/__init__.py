"""The parts, one file each with a `PART`; the order is that of the study."""

ORDER = ("machine", "recall", "correct", "peers", "trm", "mixers", "sudoku")
MODULES = {name: f"{__name__}.{name}" for name in ORDER}
"""By the name of a part, its module."""
