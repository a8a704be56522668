"""Is what runs on the device right: the ops' forms, the mixers and the laws, beside float64 on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zoo.benchmarks.studies.gpu import mixer_values, op_values
from zoo.benchmarks.studies.gpu.part import OK, Items, Part, Row, Settings
from zoo.benchmarks.studies.harness import table
from zoo.core.errors import UsageError
from zoo.laws import LAWS, cases_of, plan
from zoo.ops.common import logged_forms
from zoo.protocol import mixers

LENGTHS, TOY_LENGTHS = (1, 63, 64, 100, 1000), (1, 33)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIRST = ("mha", "gated_deltanet", "mamba2", "mamba", "rwkv7", "mlstm", "slstm", "cfc", "ltc", "m2rnn", "gru", "rg_lru")
"""Mixers whose laws come first."""
OWN = tuple(name for name in op_values.BACKENDS if name not in op_values.LIBRARIES)


def forms(name: str, backends: Sequence[str], settings: Settings) -> Row:
    """Every form of an op at every length, in both precisions: the worst error of each form, and what is wrong."""
    case, n = op_values.CASES[name], 0
    wrong: list[str] = []
    worst: dict[str, float] = {}
    refused: dict[str, str] = {}
    ran: dict[str, list[str]] = {}
    for T in TOY_LENGTHS if settings.toy else [T for T in LENGTHS if case.most >= T]:
        leaves = op_values.leaves_of(case, T)
        exact = op_values.exact_values(case, leaves)
        for told, dtype in DTYPES.items():
            for backend in backends:
                if backend == "reference" and T > 100 and case.op not in op_values.LOOPS:
                    continue  # a loop of thousands of launches, which shorter rows have checked
                how = f"{backend}, {told}"
                try:
                    with logged_forms() as logged:
                        got = op_values.values(case, leaves, settings.device, dtype, backend)
                except UsageError as refusal:
                    if backend == "auto":
                        raise
                    refused[backend] = str(refusal)
                    continue
                error, of = op_values.worst(case, leaves, got, exact)
                ran[how] = sorted({form for found in logged.values() for form in found})
                worst[how] = max(worst.get(how, 0.0), error) if error == error else float("inf")
                n += 1
                if not error <= op_values.tolerance(backend, dtype):
                    wrong.append(f"{name}, {how}, T {T}: {error:.1e} in {of}")
    return {"worst": worst, "refused": refused, "ran": ran, "wrong": wrong, "comparisons": n}


def mixer(name: str, settings: Settings) -> Row:
    """A mixer in both precisions."""
    worst, wrong = {}, []
    for told, dtype in DTYPES.items():
        error, tolerance = mixer_values.compared(name, settings.device, dtype)
        worst[told] = error if error == error else float("inf")
        if not error <= tolerance:
            wrong.append(f"{name}, {told}: {error:.1e}, allowed {tolerance:.1e}")
    return {"worst": worst, "wrong": wrong, "comparisons": len(DTYPES)}


def laws(name: str, settings: Settings) -> Row:
    """The laws of a mixer's first case on the device, as `pytest -m gpu tests/test_laws.py` checks them."""
    cases = cases_of(mixers[name], settings.device)[:1]
    chosen = ("chunk consistency",) if settings.toy else LAWS
    found = [check.find() for law in chosen for check in plan(LAWS[law], cases)]
    return {"wrong": [str(finding) for finding in found if finding.broken], "comparisons": len(found)}


def items(settings: Settings) -> Items:
    names = sorted(mixers.names(), key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    ops = list(op_values.CASES)
    if settings.toy:
        names, ops = ["lstm", "gated_deltanet"], ["delta_rule, decay per head", "scan, complex", "slstm"]
    found: dict[str, Callable[[], Row]] = {}
    found |= {f"forms of {name}": functools.partial(forms, name, OWN, settings) for name in ops}
    found |= {f"mixer {name}": functools.partial(mixer, name, settings) for name in names}
    found |= {f"laws of {name}": functools.partial(laws, name, settings) for name in names}
    by_library = [
        name for name in ops if op_values.CASES[name].op not in (*op_values.LOOPS, "scan", "oscillate", "mlstm")
    ]
    return found | {
        f"libraries for {name}": functools.partial(forms, name, op_values.LIBRARIES, settings) for name in by_library
    }


def lines(rows: Mapping[str, Row]) -> list[str]:
    ended = {name: row for name, row in rows.items() if row["status"] == OK}
    wrong = [told for row in ended.values() for told in row["wrong"]]
    n = sum(row["comparisons"] for row in ended.values())
    shown: list[str] = []
    if ended:
        told = f"{len(wrong)} are wrong:" if wrong else "none is wrong."
        shown += [
            f"{n:,} comparisons and checks of laws: {told}",
            *(["", *(f"- {line}" for line in wrong)] * bool(wrong)),
        ]
    cells: dict[str, dict[str, Any]] = {}
    for name, row in ended.items():
        for how, error in row.get("worst", {}).items():
            op = name.partition(" of ")[2] or name.partition(" for ")[2]
            if op:
                cells.setdefault(op, {})[how] = error
    columns = list(dict.fromkeys(how for row in cells.values() for how in row))
    if cells:
        body = [[op, *(f"{row[how]:.0e}" if how in row else "" for how in columns)] for op, row in cells.items()]
        shown += ["", "The largest relative error of each form, over all lengths:", "", *table(["op", *columns], body)]
    return shown


PART = Part(
    name="correct",
    title="Correct",
    about=(
        "Every form of every op at lengths 1, 63, 64, 100 and 1,000, and every mixer, in float32 and bfloat16, beside "
        "float64 on the CPU, values and gradients; then the laws of every mixer on the device."
    ),
    share=110,
    item_seconds=45,
    items=items,
    lines=lines,
)
