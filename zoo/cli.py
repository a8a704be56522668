"""The `zoo` command: parses, calls, prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import zoo
from zoo.core.errors import UsageError, UsageWarning
from zoo.recipes import list_recipes, list_sweeps

# Help, the version and completion are answered without torch, numpy and pydantic: commands import what they need.
app = typer.Typer(
    name="zoo",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer brings click along under a name of its own; its public exceptions lead to the base class.
CommandError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options to set, such as train.steps=500.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

WHICH = typer.Option(help="Checkpoint of a run: best (the default), last, or one such as step_300.")

NoAnswers = Annotated[bool, typer.Option("--no-answers", help="Do not run the models on an example.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sequence-zoo {zoo.__version__}")
        raise typer.Exit


@app.callback()
def zoo_(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, compare and recombine sequence models."""


LISTS = (
    "mixers",
    "nodes",
    "models",
    "tasks",
    "objectives",
    "norms",
    "residuals",
    "recipes",
    "sweeps",
    "benchmarks",
    "options",
)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="|".join(LISTS), autocompletion=lambda: list(LISTS))],
    pattern: Annotated[str, typer.Argument(help="Names to list, as a shell pattern.")] = "*",
    solved: Annotated[
        bool,
        typer.Option("--solved", help="Of tasks: which words have solved them, in runs whose figures are in the tree."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List mixers, nodes of patterns, models, tasks, objectives, norms, residual kinds, recipes, sweeps or options."""
    from zoo.listing import listing, solved_tasks

    if not solved:
        _print_listing(listing(what, pattern), as_json)
        return
    if what != "tasks":
        raise UsageError(f"--solved goes with tasks, not with {what}: zoo list tasks --solved.")
    found, others = solved_tasks(pattern)
    _print_listing(found, as_json)
    if others and not as_json:
        print(f"No run in the tree has solved: {', '.join(others)}.")


@app.command()
def show(
    task: Annotated[
        str, typer.Argument(metavar="TASK|RUN", help="A task, a recipe, a run folder, or a folder of runs.")
    ],
    overrides: Overrides = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test. Default: train for a task, validation for a run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the stream of examples.")] = 0,
    row: Annotated[int, typer.Option(min=0, max=2**62, help="Index of the example in the stream.")] = 0,
    which: Annotated[str | None, WHICH] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a picture to this file (.png, .svg, .pdf; for a run also .gif, .webp).")
    ] = None,
) -> None:
    """Draw an example of a task, or how a run's model solves one."""
    from zoo.core.files import save_figure
    from zoo.training.recipes import names_folder, parse_overrides, read_task

    changes = parse_overrides(overrides or [])
    if names_folder(task):
        from rich.console import Console

        from zoo.report.solving import in_terminal, save, solve_runs

        named = solve_runs(Path(task), changes, split=split or "validation", seed=seed, row=row, which=which or "best")
        if picture is None:
            console = Console(highlight=False)
            for line in (line for each in named for line in in_terminal(each, console.width)):
                console.print(line, soft_wrap=True)
        else:
            save(named, picture)
            print(picture)
        return
    if which is not None:
        raise UsageError(f"--which={which} chooses a checkpoint of a run: {task} is no run folder.")
    chosen = read_task(task, changes)
    batch = chosen.sample(1, split=split or "train", seed=seed, start=row)  # type: ignore[arg-type]
    if picture is None:
        print(chosen.render(batch))
        if chosen.many_answers is not None:
            print(f"\nThe targets are {chosen.many_answers}. Other answers are right too: the task checks them.")
    else:
        save_figure(chosen.draw(batch), picture)
        print(picture)


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe, a YAML file, or a run folder.", autocompletion=lambda: list_recipes())
    ],
    overrides: Overrides = None,
    variant: Annotated[list[str] | None, typer.Option(help="Train only this variant. May be repeated.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Fail unless a checkpoint exists.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the existing run in the folder and start again.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="Send records to this tracker: wandb or mlflow. May be repeated.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Train with this number of processes of this machine, each on its share of rows.")
    ] = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="With --processes: start them again this often when one of them is lost.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the options and what training takes. Train and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with --dry-run.")] = False,
) -> None:
    """Train every variant of a recipe, each in its own process.

    If the folder contains a run, the run is resumed.
    """
    if dry_run:
        if resume or fresh:
            raise UsageError(f"--dry-run trains nothing: leave out --{'fresh' if fresh else 'resume'}.")
        for option, number in (("--processes", processes), ("--max-restarts", max_restarts)):
            if number is not None:
                raise UsageError(f"--dry-run trains nothing: leave out {option}.")
        _print_estimate(recipe, overrides or [], variant or [], as_json)
        return
    if as_json:
        raise UsageError("--json belongs to --dry-run: what a training comes to is in the result.json of its folder.")
    from zoo.training.launch import train_recipe

    try:
        how: dict[str, Any] = {"resume": resume, "fresh": fresh, "quiet": quiet, "track": track or []}
        how |= {"processes": processes, "max_restarts": max_restarts}
        results = train_recipe(recipe, overrides or [], variant or [], **how)
    except KeyboardInterrupt as error:  # typer would drop its text
        _fail(str(error) or "Interrupted.", getattr(error, "exit_status", 130))
    for line in results.lines:
        print(line)
    raise typer.Exit(results.status)


