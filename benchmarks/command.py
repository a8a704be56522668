"""`zoo bench`: choose what is measured, measure it, print and keep what was found."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zoo.benchmarks import decode, long_context, mad, memory, plots, records, throughput
from zoo.benchmarks.cells import Request, Table, check_lengths, notes
from zoo.benchmarks.records import Record
from zoo.benchmarks.subjects import choose, peers
from zoo.core.errors import UsageError
from zoo.core.files import write_atomic, writing
from zoo.core.imports import import_source
from zoo.protocol import MIN_WIDTH
from zoo.training import machine
from zoo.training.options import TrainConfig
from zoo.training.recipes import parse_overrides

MODULES: dict[str, Any] = {
    "throughput": throughput,
    "memory": memory,
    "decode": decode,
    "long-context": long_context,
    "mad": mad,
}
TITLES = {
    "throughput": "Throughput",
    "memory": "Memory",
    "decode": "Prefill and decoding",
    "long-context": "Long contexts",
    "mad": "MAD",
}


MOST_WIDTH, MOST_TOKENS, MOST_RUNS, MOST_SEEDS, MOST_THREADS = 2**16, 2**30, 10**6, 1000, 1024
MOST_SECONDS = 1e6
"""What options take at most: far beyond any use, and within what the machine's numbers hold."""


def numbers(option: str, text: str, most: int = MOST_TOKENS) -> list[int]:
    """Whole numbers by commas, rising; K and M stand for 1024 and 1024 x 1024.

    Raises:
        UsageError: anything else, or one above `most`.
    """
    units = {"K": 2**10, "M": 2**20}
    try:
        found = [
            int(part.rstrip("KMkm")) * units.get(part[-1:].upper(), 1) for part in text.replace(" ", "").split(",")
        ]
    except ValueError:
        raise UsageError(
            f"--{option} {text!r:.60} is not allowed: give whole numbers by commas, such as 1K,4K,1M."
        ) from None
    if max(found, default=0) > most:
        raise UsageError(f"--{option} {text!r:.60} is not allowed: it should be at most {most:,}.")
    return check_lengths(option, found)


