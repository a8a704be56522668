"""Ours beside other people's functions and layers: first whether they are right, then how long they take."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.benchmarks.cells import Request
from zoo.benchmarks.studies.gpu import timing
from zoo.benchmarks.studies.gpu.child import measured as guarded
from zoo.benchmarks.studies.gpu.part import OK, Items, Part, Row, Settings, cold_cache
from zoo.benchmarks.studies.gpu.peers import CASES, F32, FLA, FULL, TOY, Function, Inputs, PeerCase
from zoo.benchmarks.studies.harness import table
from zoo.benchmarks.subjects import PEERS, Subject, from_pattern
from zoo.laws import error
from zoo.ops.common import logged_forms

COLD = cold_cache()
"""Whether Triton had nothing compiled when this process began, so that first calls compile."""
TOLERANCE = 2e-2
"""How far values and gradients in bfloat16 may be from float64, relative to the largest, for a peer to count."""
CELLS = ("slstm", "cfc", "m2rnn", "gru", "lstm", "min_gru", "ltc")
LSTM = "torch.nn.LSTM"
CELL_SIZES, TOY_CELL_SIZES = (8, 2048, 1024), (2, 12, 32)
NO_SLOWER, SHARE, FIRST = 1.0, 0.3, 5.0
"""Targets: time of `auto` over that of fla called directly; a cell's tokens a second over cuDNN's LSTM; seconds of a
first call of our own kernels."""


def on(inputs: Inputs, device: str, dtype: torch.dtype | None = None) -> Inputs:
    """Leaves on a device, in bfloat16 or float32 as their functions take them, or all in one dtype."""
    at = {name: dtype or (torch.float32 if name in F32 else torch.bfloat16) for name in inputs}
    return {name: x.to(device, at[name]).requires_grad_() for name, x in inputs.items()}


def rounded(inputs: Inputs, device: str) -> Inputs:
    """The same numbers in float64, as bfloat16 and float32 hold them."""
    return {name: x.detach().double() for name, x in on(inputs, device).items()}


def results(function: Function, x: Inputs) -> list[Tensor]:
    """The output and the gradients of a fixed functional of it, in float64 on their device."""
    y = function(x)
    rng = torch.Generator(y.device).manual_seed(7)
    weight = torch.randn(y.shape, generator=rng, device=y.device).bfloat16().to(y)  # the same in every precision
    gradients = torch.autograd.grad(y, list(x.values()), weight)
    return [t.detach().double() for t in (y, *gradients)]


def compared(
    function: Function,
    case: PeerCase,
    inputs: Inputs,
    exact: list[Tensor],
    device: str,
    dtype: torch.dtype | None = None,
) -> Row:
    """A function on the first row of the batch: its errors, its first call and the forms that ran."""
    row: Row = {}
    got: list[list[Tensor]] = []
    with logged_forms() as forms:
        leaves = on(first_row(case, inputs), device, dtype)
        row["first_s"] = timing.wall(lambda: got.append(results(function, leaves)), device)
    errors = {name: error(a, e) for name, a, e in zip(["o", *inputs], got[0], exact, strict=True)}
    row["ran"] = sorted({form for found in forms.values() for form in found})
    row["error"], row["of"] = max(
        ((e, name) for name, e in errors.items()), key=lambda found: (found[0] != found[0], found)
    )
    row["right"] = bool(row["error"] <= TOLERANCE)
    row["error"] = row["error"] if row["error"] == row["error"] else float("inf")
    return row


def first_row(case: PeerCase, inputs: Inputs) -> Inputs:
    return {name: x if name in case.shared else x[:1] for name, x in inputs.items()}


def steps_of(function: Function, leaves: Inputs) -> dict[str, Callable[[], object]]:
    """A forward pass without gradients, and a forward and backward pass."""
    plain = {name: x.detach() for name, x in leaves.items()}
    weight = torch.randn_like(function(plain))

    def train() -> object:
        return torch.autograd.grad(function(leaves), list(leaves.values()), weight)

    return {"forward": torch.no_grad()(lambda: function(plain)), "train": train}


def op_beside_peers(name: str, settings: Settings) -> Row:
    """An op's forms and its peers: exactness on the first row, then all that are right in turns on the whole batch."""
    case, device = CASES[name], settings.device
    at = (TOY if settings.toy else FULL)._replace(device=device)
    inputs = case.inputs(at)
    wide = {key: x.requires_grad_() for key, x in rounded(first_row(case, inputs), device).items()}
    exact = results(case.ours("auto" if name == "attention" else "chunked"), wide)
    del wide
    tried: dict[str, Row] = {}
    functions: dict[str, Function] = {}
    loads: dict[str, Callable[[], Function]] = {**case.peers}
    loads |= {form: functools.partial(case.ours, form) for form in case.forms}

    def check(who: str) -> Row:
        functions[who] = loads[who]()
        return compared(functions[who], case, inputs, exact, device)

    for who in loads:
        tried[who] = guarded(functools.partial(check, who))
    leaves = on(inputs, device)
    steps: dict[str, dict[str, Callable[[], object]]] = {}

    def begin(who: str) -> Row:
        made = steps_of(functions[who], leaves)
        first = timing.wall(made["train"], device)
        row = {"whole_s": first, "peak_bytes": timing.peak_bytes(made["train"], device)}
        steps[who] = made
        return row

    for who, row in tried.items():
        if row["status"] == OK and (row["right"] or who not in case.peers):
            row |= guarded(functools.partial(begin, who))
    for what in ("forward", "train"):
        times = timing.turns({who: each[what] for who, each in steps.items()}, device, 3 if settings.toy else 15, 6.0)
        for who, found in times.items():
            tried[who][what] = timing.spread(found)
            tried[who]["n"] = len(found)
            for fla in [peer for peer in times if peer.startswith(FLA) and who == "auto"]:
                tried[who][f"{what}_over_fla"] = timing.ratio(found, times[fla])
    return {"sizes": at._asdict(), "functions": tried, "peers": list(case.peers), "cold": COLD}