@app.command()
def sweep(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP|RECIPE",
            help="A sweep or a recipe by name, a YAML file of either, or the folder of a sweep.",
            autocompletion=lambda: [*list_sweeps(), *list_recipes()],
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Options, such as train.steps=500; a list is swept: train.lr=[1e-3,3e-3]."
        ),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant of a recipe. May be repeated.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder. Default: runs/NAME.")] = None,
    search: Annotated[str | None, typer.Option(help="grid, random(20), or asha(n=20, grace=100).")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of draws from distributions, for each combination of the lists.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of every combination, such as 0,1,2.")] = None,
    choose: Annotated[str | None, typer.Option(help="A key whose value is chosen by validation first.")] = None,
    choose_seeds: Annotated[str | None, typer.Option(help="Seeds of that choice, such as 100,101.")] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Start no trial after this many seconds of training in all.")
    ] = None,
    budget_trials: Annotated[int | None, typer.Option(help="Start at most this number of trials.")] = None,
    slice_seconds: Annotated[
        float | None,
        typer.Option(help="Start no trial after this many seconds of this call; the same command continues."),
    ] = None,
    retries: Annotated[int | None, typer.Option(help="Start a failed trial again, at most this often.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of trials at once. Default: one for each processor.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster. Default: this machine.")] = None,
    ray: Annotated[
        bool | None,
        typer.Option(
            "--ray/--no-ray",
            help="Train by Ray, or one trial after another in this process. Default: by Ray where it is installed and "
            "--workers is not 1.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train an experiment at many points of a space of options.

    If the folder contains this sweep, the sweep continues. The exit status is 1 if a trial failed.
    """
    from zoo.sweeps.command import run

    try:
        lines, status = run(
            source,
            overrides or [],
            variants=variant or [],
            seeds=seeds,
            choose=choose,
            choose_seeds=choose_seeds,
            budget={"seconds": budget_seconds, "trials": budget_trials, "slice": slice_seconds},
            options={"out": out, "search": search, "samples": samples, "retries": retries, "workers": workers},
            address=address,
            ray=ray,
            dry=dry_run,
            quiet=quiet,
        )
    except KeyboardInterrupt as error:  # typer would drop its text
        _fail(str(error) or "Interrupted.", getattr(error, "exit_status", 130))
    for line in lines:
        print(line)
    raise typer.Exit(status)


def _print_estimate(recipe: str, overrides: list[str], variants: list[str], as_json: bool) -> None:
    from zoo.report.estimates import estimate_lines
    from zoo.training.estimate import estimate
    from zoo.training.recipes import parse_overrides

    found = estimate(recipe, parse_overrides(overrides), variants=variants)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print("\n\n".join("\n".join(estimate_lines(each)) for each in found))


@app.command("eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    which: Annotated[str, typer.Option(help="Checkpoint: best, last, or one such as step_300.")] = "best",
    as_json: Json = False,
) -> None:
    """Score a run's model on its task.

    Options change the task, such as task.n_pairs=8, or how it is answered, such as objective.starts=16.
    """
    from zoo.training.evaluation import evaluate_run, score_lines
    from zoo.training.recipes import parse_overrides

    score = evaluate_run(run, parse_overrides(overrides or []), split=split, which=which)
    print(json.dumps(score, indent=1) if as_json else "\n".join(score_lines(score)))


@app.command()
def generate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FOLDER", help="A run folder, a saved model, or the folder of a published checkpoint."
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="A text prompt. May be repeated.")] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(help='A prompt of token ids, such as "1 2 3". May be repeated.')
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="Read a prompt from this file, or from standard input (-).")
    ] = None,
    example: Annotated[
        int | None, typer.Option(min=0, max=2**62, help="Answer the example of the run's task with this index.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --example: train, validation or test.")] = "validation",
    as_bytes: Annotated[bool, typer.Option("--bytes", help="Token ids are bytes: read and write text.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Largest number of new tokens.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Above 0: sample. Otherwise take the most probable token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most probable tokens with this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Least probability of a token, relative to the most probable one.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop after this token id. May be repeated. none: never stop early.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Read the prompt in pieces of this number of tokens.")
    ] = None,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Read the prompt in both directions (prefix-LM), attention only.")
    ] = False,
    which: Annotated[str | None, WHICH] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the step first: slow to start, then faster a token.")
    ] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print only the complete result.")] = False,
    as_json: Json = False,
) -> None:
    """Continue prompts, or answer an example of a run's task."""
    from zoo.training.generating import respond

    pieces = respond(
        source,
        prompts=prompt or [],
        tokens=tokens or [],
        file=prompt_file,
        example=example,
        split=split,
        as_bytes=as_bytes,
        which=which,
        device=device,
        stop=stop or [],
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        prefill_chunk=prefill_chunk,
        prefix=prefix or None,
        compile=compile or None,
        stream=not no_stream,
        as_json=as_json,
    )
    for piece in pieces:
        print(piece, end="", flush=True)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|FOLDER", help="A run folder, a checkpoint of one, or a saved model.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write. It does not exist yet, or is empty.")],
    form: Annotated[
        str, typer.Option("--format", help="hf: as transformers reads it, for models of families. zoo: as zoo.save.")
    ] = "hf",
    which: Annotated[str, typer.Option(help="Checkpoint of a run: best, last, or one such as step_300.")] = "best",
) -> None:
    """Write the model of a run or of a folder in a published format."""
    from zoo.training.exchange import export_model

    print(export_model(source, out, form=form, which=which))


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A published checkpoint, or a .pth file of RWKV-7's authors.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write. It does not exist yet, or is empty.")],
) -> None:
    """Save the model of a published checkpoint for the zoo."""
    from zoo.training.exchange import import_model

    print(import_model(source, out))


