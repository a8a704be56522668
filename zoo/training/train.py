"""`zoo.train`: one experiment into its run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zoo.core.errors import UsageError
from zoo.core.run_files import CHECKPOINTS
from zoo.models.ends import Ends
from zoo.tasks.protocol import Task
from zoo.training import checkpoints, imports, machine
from zoo.training.callbacks import Callback, Callbacks
from zoo.training.compiling import check_compilation
from zoo.training.fit import Parts
from zoo.training.given import described
from zoo.training.init import as_init
from zoo.training.loop import Trainer
from zoo.training.options import Experiment
from zoo.training.processes import check_shared, join
from zoo.training.progress import Reporter
from zoo.training.randomness import kept_random_state
from zoo.training.recipes import read_experiment
from zoo.training.result import Result, has_ended
from zoo.training.run import RunFolder
from zoo.training.starting import Start, check_object, prepare
from zoo.training.stopping import stop_on_signals
from zoo.training.watch import Watch


@kept_random_state()
def train(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    overrides: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    resume: bool = False,
    fresh: bool = False,
    quiet: bool = False,
    task: Task | None = None,
    model: Ends | None = None,
    callbacks: Iterable[Callback] = (),
    watch: Watch | None = None,
) -> Result:
    """Train one experiment into its run folder.

    If the folder contains a run, it is resumed, to the same bits as if it had never stopped. A finished run is
    returned unchanged, or goes on where it is given more `train.steps`. The caller's random states (of Python, numpy
    and torch) are restored afterwards.

    In a script that `torchrun` has started in several processes, these train one model together, each on its rows of
    every batch. All call it in the same way and get the same result; the first one writes the folder and calls the
    callbacks.

    Args:
        experiment: a recipe's name, a YAML file, a run folder, a mapping or an `Experiment`.
        overrides: dotted keys and values, such as `{"train.steps": 500}`.
        variant: the variant of a recipe.
        resume: fail unless a checkpoint exists.
        fresh: delete the existing run in the folder and start again.
        quiet: print nothing.
        task: a task as an object, in place of the experiment's; `zoo.tasks.from_dataset` and `from_batches` make one of
            data of your own. A run of such a task is resumed with the same object.
        model: a model to start from, of `create_model`, `swap`, `from_hf` or `load`; the same as `"model": model` in a
            mapping. The training has its config, and starts from a copy of its weights in `train.parameters`; the
            object stays as it is. `{"init": {"skip": [...]}}` and the other options of `init` apply.
        callbacks: objects of classes derived from `zoo.Callback`. A run that has ended already calls none.
        watch: what a sweep asks of the training.

    Raises:
        UsageError: any wrong input, a folder in use, a run of another config, no checkpoint that can be read.
        RunError: a full disk, a loss that is not finite, or an exception of a callback, which is then the cause; the
            last good checkpoint stays.
        Interrupted: SIGINT or SIGTERM, after a checkpoint.
    """
    group, watch = join(), watch or Watch()

    def read() -> tuple[Experiment, Parts, Callbacks, Ends | None]:
        called = Callbacks(callbacks)
        given = overrides or {} if task is None else _with_task(overrides or {}, task)
        source, given, start_from = _with_model(experiment, given, model)
        chosen = read_experiment(source, given, variant)
        parts = chosen.build(task)
        machine.choose_device(chosen.train.device)
        if parts.objective.trains and chosen.init is None:
            part = parts.objective.trains.removesuffix(".")
            raise UsageError(f"This objective trains {part} alone, in a model that is trained: init=RUN names it.")
        check_compilation(chosen.train)
        check_shared(group.size, chosen.train, parts.objective, parts.model)
        if resume and fresh:
            raise UsageError("--resume goes on from a run and --fresh deletes it: give one of them.")
        if group.leads:
            if resume and not checkpoints.steps(chosen.folder / CHECKPOINTS):
                raise UsageError(f"{chosen.folder} holds no checkpoint to resume from: leave out --resume to start.")
            _check_fine_tuning(source, given, chosen.folder)
        return chosen, parts, called, start_from

    def statement(found: tuple[Experiment, Parts, Callbacks, Ends | None]) -> dict[str, Any]:
        flags = {"out": str(found[0].folder), "resume": resume, "fresh": fresh}
        return {**found[0].resolved(found[1]), **flags, "versions": machine.versions()}

    chosen, parts, called, start_from = group.agreed(read, statement)
    group.set_timeout(chosen.train.timeout)
    group.cut_sequences(chosen.train.sequence_processes)
    group.share_experts(chosen.train.expert_parallel)
    if not group.leads:
        called = Callbacks([])
    metric = chosen.train.selects_by(parts.objective.metric)
    reporter = Reporter(chosen.name, chosen.train.steps, metric, quiet=quiet or not group.leads)
    start: Start | None = None
    with contextlib.ExitStack() as held:
        run = RunFolder(chosen.folder)

        def open_folder() -> tuple[dict[str, list[Any]], dict[str, Any] | None]:
            nonlocal chosen, start
            if chosen.init is not None:
                chosen, start = prepare(chosen, parts.model, start_from, fresh=fresh, trains=parts.objective.trains)
            held.enter_context(run)
            changed = run.open(chosen.resolved(parts), fresh=fresh)
            if start is not None:
                run.write_init(start.data())
            imports.record(run.path, parts)
            return changed, run.result(reporter.say)

        changed, old = group.told(open_folder)
        if old is not None and has_ended(old, chosen.train):
            reporter.say(f"{run.path} holds this run, {old['status']} at step {old['steps']}: nothing to do.")
            return Result(run.path, old["status"], old)
        if start is not None:
            reporter.say(f"{run.path} starts from {start.source}: {start.transfer}.")
        stop = held.enter_context(stop_on_signals(watch.stops))
        held.enter_context(reporter)
        return Trainer(chosen, parts, run, reporter, stop, called, watch, changed, start, group).run()


def _with_task(overrides: Mapping[str, Any], task: Task) -> dict[str, Any]:
    for key in overrides:
        if str(key).partition(".")[0] == "task":
            raise UsageError(f"{key} and a task object are given: options of the object are set when it is made.")
    return {**overrides, "task": described(task)}


def _with_model(
    experiment: Any, overrides: Mapping[str, Any], model: Ends | None
) -> tuple[Any, Mapping[str, Any], Ends | None]:
    """The experiment without a model object, the overrides with its config, and the object."""
    if isinstance(experiment, Mapping) and isinstance(experiment.get("model"), nn.Module):
        if model is not None:
            raise UsageError("Two models are given: one in the experiment, and model=.")
        model = experiment["model"]
        experiment = {k: v for k, v in experiment.items() if k != "model"}
    if model is None:
        return experiment, overrides, None
    config = check_object(model).config.model_dump(mode="json")
    own = as_init(experiment.get("init")) if isinstance(experiment, Mapping) else None
    init = as_init(overrides.get("init")) or {}
    for given in (own, init, {"source": overrides.get("init.source")}):
        if isinstance(given, Mapping) and given.get("source") is not None:
            raise UsageError("A model object and init.source are given: a training starts from one of them.")
    rest = {k: v for k, v in overrides.items() if k != "init"}
    return experiment, {"init": {**init, "source": None}, "model": config, **rest}, model


def _check_fine_tuning(experiment: Any, overrides: Mapping[str, Any], folder: Path) -> None:
    """Refuse a training into a new folder by the config of a trained run that does not say which weights it means."""
    path = Path(experiment) if isinstance(experiment, str | Path) else None
    if path is None or not checkpoints.steps(path / CHECKPOINTS) or folder.resolve() == path.resolve():
        return
    if not {"init", "init.source"} & overrides.keys() and not checkpoints.steps(folder / CHECKPOINTS):
        told = f"init={path} starts {folder} from its weights, init=null from new ones"
        raise UsageError(f"{path} is a trained run: {told}.")
