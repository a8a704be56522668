"""The page: what was measured, on what, and what is not yet."""

from __future__ import annotations

import textwrap
from importlib import import_module

from zoo.benchmarks.studies.gpu.part import OK, Part, Row, settled
from zoo.benchmarks.studies.gpu.parts import MODULES
from zoo.benchmarks.studies.harness import Data

COMMAND = "make gpu"


def all_parts() -> dict[str, Part]:
    """The parts by name, in order."""
    return {name: import_module(module).PART for name, module in MODULES.items()}


def markdown(data: Data) -> str:
    """The page of what there is."""
    parts, found = all_parts(), data.get("parts", {})
    lines = ["# On a GPU", "", *_head(data), ""]
    for name, part in parts.items():
        rows = found.get(name, {}).get("rows", {})
        if rows:
            lines += [f"## {part.title}", "", *_wrapped(part.about), "", *_section(part, found[name]), ""]
    waiting = [part for name, part in parts.items() if not found.get(name, {}).get("rows")]
    if waiting:
        lines += ["## Not yet measured", ""]
        lines += [line for part in waiting for line in _item(f"{part.title} (`{part.name}`): {part.about}")]
    return "\n".join(lines).rstrip() + "\n"


def _head(data: Data) -> list[str]:
    if not data.get("sessions"):
        return _wrapped(
            "Not yet measured. The command below measures what this page lists, in at most 8 minutes on a machine with "
            f"a GPU, and writes the page: `{COMMAND}` ([the exact line](../install-gpu.md#measure))."
        )
    told = []
    if data.get("toy"):
        told += [*_wrapped("At toy sizes, to try the command: these figures mean nothing."), ""]
    told += [*_wrapped(f"`{COMMAND}` makes this page ([the exact line](../install-gpu.md#measure)). Sessions:"), ""]
    for n, session in enumerate(data["sessions"]):
        told += _item(_session(n, session))
    return told


def _session(n: int, session: Data) -> str:
    at = session["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    memory = f", {at['memory_bytes'] / 2**30:.0f} GiB" if "free_bytes" in at else ""
    told = (
        f"{n + 1}: {session['date'][:16]} UTC, commit {(session['commit'] or 'unknown')[:12]}, {at['device']}{memory}, "
    )
    told += f"{at['cpu']} ({at['cpus']} cores), {at['system']}; {versions}."
    return told + "".join(f" {line}" for line in at.get("left_out", []))


def _section(part: Part, found: Data) -> list[str]:
    rows: dict[str, Row] = found["rows"]
    shown = list(part.lines({name: row for name, row in rows.items() if row["status"] == OK}))
    problems = [f"- {name}: {row['status']} ({row['why']})" for name, row in rows.items() if row["status"] != OK]
    left = [name for name in found.get("items", []) if name not in rows or not settled(rows[name])]
    ended = found.get("ended", "complete")
    sessions = sorted({row["session"] + 1 for row in rows.values()})
    told = f"Session {', '.join(map(str, sessions))}; {len(rows)} of {len(found.get('items', rows))} items"
    told += "." if ended == "complete" else f": {ended}."
    lines = [part for line in shown for part in (_wrapped(line) if line[:1] not in ("", "|", "-") else [line])]
    lines += ["", told]
    if problems:
        lines += ["", "Without figures:", "", *problems]
    if left:
        names = f"Left for a next session: {', '.join(left)}."
        lines += ["", *textwrap.wrap(names, 120)]
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120)


def _item(text: str) -> list[str]:
    return textwrap.wrap(f"- {text}", 120, subsequent_indent="  ")