@app.command()
def compare(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="PLACE...", help="Run folders, sweeps, folders of these, or files of zoo bench."),
    ],
    report: Annotated[
        Path | None, typer.Option(help="Write a page with plots to this file, such as report.html.")
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Group trials by these keys, such as words.mixer,train.steps.")
    ] = None,
    best: Annotated[
        list[str] | None, typer.Option(help="Choose the best value of this key on validation, such as train.lr.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Show differences to the group that has this value, such as gqa.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="The figure to compare, such as accuracy.")] = None,
    learned: Annotated[
        str | None,
        typer.Option(help="When a seed has learned: chance (above chance, the default), or a figure such as 0.9."),
    ] = None,
    sql: Annotated[
        str | None, typer.Option(help="Ask the tables trials, curves and problems: 'select ... from trials'.")
    ] = None,
    no_answers: NoAnswers = False,
    as_json: Json = False,
) -> None:
    """Compare runs or the trials of sweeps in a table. With --report, write a page."""
    from zoo.core.files import check_page
    from zoo.report import gather, terminal, write_report
    from zoo.report.trials import Question

    if report is not None:
        check_page(report)
    question = Question.read(by, best, baseline, metric, learned)
    if sql is not None and (question is not None or report is not None):
        raise UsageError("--sql cannot be combined with other options than --json: it answers one question.")
    found = gather(places, _note)
    if sql is not None:
        terminal.print_answer(found.ask(sql), as_json=as_json)
        return
    comparison = found.compared(question)
    runs = found.runs if question is None else []
    terminal.print_runs_and_trials(runs, comparison, found.measurements, as_json=as_json, note=_note)
    if report is not None:
        comparisons = [] if comparison is None else [comparison]
        write_report(runs, report, found.measurements, comparisons, ask_models=not no_answers)
        print(report, file=sys.stderr if as_json else sys.stdout)
    elif found.measurements:
        _note("What zoo bench measured is shown on a page: add --report report.html.")


@app.command()
def report(
    places: Annotated[list[Path] | None, typer.Argument(help="Folders and files to search. Default: runs.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write. Default: report.html in the first folder.")
    ] = None,
    no_answers: NoAnswers = False,
) -> None:
    """Write a page with all runs, sweeps and measurements below a folder."""
    from zoo.core.files import check_page
    from zoo.report import gather, write_report

    if out is not None:
        check_page(out)
    places = places or [Path("runs")]
    found = gather(places, _note)
    comparisons = found.each_sweep(_note)
    first = places[0] if places[0].is_dir() else places[0].parent
    counts = {"run": len(found.runs), "sweep": len(comparisons), "measurement": len(found.measurements)}
    told = ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for what, n in counts.items() if n or what == "run")
    page = write_report(
        found.runs,
        out or first / "report.html",
        found.measurements,
        comparisons,
        ask_models=not no_answers,
        command="zoo report",
    )
    print(f"{page} ({told})")


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> int | None:
    """Measure speed, memory and recall (see zoo bench --help)."""
    from zoo.benchmarks.command import bench as measure

    return measure(context.args)


