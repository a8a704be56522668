"""`zoo bench`: the command of every benchmark, made from its options; what it measures, prints and keeps."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import torch
import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from typer.core import TyperGroup

from zoo.benchmarks import page
from zoo.benchmarks.cells import Request
from zoo.benchmarks.subjects import choose, peers
from zoo.benchmarks.tables import notes
from zoo.core.errors import UsageError, quoted
from zoo.core.files import write_atomic, writing
from zoo.core.imports import import_source
from zoo.report import records
from zoo.report.benchmark import Benchmark, Table, benchmarks, in_order
from zoo.report.records import Record
from zoo.training import machine

MOST_THREADS = 1024


def run(
    benchmark: Benchmark,
    request: Request,
    *,
    out: Path | None = None,
    pages: Path | None = None,
    missing: bool = False,
    as_json: bool = False,
) -> None:
    """Measure; print tables, or with `as_json` a line for each record as it is made; keep all in a folder.

    Args:
        benchmark: what is measured, with its options.
        request: of which subjects, and how.
        out: folder of `NAME.jsonl`, the page and its pictures; records of other subjects or settings there are kept.
        pages: folder of the page and its pictures, where that is another one.
        missing: leave out subjects that the folder has records of already.
        as_json: print JSON lines in place of tables.

    Raises:
        UsageError: options that do not go together, or a damaged file in the folder.
    """
    if out is None and (pages is not None or missing):
        raise UsageError(f"--{'missing' if missing else 'pages'} needs --out, the folder of the records.")
    file = out / f"{benchmark.label()}.jsonl" if out is not None else None
    for folder in filter(None, (out, pages)):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # before anything is measured
    old = records.read(file) if file is not None and file.exists() else []
    if missing:
        seen = {name for r in old for name in (r.name, *r.same)}
        request = dataclasses.replace(request, subjects=[s for s in request.subjects if s.name not in seen])
        if not request.subjects:
            request.say(f"{file}: nothing is missing.")
            return
    made: list[Record] = []
    for record in _records(benchmark, request):
        made.append(record)
        if as_json:
            print(record.line(), flush=True)
        if file is not None:
            write_atomic(file, "".join(r.line() + "\n" for r in records.merged(old, made)).encode())
    if file is not None:
        page.write(type(benchmark), records.merged(old, made), file, pages or file.parent)
    if not as_json:
        console = Console()
        for table in page.tables(type(benchmark), made):
            console.print(f"\n{table.title}", soft_wrap=True, markup=False, highlight=False)
            console.print(_rich(table))
        for line in notes(made):
            print(line)


def _records(benchmark: Benchmark, request: Request) -> Iterator[Record]:
    """The records of a benchmark, as they are made.

    Raises:
        UsageError: it yields something else, or nothing.
    """
    who = f"cells of the benchmark {benchmark.label()!r}"
    found, any_yielded = benchmark.cells(request), False
    if not isinstance(found, Iterator):
        raise UsageError(f"{who} returns {quoted(found, 60)}: it should yield records.")
    for record in found:
        any_yielded = True
        if not isinstance(record, Record):
            raise UsageError(f"{who} yields {quoted(record, 60)}, no Record: make it with zoo.benchmarks.cell.")
        yield record
    if not any_yielded:
        raise UsageError(f"{who} yields no record for these layers and options: nothing was measured.")


def _rich(table: Table) -> RichTable:
    """For a terminal."""
    shown = RichTable(show_edge=False)
    for i, head in enumerate(table.head):
        shown.add_column(head, justify="right" if i else "left", no_wrap=not i)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


# ---- the command line


def shared(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORD|PATTERN]...",
            help='Layers to measure, such as mamba2 "short_conv mha" "*attention". Default: every mixer.',
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision: float32, bfloat16 (autocast), or auto.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads. Default: torch's choice.")] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Do not measure the public layers.")] = False,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Import mixers from this file or module.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write records, a page and a plot to this folder.")] = None,
    pages: Annotated[Path | None, typer.Option(help="Write the page and the plot to this folder instead.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Measure only layers without records in --out.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each record instead of tables.")
    ] = False,
) -> None:
    """The options that every benchmark has, beside its own."""


def requested(benchmark: Benchmark, options: dict[str, Any]) -> Request:
    """The request that the shared options make of a benchmark, checked.

    Raises:
        UsageError: an unknown word, device or precision, or a number out of its range.
    """
    precision, threads, imports = options["precision"], options["threads"], options["imports"] or ()
    if threads is not None and not 0 < threads <= MOST_THREADS:
        raise UsageError(f"--threads {threads:g} is not allowed: it should be above 0 and at most {MOST_THREADS:,.0f}.")
    if precision not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--precision {precision!r} is not allowed: it should be auto, float32 or bfloat16.")
    for source in imports:
        import_source(source, "--import")
    if threads is not None:
        torch.set_num_threads(threads)
    at = machine.choose_device(options["device"])
    subjects = [*choose(options["words"] or ()), *(peers() if benchmark.peers and not options["no_peers"] else [])]
    config = benchmark.config
    repeats = getattr(config, "repeats", 1)
    precision = machine.choose_precision(precision, at)
    return Request(subjects, at.type, precision, config.budget, repeats, tuple(imports))


def command_of(cls: type[Benchmark]) -> Any:
    """The function that typer makes the command of a benchmark from: its own options, then those that all have.

    An option that is not on the command line is left to the benchmark's `Config`.
    """
    config: Any = cls.Config
    common = inspect.signature(shared, eval_str=True).parameters
    words, *rest = common.values()
    if not cls.peers:
        rest = [parameter for parameter in rest if parameter.name != "no_peers"]
    own = sorted(_parameters(config), key=lambda p: p.name in ("budget", "repeats"))  # after what is measured

    def command(_context: typer.Context, **values: Any) -> None:
        given = {p.name: values[p.name] for p in own if _is_given(_context, p.name)}
        benchmark = cls(config(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}))
        options = {name: values.get(name) for name in common}
        request = requested(benchmark, options)
        kept: dict[str, Any] = {name: options[name] for name in ("out", "pages", "missing", "as_json")}
        run(benchmark, request, **kept)

    context = inspect.Parameter("_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, words, *own, *rest]
    command.__doc__ = inspect.cleandoc(cls.__doc__ or cls.title).split("\n\n")[0]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameters(config: Any) -> Iterator[inspect.Parameter]:
    """A parameter of the command for every option of a benchmark."""
    for name, field in config.model_fields.items():
        kind, default, text = field.annotation, field.default, field.description or ""
        least, most = (
            next((v for m in field.metadata if (v := getattr(m, bound, None)) is not None), None)
            for bound in ("ge", "le")
        )
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            option = typer.Option(flag, help=text)
        elif get_origin(kind) is dict:
            kind, default, option = list[str] | None, None, typer.Option(flag, metavar="KEY=VALUE", help=text)
        elif get_origin(kind) is tuple and isinstance(default, str):  # numbers by commas, which the Config reads
            kind, option = str, typer.Option(flag, help=text)
        elif get_origin(kind) is tuple:
            kind, default, option = list[get_args(kind)[0]] | None, None, typer.Option(flag, help=text)  # type: ignore[misc]
        else:
            option = typer.Option(flag, help=text, min=least, max=most)
        yield inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, option]
        )


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


class Commands(TyperGroup):
    """The benchmarks as commands, in their order."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [cls.label() for cls in in_order()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name.replace("_", "-"))
        if found is None:
            raise benchmarks.unknown(cmd_name, self.list_commands(ctx))
        return found


def bench(arguments: Sequence[str]) -> Any:
    """Run `zoo bench` with arguments."""
    app = typer.Typer(
        name="zoo bench",
        cls=Commands,
        help="Measure mixers and patterns, beside public layers.",
        add_completion=False,
        rich_markup_mode=None,
    )
    app.callback()(lambda: None)  # a group, however many benchmarks there are
    for cls in in_order():
        app.command(cls.label())(command_of(cls))
    return app(args=list(arguments) or ["--help"], prog_name="zoo bench", standalone_mode=False)