def fractions(option: str, text: str) -> list[float]:
    """Numbers by commas.

    Raises:
        UsageError: anything else, or one below 0 or without end.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < math.inf for number in found):
        raise UsageError(f"--{option} {text!r:.60} is not allowed: give numbers by commas, none below 0.")
    return found


def training_options(items: Sequence[str]) -> dict[str, Any]:
    """`["lr=1e-3"]` as keys of an experiment.

    Raises:
        UsageError: not key=value, or a key that the benchmark sets.
    """
    found = {f"train.{key}": value for key, value in parse_overrides(items).items()}
    for option in ("device", "precision", "time_budget", "threads", "seed"):
        if f"train.{option}" in found:
            raise UsageError(f"--train {option}=... is not allowed: that is what options of zoo bench are for.")
    TrainConfig(**{key.removeprefix("train."): value for key, value in found.items()})
    return found


def request_of(
    words: Sequence[str] | None,
    imports: Sequence[str] | None,
    device: str,
    precision: str,
    threads: int | None,
    budget: float,
    repeats: int = 1,
    no_peers: bool = True,
) -> Request:
    """What is asked of a benchmark, checked.

    Raises:
        UsageError: an unknown word, device or precision, or a number out of its range.
    """
    for name, value, most in (
        ("budget", budget, MOST_SECONDS),
        ("repeats", repeats, MOST_RUNS),
        ("threads", 1 if threads is None else threads, MOST_THREADS),
    ):
        if not 0 < value <= most:
            raise UsageError(f"--{name} {value:g} is not allowed: it should be above 0 and at most {most:,.0f}.")
    if precision not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--precision {precision!r} is not allowed: it should be auto, float32 or bfloat16.")
    for source in imports or ():
        import_source(source, "--import")
    if threads is not None:
        torch.set_num_threads(threads)
    at = machine.choose_device(device)
    subjects = [*choose(words or ()), *([] if no_peers else peers())]
    return Request(subjects, at.type, machine.choose_precision(precision, at), budget, repeats, tuple(imports or ()))


def run(
    benchmark: str,
    request: Request,
    options: Mapping[str, Any],
    *,
    out: Path | None = None,
    missing: bool = False,
    as_json: bool = False,
) -> None:
    """Measure; print tables, or with `as_json` a line for each record as it is made; keep all in a folder.

    Args:
        benchmark: its name.
        request: what is measured, and how.
        options: of the benchmark's `cells`.
        out: folder of `<benchmark>.jsonl`, `.md` and `.svg`; records of other subjects or settings there are kept.
        missing: leave out subjects that the folder has records of already.
        as_json: print JSON lines in place of tables.

    Raises:
        UsageError: options that do not go together, or a damaged file in the folder.
    """
    module = MODULES[benchmark]
    file = out / f"{benchmark}.jsonl" if out is not None else None
    if file is not None:
        with writing(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=file.parent).close()  # before anything is measured
    old = records.read(file) if file is not None and file.exists() else []
    if missing:
        seen = {name for r in old for name in (r.name, *r.same)}
        request = dataclasses.replace(request, subjects=[s for s in request.subjects if s.name not in seen])
    made: list[Record] = []
    for record in module.cells(request, **options):
        made.append(record)
        if as_json:
            print(record.line(), flush=True)
        if file is not None:
            write_atomic(file, "".join(r.line() + "\n" for r in records.merged(old, made)).encode())
    if file is not None:
        _write_page(file, benchmark, records.merged(old, made))
    if not as_json:
        console = Console()
        for table in module.tables(made):
            console.print(f"\n{table.title}", soft_wrap=True, markup=False, highlight=False)
            console.print(_rich(table))
        for line in notes(made):
            print(line)


def _write_page(file: Path, benchmark: str, found: Sequence[Record]) -> None:
    """The page and the picture beside a file of records."""
    figure = plots.figure_of(benchmark, found)
    if figure is not None:
        write_atomic(file.with_suffix(".svg"), plots.svg(benchmark, figure).encode())
    else:
        file.with_suffix(".svg").unlink(missing_ok=True)  # of figures that are no longer there
    write_atomic(file.with_suffix(".md"), markdown(benchmark, found, picture=figure is not None).encode())


def _rich(table: Table) -> RichTable:
    """For a terminal."""
    shown = RichTable(show_edge=False)
    for i, head in enumerate(table.head):
        shown.add_column(head, justify="right" if i else "left", no_wrap=not i)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def markdown(benchmark: str, found: Sequence[Record], *, picture: bool) -> str:
    """The page: how it was measured, the picture, the tables."""
    module = MODULES[benchmark]
    about = (module.__doc__ or "").strip()
    places = dict.fromkeys(map(_place, found))
    lines = [f"# {TITLES[benchmark]}", "", about, ""]
    lines += [values(found), f"Forms of the ops and versions are in [{benchmark}.jsonl]({benchmark}.jsonl).", ""]
    places |= dict.fromkeys(told for r in found if (told := conditions(r)))
    lines += [*(f"- {place}" for place in places), ""]
    lines += [f"![{TITLES[benchmark]}]({benchmark}.svg)", ""] if picture else []
    for table in module.tables(found):
        lines += [f"## {table.title}", "", _markdown_row(table.head)]
        lines += ["|---|" + "---:|" * (len(table.head) - 1), *map(_markdown_row, table.rows), ""]
    lines += [f"- {line}" for line in notes(found)]
    return "\n".join(lines).rstrip() + "\n"


def _place(r: Record) -> str:
    """Where and when a record was measured, as a line of the page."""
    threads = f"{r.threads} thread{'s' if r.threads > 1 else ''}"
    torch_and_commit = f"torch {r.versions['torch']}, commit {(r.commit or 'unknown')[:12]}"
    at = f"{r.machine['cpu']}, {r.machine['cpus']} cores, {threads}, {r.device}, {r.precision}"
    return f"{at}, {torch_and_commit}, {r.date[:10]}"


def values(found: Sequence[Record]) -> str:
    """Of how many values the figures are, in a sentence or two."""
    counts: dict[str, set[int]] = {}
    for r in found:
        for name, figure in r.figures.items():
            counts.setdefault(name, set()).add(figure["n"])

    def named(names: Sequence[str]) -> str:
        return ", ".join(name.replace("_", " ") for name in names)

    several = [name for name, n in counts.items() if max(n) > 1]
    single = [name for name, n in counts.items() if max(n) == 1]
    told = []
    if several:
        n = set().union(*(counts[name] for name in several))
        how_many = f"{min(n)} to {max(n)}" if len(n) > 1 else f"{max(n)}"
        told.append(f"Medians of {how_many} values ({named(several)}); their number and quartiles are in the records.")
    if single:
        told.append(f"One value each (n = 1), without a spread: {named(single)}.")
    return " ".join(told) or "No figures."


def conditions(r: Record) -> str:
    """What else was asked for, as a line of the page; empty where the record does not say."""

    def text(value: Any) -> str:
        return (
            ", ".join(map(text, value))
            if isinstance(value, list)
            else f"{value:g}"
            if _is_number(value)
            else f"{value}"
        )

    told = [f"{key.removeprefix('train.').replace('_', ' ')} {text(value)}" for key, value in r.conditions.items()]
    if "budget" in r.conditions:
        told[list(r.conditions).index("budget")] += " s"
    return "; ".join(told)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# ---- the command line

app = typer.Typer(
    name="zoo bench",
    help="Measure mixers, patterns of them, and public layers beside them.",
    add_completion=False,
    rich_markup_mode=None,
)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[WORD|PATTERN]...", help='Such as mamba2 "short_conv mha" "*attention"; every mixer if none.'
    ),
]
Width = Annotated[str, typer.Option(help="Widths, by commas.")]
OneWidth = Annotated[int, typer.Option(min=MIN_WIDTH, max=MOST_WIDTH, help="Width of the model.")]
Contexts = Annotated[str, typer.Option(help="Contexts, by commas.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads, by default torch's choice.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 (autocast), or auto.")]
NoPeers = Annotated[bool, typer.Option("--no-peers", help="Leave out the public layers.")]
Import = Annotated[list[str] | None, typer.Option("--import", help="A file or module that registers mixers.")]
Out = Annotated[Path | None, typer.Option(help="Keep records, a page and a plot in this folder.")]
Missing = Annotated[bool, typer.Option("--missing", help="Only what the folder has no records of.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the task.")]
Train = Annotated[list[str] | None, typer.Option("--train", metavar="KEY=VALUE", help="Such as lr=1e-3.")]
Json = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each record instead of tables.")]
Seeds = Annotated[
    int, typer.Option(min=1, max=MOST_SEEDS, help="Trainings of each, from seed 0 on: the spread is theirs.")
]
Layers = Annotated[str, typer.Option(help="The model's pattern, {mixer} for what is measured.")]


@app.command("throughput")
def throughput_(
    words: Words = None,
    width: Width = "128",
    length: Annotated[str, typer.Option(help="Lengths, by commas.")] = "256,1K,4K",
    tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a batch; its size follows.")] = 4096,
    compiled: Annotated[bool, typer.Option("--compile", help="By torch.compile too.")] = False,
    budget: Annotated[float, typer.Option(help="Seconds of a cell, and the most that one run may take.")] = 5.0,
    repeats: Annotated[int, typer.Option(help="Most runs of a cell.")] = 9,
    device: Device = "auto",
    precision: Precision = "float32",
    threads: Threads = None,
    no_peers: NoPeers = False,
    imports: Import = None,
    out: Out = None,
    missing: Missing = False,
    as_json: Json = False,
) -> None:
    """Tokens a second of training and of forward passes, by width and length."""
    request = request_of(words, imports, device, precision, threads, budget, repeats, no_peers)
    options = {
        "widths": numbers("width", width, MOST_WIDTH),
        "lengths": numbers("length", length),
        "tokens": tokens,
        "compiled": [False, True] if compiled else [False],
    }
    run("throughput", request, options, out=out, missing=missing, as_json=as_json)


@app.command("memory")
def memory_(
    words: Words = None,
    width: Width = "128",
    length: Annotated[str, typer.Option(help="Lengths of training steps, by commas.")] = "1K,4K,16K",
    context: Contexts = "1K,4K,16K,64K,256K,1M",
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Rows of a training step.")] = 1,
    budget: Annotated[float, typer.Option(help="Seconds of a process that measures a training step.")] = 20.0,
    repeats: Annotated[int, typer.Option(help="Processes for each training step.")] = 3,
    device: Device = "auto",
    precision: Precision = "float32",
    threads: Threads = None,
    no_peers: NoPeers = False,
    imports: Import = None,
    out: Out = None,
    missing: Missing = False,
    as_json: Json = False,
) -> None:
    """Peak memory of a training step by length, and bytes of the state by context."""
    request = request_of(words, imports, device, precision, threads, budget, repeats, no_peers)
    options = {
        "widths": numbers("width", width, MOST_WIDTH),
        "lengths": numbers("length", length),
        "contexts": numbers("context", context),
        "batch_size": batch_size,
    }
    run("memory", request, options, out=out, missing=missing, as_json=as_json)


@app.command("decode")
def decode_(
    words: Words = None,
    width: Width = "128",
    context: Contexts = "1K,4K,16K,64K,256K,1M",
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Rows read and decoded at once.")] = 1,
    drift: Annotated[
        int | None, typer.Option(min=100, max=MOST_TOKENS, help="Steps to follow in float32 beside float64.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds of reading, for the longest context.")] = 60.0,
    repeats: Annotated[int, typer.Option(help="Most single steps of a cell.")] = 200,
    device: Device = "auto",
    precision: Precision = "float32",
    threads: Threads = None,
    no_peers: NoPeers = False,
    imports: Import = None,
    out: Out = None,
    missing: Missing = False,
    as_json: Json = False,
) -> None:
    """Tokens a second of reading a context and of going on token by token, by context."""
    request = request_of(words, imports, device, precision, threads, budget, repeats, no_peers)
    options = {
        "widths": numbers("width", width, MOST_WIDTH),
        "contexts": numbers("context", context),
        "batch_size": batch_size,
        "drift": drift,
    }
    run("decode", request, options, out=out, missing=missing, as_json=as_json)


@app.command("long-context")
def long_context_(
    context: typer.Context,
    words: Words = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Settings that small models learn in seconds: {', '.join(long_context.PRESETS)}."),
    ] = None,
    task: Annotated[str, typer.Option(help="A task whose rows have a length to be varied.")] = "niah",
    options: Set = None,
    layers: Layers = "2*({mixer} swiglu)",
    width: OneWidth = 64,
    length: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Of training rows.")] = 64,
    times: Annotated[str, typer.Option(help="Lengths of tests, in that of training, by commas.")] = "1,2,4,8,16,32,64",
    rows: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Of a test.")] = 256,
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a batch of tests; its size follows.")
    ] = 16384,
    training: Train = None,
    seeds: Seeds = 1,
    budget: Annotated[float, typer.Option(help="Seconds of a training, and of a test.")] = 60.0,
    device: Device = "auto",
    precision: Precision = "float32",
    threads: Threads = None,
    imports: Import = None,
    out: Out = None,
    missing: Missing = False,
    as_json: Json = False,
) -> None:
    """Accuracy by length and depth of what was learned on short rows, and the effective length."""
    set_by_name = {
        key: value
        for key, value in long_context.preset(preset).items()
        if key in ("options", "training") or not _is_given(context, key)
    }
    asked: dict[str, Any] = {"task": task, "layers": layers, "width": width, "length": length, "times": times}
    asked |= {"rows": rows, **set_by_name}
    if asked["task"] != long_context.preset(preset).get("task", task):
        asked["options"] = {}  # they are another task's
    request = request_of(words, imports, device, precision, threads, budget)
    train_length = asked["length"]
    chosen = {
        "task": asked["task"],
        "options": {**asked.get("options", {}), **parse_overrides(options or [])},
        "layers": asked["layers"],
        "width": asked["width"],
        "train_length": train_length,
        "times": numbers("times", asked["times"], MOST_TOKENS // train_length),
        "rows": asked["rows"],
        "tokens": tokens,
        "training": {**asked.get("training", {}), **training_options(training or [])},
        "seeds": seeds,
    }
    run("long-context", request, chosen, out=out, missing=missing, as_json=as_json)


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


@app.command("mad")
def mad_(
    words: Words = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    variations: Annotated[bool, typer.Option("--variations", help="Beside the baselines, every variation.")] = False,
    share: Annotated[float, typer.Option(help="Of the published training, such as 0.01.")] = 0.01,
    layers: Layers = "2*({mixer} swiglu)",
    width: OneWidth = 128,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Rows of a batch of training.")] = mad.BATCH,
    lr: Annotated[str, typer.Option(help="Learning rates to choose from, by commas.")] = "1e-3",
    weight_decay: Annotated[str, typer.Option(help="Weight decays to choose from, by commas.")] = "0",
    training: Train = None,
    seeds: Seeds = 1,
    budget: Annotated[float, typer.Option(help="Seconds of a training.")] = 60.0,
    device: Device = "auto",
    precision: Precision = "float32",
    threads: Threads = None,
    imports: Import = None,
    out: Out = None,
    missing: Missing = False,
    as_json: Json = False,
) -> None:
    """The six tasks of MAD on a share of the published training, or those named by --task, and their average."""
    if not 0 < share <= 1:
        raise UsageError(f"--share {share:g} is not allowed: it should be above 0 and at most 1.")
    request = request_of(words, imports, device, precision, threads, budget)
    chosen = {
        "names": task or [],
        "variations": variations,
        "layers": layers,
        "width": width,
        "share": share,
        "batch_size": batch_size,
        "rates": fractions("lr", lr),
        "decays": fractions("weight-decay", weight_decay),
        "training": training_options(training or []),
        "seeds": seeds,
    }
    run("mad", request, chosen, out=out, missing=missing, as_json=as_json)