@app.command()
def laws(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="WORD...",
            help="Mixers, norms, residual kinds or patterns to check, such as gqa, 'loop(4, gqa swiglu)' or rmsnorm.",
        ),
    ],
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    law: Annotated[
        list[str] | None, typer.Option(help="Check only this law, by name or number. May be repeated.")
    ] = None,
    thorough: Annotated[bool, typer.Option("--all", help="Check every set of options in every precision.")] = False,
    times: Annotated[bool, typer.Option("--times", help="Print the processor seconds of each law.")] = False,
    as_json: Json = False,
) -> None:
    """Check the laws of mixers, norms, residual kinds and patterns.

    Prints a line for each law. The exit status is 1 if a law is broken.
    """
    from zoo.laws.verdicts import lines, verdicts

    found = verdicts(words, laws=law, device=device, thorough=thorough)
    if as_json:
        data = [verdict.data() for verdict in found]
        print(json.dumps(data, indent=1))
        raise typer.Exit(int(not all(each["holds"] for each in data)))
    status = 0
    for line, holds in lines(found, times=times):
        print(line, flush=True)
        status = status or int(not holds)
    raise typer.Exit(status)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine and installation support."""
    from zoo.training.doctor import examine, lines

    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    found = lines(facts)
    width = max(len(what) for what, _ in found)
    for what, finding in found:
        print(f"{what:<{width}}  {finding}")


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _print_listing(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    width = max((len(f["name"]) for f in found), default=0)
    for f in found:
        about = f["about"]
        if "default" in f:  # an option, of which the page says the rest
            about = f"({f['type']}; {f['default']}) {about.partition('. ')[0].rstrip('.')}"
        print(f"{f['name']:<{width}}  {about}".rstrip())


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """A warning as the command prints it: without the place in the code where it is our own."""
    if issubclass(category, UsageWarning):
        return "zoo: " + " ".join(str(message).split()) + "\n"
    return _formatwarning(message, category, *place, **more)


_formatwarning = warnings.formatwarning


def main(arguments: list[str] | None = None) -> None:
    """Run the command; wrong use is one line on standard error and exit status 2."""
    warnings.formatwarning = _one_line
    known = set(imports.refused) if (imports := sys.modules.get("zoo.core.imports")) else set()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(args=(sys.argv[1:] if arguments is None else arguments) or ["--help"], standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is found out here, not as Python ends
    except UsageError as error:
        _refuse(str(error), 2)
    except CommandError as error:
        _refuse(error.format_message(), error.exit_code)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _fail("Interrupted.", 130)
    except BrokenPipeError:  # such as `zoo list tasks | head -1`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.filename is None:  # the output: of files, what reads or writes them has told
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is tried there
        reason = error.strerror or type(error).__name__
        _fail(f"Cannot write the output: {reason}." if error.filename is None else f"{error.filename}: {reason}.", 1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "zoo":
            raise
        _fail(f"The package {error.name!r} is missing; pip install sequence-zoo brings it.", 1)
    except (MemoryError, RuntimeError) as error:
        from zoo.core.errors import RunError

        if isinstance(error, MemoryError) or "allocate" in str(error):  # numpy's, torch's on a CPU and on a GPU
            _fail(f"Not enough memory: {str(error) or 'choose smaller sizes'}", 1)
        if not isinstance(error, RunError):
            raise
        _fail(str(error), 1)
    else:
        # What could not be imported or registered was said when it failed.
        imports = sys.modules.get("zoo.core.imports")  # not loaded by commands that need no registry
        failed = imports is not None and imports.has_problems(known)
        sys.exit(status if isinstance(status, int) and status else 2 if failed else 0)


def _refuse(message: str, status: int) -> NoReturn:
    """End because of wrong input, which the first process of a machine says for all that torch has started there."""
    if "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        sys.exit(status)
    _fail(message, status)


def _fail(message: str, status: int) -> NoReturn:
    text = " ".join(message.split())
    print("zoo: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