def cell_beside_lstm(word: str, settings: Settings) -> Row:
    """A cell's layer and torch's LSTM in turns, forward and backward, in bfloat16 and in float32."""
    batch, length, width = TOY_CELL_SIZES if settings.toy else CELL_SIZES
    own, lstm = from_pattern(word), Subject(LSTM, PEERS[LSTM][1], peer=True)
    row: Row = {"sizes": {"B": batch, "T": length, "D": width}, "cold": COLD}
    for precision in ("bfloat16", "float32"):
        request = Request([own], settings.device, precision)
        steps: dict[str, Callable[[], object]] = {}
        with logged_forms() as forms:
            for who, subject in (("ours", own), (LSTM, lstm)):
                layer = subject.build(width, length, settings.device)
                steps[who] = _training(request, layer, batch, length, width)
                found: Row = {"first_s": timing.wall(steps[who], settings.device)}
                row[f"{precision}, {who}"] = found | {"peak_bytes": timing.peak_bytes(steps[who], settings.device)}
        times = timing.turns(steps, settings.device, 2 if settings.toy else 7, 6.0)
        for who, seconds in times.items():
            row[f"{precision}, {who}"]["tokens_per_second"] = batch * length / statistics.median(seconds)
        row[f"{precision}, ours"] |= {
            "share": timing.ratio(times[LSTM], times["ours"]),
            "n": len(times["ours"]),
            "ran": {op: sorted(names) for op, names in forms.items()},
        }
    return row


def _training(request: Request, layer: Any, batch: int, length: int, width: int) -> Callable[[], object]:
    x = torch.randn(batch, length, width, device=request.device, requires_grad=True)
    leaves, weight = [x, *layer.parameters()], torch.randn_like(x)

    def train() -> object:
        with request.autocast():
            y, _ = layer(x)
        return torch.autograd.grad(y, leaves, weight.to(y.dtype), allow_unused=True)

    return train


def items(settings: Settings) -> Items:
    cells, names = list(CELLS), list(CASES)
    if settings.toy:
        cells, names = ["cfc"], ["delta_rule, decay per head", "causal_conv1d", "attention"]
    found: dict[str, Callable[[], Row]] = {}
    found |= {f"cell {word}": functools.partial(cell_beside_lstm, word, settings) for word in cells[:-1] or cells}
    found |= {f"op {name}": functools.partial(op_beside_peers, name, settings) for name in names}
    return found | {f"cell {word}": functools.partial(cell_beside_lstm, word, settings) for word in cells[-1:]}


