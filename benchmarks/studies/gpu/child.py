"""One part in a process of its own: `python -m zoo.benchmarks.studies.gpu.child MODULE FILE SETTINGS DONE`.

It appends lines of JSON to FILE: which items there are, which one begins, and what came of it. DONE names items that
are not measured again. After an error that leaves the GPU unusable the process ends with the status POISONED.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.benchmarks.cells import NoFigure
from zoo.benchmarks.studies.gpu.part import FAILED, NO_MEMORY, NOT_OFFERED, OK, Part, Row, Settings, exact_float32
from zoo.core.errors import UsageError

POISONED = 3
HERE = Path(zoo.__file__).parent


def measured(run: Any) -> Row:
    """The row of an item, whatever happens in it."""
    try:
        return {"status": OK, **run()}
    except (UsageError, ImportError, NoFigure) as refusal:
        return {"status": NOT_OFFERED, "why": first_line(refusal)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"status": NO_MEMORY, "why": first_line(error)}
    except Exception as error:
        return {"status": FAILED, "why": f"{type(error).__name__}: {first_line(error)}{raised_in(error)}"}


def raised_in(error: BaseException) -> str:
    """` (own.py, line 3)`: the last line of this project that an error came through, after `measured`."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if HERE in Path(frame.filename).parents]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def first_line(error: BaseException) -> str:
    """The text of an error, of several lines the first that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


def usable(device: str) -> bool:
    """Whether the device still computes; after some errors of a kernel it does not."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return float(torch.ones(8, device=device).sum()) == 8
    except Exception:
        return False


def run(part: Part, file: Path, settings: Settings, done: set[str], end: float) -> int:
    """Measure what is not done; the exit status."""

    def write(line: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")

    exact_float32()
    items = part.items(settings)
    write({"items": list(items)})
    for name, measure in items.items():
        if name in done:
            continue
        if time.time() > end:
            return 0
        write({"begin": name})
        started = time.perf_counter()
        row = measured(measure)
        alive = usable(settings.device)
        if not alive:
            row = {"status": FAILED, "why": "the GPU was unusable afterwards", **(row if row["status"] != OK else {})}
        write({"item": name, "row": {**row, "took": round(time.perf_counter() - started, 3)}})
        if not alive:
            return POISONED
        gc.collect()  # of the memory of this item nothing is left for the next one
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def main(module: str, file: str, settings: str, done: str, end: str) -> int:
    """The arguments as text: JSON, but for the names; `end` is when no further item begins, by `time.time`."""
    part: Part = importlib.import_module(module).PART
    return run(part, Path(file), Settings(**json.loads(settings)), set(json.loads(done)), float(end))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
