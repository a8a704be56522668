"""One command for a machine with a GPU: is it right, how fast is it, and what do models reach.

    python -m zoo.benchmarks.studies.gpu [--parts correct peers] [--limit 480] [--out FOLDER]
    python -m zoo.benchmarks.studies.gpu --toy --device cpu --out FOLDER

Every part runs in a process of its own, with a limit of its own: what hangs is killed, what crashes is noted, and the
next one begins. The page and its data are written after every row. A rerun continues with what is missing; with
--again it measures the chosen parts anew. --toy has sizes at which figures mean nothing, for trying the command on a
CPU. No part needs a network.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.benchmarks.studies.gpu import page, parts, runner
from zoo.benchmarks.studies.gpu.part import OK, Part, Row, Settings, settled
from zoo.benchmarks.studies.harness import RESULTS, Data, Study, facts
from zoo.core.errors import UsageError
from zoo.training import machine

LIMIT, LEAST = 480.0, 5.0
WORK = Path("build/gpu")
LAST = 3.0
"""Seconds that are left for the page at the end."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", metavar="PART", help=f"only these of: {', '.join(parts.ORDER)}")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds in all, by default {LIMIT:.0f}")
    parser.add_argument("--again", action="store_true", help="measure the chosen parts anew, not only what is missing")
    parser.add_argument("--device", default="cuda", help="cuda, which is the default, or cpu with --toy")
    parser.add_argument("--toy", action="store_true", help="sizes for trying the command on a CPU; needs --out")
    parser.add_argument("--work", type=Path, help="folder of runs, caches and logs; default: build/gpu, or OUT/work")
    parser.add_argument("--commit", help="commit of the tree, where it has no .git folder")


def check(given: argparse.Namespace, old: Data) -> dict[str, Part]:
    """The chosen parts.

    Raises:
        UsageError: options that do not go together, or a device that is not there.
    """
    known = page.all_parts()
    for name in given.parts or ():
        if name not in known:
            raise UsageError(f"--parts {name!r} is not allowed. Available: {', '.join(known)}.")
    if not given.limit > 0:
        raise UsageError(f"--limit {given.limit:g} is not allowed: it should be above 0 seconds.")
    if given.device not in ("cuda", "cpu"):
        raise UsageError(f"--device {given.device!r} is not allowed: it should be cuda or cpu.")
    if given.toy and given.out.resolve() == RESULTS.resolve():
        raise UsageError(f"--toy writes nothing into {RESULTS}: give another folder by --out.")
    if given.device == "cpu" and not given.toy:
        raise UsageError("--device cpu is for trying the command: add --toy and --out FOLDER.")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch finds no GPU here. To try the command on a CPU: --toy --device cpu --out FOLDER."
        )
    if old and bool(old.get("toy")) != given.toy:
        kind = "toy" if old.get("toy") else "full"
        raise UsageError(f"{given.out} has rows at {kind} size: give another folder by --out.")
    return {name: part for name, part in known.items() if name in (given.parts or known)}


def measure(given: argparse.Namespace, old: Data) -> Iterator[Data]:
    end = time.monotonic() + given.limit
    chosen = check(given, old)
    work = given.work or (WORK if given.out.resolve() == RESULTS.resolve() else given.out / "work")
    here = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": given.commit or machine.commit(),
        "limit": given.limit,
        "facts": facts(),
    }
    sessions = [*old.get("sessions", []), here]
    data: Data = {"toy": given.toy, "sessions": sessions, "parts": dict(old.get("parts", {}))}
    if given.again:
        for name in chosen:
            data["parts"].pop(name, None)
            shutil.rmtree(work / name / "cache", ignore_errors=True)  # a run of the part continues
    n = len(sessions) - 1
    waiting = [name for name, part in chosen.items() if part.always or not complete(data["parts"].get(name))]
    for i, name in enumerate(waiting):
        part, left = chosen[name], end - LAST - time.monotonic()
        seconds = left * part.share / sum(chosen[other].share for other in waiting[i:])
        kept = data["parts"].setdefault(name, {"rows": {}, "items": []})
        if seconds < LEAST:
            kept["ended"] = "no time was left for it"
            say(f"{name}: no time is left")
            continue
        say(f"{name}: up to {seconds:.0f} s")
        settings = Settings(given.device, given.toy, str(work.resolve()), seconds, n)
        done = set() if part.always else {item for item, row in kept["rows"].items() if settled(row)}
        for what, found in runner.run(parts.MODULES[name], part, settings, done):
            if what == "row":
                item, row = found
                kept["rows"][item] = row | {"session": n}
                if row.get("versions"):
                    here["facts"] = row
                say(f"  {item}: {told(row)}")
            else:
                kept[what] = found
            yield data
        say(f"{name}: {kept['ended']}")
    yield data


def complete(kept: Data | None) -> bool:
    """Whether nothing of a part is left for another session."""
    if not kept or kept.get("ended") != "complete":
        return False
    return all(name in kept["rows"] and settled(kept["rows"][name]) for name in kept["items"])


def told(row: Row) -> str:
    """A row in a few words."""
    wrong = row.get("wrong") or []
    state = row["status"] if row["status"] == OK and not wrong else f"{row['status']}: {row.get('why', '')}"
    return f"{state}{''.join(f'; WRONG {line}' for line in wrong)} ({row.get('took', 0):.1f} s)"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def summary(data: Data) -> str:
    """How each part ended, in a line."""
    found: dict[str, Any] = data.get("parts", {})
    return "; ".join(f"{name}: {kept.get('ended', 'not begun')}" for name, kept in found.items()) or "nothing"


STUDY = Study("gpu", __doc__, arguments, measure, page.markdown, said=summary)