def lines(rows: Mapping[str, Row]) -> list[str]:
    return [*_cells(rows), *_ops(rows)]


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _kept(row: Row) -> str:
    return "" if row["cold"] else ", from a cache"


def _cells(rows: Mapping[str, Row]) -> list[str]:
    shown = []
    at: dict[str, int] = {}
    for name, row in rows.items():
        if not name.startswith("cell ") or row["status"] != OK:
            continue
        at = row["sizes"]
        for precision in ("bfloat16", "float32"):
            ours, theirs = row[f"{precision}, ours"], row[f"{precision}, {LSTM}"]
            middle, low, high = ours["share"]
            ran = ", ".join(sorted({form for forms in ours["ran"].values() for form in forms}))
            first = f"{ours['first_s']:.1f} ({_verdict(ours['first_s'] < FIRST)}){_kept(row)}"
            share = f"{middle:.0%} [{low:.0%}, {high:.0%}] ({_verdict(middle >= SHARE)})"
            rates = [f"{each['tokens_per_second']:,.0f}" for each in (ours, theirs)]
            shown.append([name.removeprefix("cell "), precision, ran, *rates, share, first])
    if not shown:
        return []
    told = (
        f"Layers of cells at B {at['B']}, T {at['T']:,}, width {at['D']:,}: tokens a second of a forward and backward "
        f"pass, beside {LSTM} (cuDNN on a GPU) in turns. Target: {SHARE:.0%} of its tokens a second, and less than "
        f"{FIRST:.0f} s for a first call."
    )
    head = ["cell", "precision", "forms", "ours", LSTM, "ours over it", "first call, s"]
    return [told, "", *table(head, shown), ""]


def _ops(rows: Mapping[str, Row]) -> list[str]:
    shown, notes = [], []
    sizes: dict[str, int] = {}
    for name, row in rows.items():
        if not name.startswith("op ") or row["status"] != OK:
            continue
        sizes = row["sizes"]
        for who, found in row["functions"].items():
            what = f"{name.removeprefix('op ')}: {who}"
            if found["status"] != OK:
                notes.append(f"- {what}: {found['status']} ({found['why']})")
                continue
            if not found["right"]:
                fate = "not used as a peer" if who in row["peers"] else "WRONG"
                notes.append(f"- {what}: {fate}, error {found['error']:.1e} in {found['of']}")
            if "train" not in found:
                continue
            ms = [f"{1e3 * found[key][0]:.3g}" for key in ("forward", "train")]
            over = found.get("train_over_fla"), found.get("forward_over_fla")
            ratio = "; ".join(f"{r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}] ({_verdict(r[0] <= NO_SLOWER)})" for r in over if r)
            peak = f"{found['peak_bytes'] / 2**30:.2f}" if found.get("peak_bytes") is not None else ""
            first = f"{found['first_s'] + found['whole_s']:.1f}{_kept(row)}"
            ran = ", ".join(found["ran"])
            shown.append([what, ran, *ms, ratio, first, peak, f"{found['error']:.0e}"])
    if not shown:
        return notes
    told = (
        f"Ops at B {sizes['B']}, T {sizes['T']:,}, H {sizes['H']}, K {sizes['K']}, bfloat16 with decays in float32, in "
        f"turns in one process. Before, values and gradients of the first row are compared with float64: a peer whose "
        f"error is above {TOLERANCE:g} of the largest entry is not measured. Target: `auto` takes no longer than fla "
        "called directly, forward and backward."
    )
    head = ["function", "forms", "forward, ms", "forward and backward, ms", "over fla: both; forward", "first calls, s"]
    return [told, "", *table([*head, "peak, GiB", "error"], shown), "", *notes]


PART = Part(
    name="peers",
    title="Beside other people's kernels",
    about=(
        "Ops (B 4, T 8,192, H 16, K 128, bfloat16), `auto` and every form, beside flash-linear-attention, mamba-ssm, "
        "flash-qla, causal-conv1d and SDPA where installed, forward and backward, each compared with float64 before; "
        "cells (B 8, T 2,048, width 1,024) beside cuDNN's LSTM. First calls stand apart."
    ),
    share=130,
    item_seconds=75,
    items=items,
    lines=lines,
)
