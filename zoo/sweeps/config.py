"""The options of a sweep, from a YAML file, from a recipe with lists, or from the folder of one that has begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from zoo.core import yaml_text
from zoo.core.errors import UsageError, quoted, unknown
from zoo.core.options import Options
from zoo.core.readers import check_path, shown
from zoo.core.run_files import is_run
from zoo.recipes import list_recipes, list_sweeps, sweep_text
from zoo.sweeps.search import Search
from zoo.sweeps.space import SEED, VARIANT, Space, plain, read_space
from zoo.sweeps.store import SWEEP, is_sweep, read_sweep
from zoo.training.options import Experiment
from zoo.training.recipes import read_recipe

MOST_SEED = 2**63 - 1


class Choose(Options, label="sweep.choose"):
    """A first stage in which one option is chosen by validation.

    Attributes:
        key: the option, for each combination of all others.
        seeds: seeds of this stage; the results have none of them.
    """

    key: str = "train.lr"
    seeds: tuple[int, ...] = Field(min_length=1)


class Budget(Options, label="sweep.budget"):
    """When no further trial is started; those that run are finished.

    Attributes:
        seconds: of training, those of all trials together.
        trials: number of trials.
        slice: seconds of each call of the command, by the clock; the next call continues.
    """

    seconds: float | None = Field(default=None, gt=0)
    trials: int | None = Field(default=None, ge=1)
    slice: float | None = Field(default=None, gt=0)


class SweepConfig(Options, label="sweep"):
    """A search over the options of an experiment.

    Attributes:
        name: by default the file's, or the recipe's with `-sweep`.
        out: the folder, by default `runs/<name>`.
        experiment: a recipe by its name or its file, or a mapping like one.
        space: keys of the experiment, each with a list of values, a distribution, or one value. `variant` names
            variants of the recipe, by default all; `words.<name>` a word of its patterns.
        search: grid, random(20) or asha(n=20), see `Search`.
        seeds: the seeds of every combination, the same as a list for `train.seed`.
        choose: an option that is chosen in a first stage, see `Choose`.
        budget: when no further trial is started, see `Budget`.
        retries: how often a trial that failed is started again.
        workers: number of trials at once, by default one for each processor.
    """

    name: str = "sweep"
    out: str | None = None
    experiment: dict[str, Any]
    space: dict[str, Any] = Field(default_factory=dict)
    search: Search = Field(default_factory=Search)
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    choose: Choose | None = None
    budget: Budget = Field(default_factory=Budget)
    retries: int = Field(default=0, ge=0, le=100)
    workers: int | None = Field(default=None, ge=1, le=1024)

    @field_validator("search", mode="before")
    @classmethod
    def _search(cls, value: Any) -> Any:
        return Search.of(value)

    @field_validator("choose", mode="before")
    @classmethod
    def _choose(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("seeds"), list):
            value = {**value, "seeds": tuple(value["seeds"])}
        return Choose.of(value)

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        return Budget.of(value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> SweepConfig:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise UsageError(f"name={quoted(self.name)} is not allowed: it should be the name of a folder.")
        check_path(self.name, "name")
        check_path(self.out or "", "out")
        for what, seeds in (("seeds", self.seeds or ()), ("choose.seeds", self.choose.seeds if self.choose else ())):
            if wrong := [seed for seed in seeds if not 0 <= seed <= MOST_SEED]:
                raise UsageError(f"sweep: {what}={wrong[0]} is not allowed: a seed is a whole number from 0.")
            if len(set(seeds)) < len(seeds):
                raise UsageError(f"sweep: {what}={list(seeds)} holds a seed twice.")
        if self.seeds is not None and SEED in self.space:
            raise UsageError(f"sweep: seeds and {SEED} are both given: they are the same.")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.out or Path("runs", self.name))

    def read_space(self) -> Space:
        """The space, with the variants of the recipe as its first axis and the seeds as its last.

        Raises:
            UsageError: see `zoo.sweeps.space.read_space`; a distribution that nothing draws from, or a choice of what
                is no list.
        """
        space = read_space(self.space, self.experiment)
        axes = {k: v for k, v in space.axes.items() if k not in (SEED, VARIANT)}
        seeds = list(self.seeds) if self.seeds else space.axes.get(SEED)
        if seeds is None:
            fixed = space.fixed.pop(SEED, None)
            seeds = None if fixed is None else [fixed]
        table = self.experiment.get("variants")
        variants = space.axes.get(VARIANT) or [space.fixed.pop(VARIANT, None)]
        if variants == [None]:
            variants = list(table) if isinstance(table, Mapping) else []
        space = space._replace(axes={**({VARIANT: variants} if variants else {}), **axes})
        if seeds is not None:
            space.axes[SEED] = seeds
        if space.drawn and self.search.name == "grid":
            told = "a grid draws nothing. Add --samples 20, or search: random(20)"
            raise UsageError(f"{next(iter(space.drawn))} is given as a distribution: {told}.")
        if self.search.n is not None and not space.drawn:
            told = 'no key is given as one, such as train.lr="{log_uniform: [1e-4, 1e-2]}"'
            raise UsageError(f"sweep.search: n={self.search.n} is a number of draws from distributions, but {told}.")
        if space.drawn and self.search.n is None:
            raise UsageError("sweep.search: give the number of draws, such as asha(n=20).")
        if {SEED, VARIANT} & space.drawn.keys():
            raise UsageError(f"{SEED} and {VARIANT} are not drawn: give a list.")
        self._check_choose(space)
        return space

    def _check_choose(self, space: Space) -> None:
        if self.choose is None:
            return
        key, seeds = self.choose.key, space.axes.get(SEED, [0])
        if key not in space.axes or key == SEED:
            known = [k for k in space.axes if k != SEED]
            raise UsageError(f"choose={quoted(key)} is no key with a list here. Those that are: {', '.join(known)}.")
        if space.drawn:
            raise UsageError(f"choose={quoted(key)} goes with lists, not with draws from {', '.join(space.drawn)}.")
        if both := sorted(set(seeds) & set(self.choose.seeds)):
            told = f"seed {both[0]} is one of each"
            raise UsageError(f"choose.seeds and seeds should have no seed in common: {told}.")


def read_sweep_config(
    source: Any, space: Mapping[str, Any] | None = None, variants: list[str] | None = None, **options: Any
) -> SweepConfig:
    """A sweep by name, file, folder or mapping, or an experiment that becomes one by its lists.

    Args:
        source: a sweep that comes with the package, a YAML file, the folder of a sweep, a mapping with the key
            `experiment`, or whatever stands for an experiment.
        space: keys and values, over those of the sweep.
        variants: variants of a recipe.
        options: of `SweepConfig`, over those of the sweep, and `samples`, the number of draws of a search, by default
            a random one; None leaves one out.

    Raises:
        UsageError: any wrong option.
    """
    data = _read_source(source)
    experiment = data.get("experiment")
    if isinstance(experiment, str | Path):
        experiment = read_recipe(experiment)
        experiment.pop("out", None)
    if not isinstance(experiment, Mapping):
        raise UsageError(f"experiment={quoted(experiment, 60)} is not allowed: it should be a recipe, or a mapping.")
    data["experiment"] = plain(experiment)
    given = data.get("space", {})
    if not isinstance(given, Mapping):
        raise UsageError(f"space={quoted(given, 60)} is not allowed: it should be a mapping of keys to values.")
    more = {str(k): plain(v) for k, v in (space or {}).items()}
    if variants:
        more[VARIANT] = plain(variants)
    data["space"] = {**{str(k): plain(v) for k, v in given.items()}, **more}
    options = {k: plain(v) for k, v in options.items() if v is not None}
    if (samples := options.pop("samples", None)) is not None:
        search = Search.read(options.get("search", data.get("search", "random")))
        options["search"] = {**search, "n": samples}
    if SEED in more:
        data.pop("seeds", None)
    if "seeds" in options:
        data["space"].pop(SEED, None)
    return SweepConfig(**{**data, **options})


def _read_source(source: Any) -> dict[str, Any]:
    if isinstance(source, Experiment):
        named = source.model_dump(mode="json", exclude={"out"})
        return {"name": f"{source.name}-sweep", "experiment": named}
    if isinstance(source, Mapping):
        data = {str(k): v for k, v in source.items()}
        if "experiment" in data:
            return data
        return {"name": f"{data.get('name', 'experiment')}-sweep", "experiment": {"name": "experiment", **data}}
    if str(source) in list_sweeps():
        return {"name": str(source), **yaml_text.load(sweep_text(str(source)), str(source))}
    path = check_path(source)
    if path.is_dir() and is_sweep(path):
        begun = read_sweep(path)
        return {**{k: v for k, v in begun.items() if k in SweepConfig.model_fields}, "out": str(path)}
    if path.is_file() and isinstance(data := yaml_text.read(path), dict) and "experiment" in data:
        return {"name": path.stem, **data}
    known = [*list_sweeps(), *list_recipes()]
    if str(source) not in known and path.is_dir() and not is_run(path):
        raise UsageError(f"{shown(path)} is neither a sweep (with {SWEEP}) nor a run folder (with config.yaml).")
    if str(source) not in known and not path.exists() and path.suffix not in (".yaml", ".yml") and len(path.parts) < 2:
        raise unknown("sweep or recipe", str(source), known)
    recipe = read_recipe(source)
    recipe.pop("out", None)
    return {"name": f"{recipe['name']}-sweep", "experiment": recipe}


__all__ = ["Budget", "Choose", "SweepConfig", "read_sweep_config"]
