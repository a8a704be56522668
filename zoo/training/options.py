"""The options of an experiment: one validated config of task, model, objective and training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from zoo.core.errors import UsageError, quoted
from zoo.core.memory import gib
from zoo.core.options import Options
from zoo.core.readers import check_path
from zoo.models.budget import SIZES
from zoo.models.config import ModelConfig, Recursion
from zoo.models.create import model_config
from zoo.objectives.base import objectives
from zoo.tasks.protocol import Task
from zoo.tasks.protocol import registry as tasks
from zoo.training import machine
from zoo.training.fit import Parts, fit
from zoo.training.given import FROM_PYTHON
from zoo.training.init import Init, as_init
from zoo.training.train_options import TrainConfig

SECTIONS = ("task", "model", "objective")


class Experiment(Options, label="experiment"):
    """One training run.

    Options of the model that task and objective need are filled in if they are not given: `vocab_size`, or `inputs` and
    `outputs` for a series of real vectors; `max_len`, if
    there are weights for every position; `recursion.n_puzzles`, if there are places for a puzzle embedding;
    `time_feature`, if the task has irregular times that no mixer of the pattern reads; `decoder`, for a task of the
    layout `reconstruct`.

    Attributes:
        name: the name of the run, and by default of its folder.
        out: the run folder, by default `runs/<name>`.
        task: a name, or a mapping of `name` and options.
        model: a pattern, a family-size, or a mapping of model options with `pattern` or `family`. With `n_parameters`
            instead of `d_model`, the width is the largest that fits this number of parameters; with `state_bytes`, the
            largest whose state of one row fits; with `flops_per_token`, the largest whose FLOPs of a token fit, both at
            the length of the task's rows.
        objective: a name, or a mapping of `name` and options.
        train: options of `TrainConfig`.
        init: where the first weights come from: the path of a folder, or a mapping of the options of `Init`. By
            default they are new. Options of the model that are left out are then those of the source.
    """

    name: str = "experiment"
    out: str | None = None
    task: dict[str, Any]
    model: dict[str, Any]
    objective: dict[str, Any] = Field(default_factory=lambda: {"name": "next_token"})
    train: TrainConfig = Field(default_factory=TrainConfig)
    init: Init | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_options(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields and (places := _places(key, data)):
                hint = f" Did you mean {' or '.join(repr(f'{place}.{key}') for place in places)}?"
                raise UsageError(
                    f"Unknown option of experiment {key!r}.{hint} Available: {', '.join(cls.model_fields)}."
                )
        return data

    @field_validator(*SECTIONS, "train", mode="before")
    @classmethod
    def _section(cls, value: Any, info: Any) -> Any:
        if info.field_name != "train":
            section = as_section(info.field_name, value)
            if info.field_name == "objective" and isinstance(section, dict):
                return {"name": "next_token", **section}
            return section
        return TrainConfig.of(value)

    @field_validator("init", mode="before")
    @classmethod
    def _init(cls, value: Any) -> Any:
        return Init.of(as_init(value))

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise UsageError(
                f"name={quoted(self.name)} is not allowed: it should be the name of a folder (out= takes a path)."
            )
        check_path(self.name, "name")
        check_path(self.out or "", "out")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.out or Path("runs", self.name))

    def build(self, task: Task | None = None) -> Parts:
        """The task, the objective, and the model's config with what they need filled in.

        Args:
            task: the task itself, where the section `task` describes an object (`zoo.training.given`).

        Raises:
            UsageError: any option that is wrong, or parts that do not fit together.
        """
        grows = None if self.init is None else self.init.resize_vocab
        parts = fit(self.task, self.objective, self.model, self.train.needs(), given=task, grows=grows)
        self.check(parts)
        return parts

    def check(self, parts: Parts) -> None:
        """Refuse a training that its own parts do not bear.

        Raises:
            UsageError: parts of a batch under an objective that reads it whole, or more rows than there is memory for.
        """
        if self.train.accumulate > 1 and not parts.objective.takes_parts():
            told = f"{parts.objective.name} reads a batch whole: its method updates has no argument parts"
            raise UsageError(f"train.accumulate={self.train.accumulate} is not allowed: the objective {told}.")
        self._check_room(parts)

    def _check_room(self, parts: Parts) -> None:
        """Refuses rows that this machine's memory cannot hold: those drawn at once, and those a model reads at once."""
        memory, length = machine.total_memory(), parts.objective.length
        rows = 16 * length  # bytes of what is asked and what is answered
        read = rows + 4 * length * parts.model.d_model
        learned = rows + (read - rows) / self.train.accumulate
        sizes = {"rows": rows, "eval_rows": rows, "test_rows": rows, "batch_size": learned, "eval_batch_size": read}
        for key, size in sizes.items():
            n = getattr(self.train, key)
            if memory and n is not None and n * size > memory:
                told = f"{n:,} rows of {length:,} tokens take {gib(n * size)}"
                raise UsageError(f"train.{key}={n} is too large: {told}, and this machine has {gib(memory)}.")

    def resolved(self, parts: Parts) -> dict[str, Any]:
        """Every option spelt out, defaults included, as plain data: what `config.yaml` holds."""
        return {
            "name": self.name,
            "task": self.task if FROM_PYTHON in self.task else {"name": parts.task.name, **_plain(parts.task.config)},
            "model": _plain(parts.model),
            "objective": {"name": parts.objective.name, **_plain(parts.objective.config)},
            "train": _plain(self.train),
            **({"init": _plain(self.init)} if self.init is not None else {}),
        }


def _places(option: str, data: Mapping[str, Any]) -> list[str]:
    """The sections of an experiment that have an option of this name."""
    fields: dict[str, Iterable[str]] = {
        "train": TrainConfig.model_fields,
        "model": [*ModelConfig.model_fields, *SIZES],
        "init": Init.model_fields,
    }
    for section, known in (("task", tasks), ("objective", objectives)):
        named = data.get(section, "next_token")
        name = named.get("name") if isinstance(named, Mapping) else named
        if isinstance(name, str) and name in known:
            fields[section] = known[name].Config.model_fields
    return [section for section, names in fields.items() if option in names]


def _plain(options: Options) -> dict[str, Any]:
    return options.model_dump(mode="json")


def completed(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A config that an earlier version wrote, with the options that it did not have at their defaults."""
    found = dict(sections)
    for section, known in (("train", None), ("model", None), ("task", tasks), ("objective", objectives)):
        old = found.get(section)
        if not isinstance(old, Mapping):
            continue
        options: type[Options] = TrainConfig if section == "train" else ModelConfig
        if known is not None:
            if old.get("name") not in known:
                continue
            options = known[old["name"]].Config
        found[section] = {**_defaults(options), **old}
        if section == "model" and isinstance(old.get("recursion"), Mapping):
            found[section]["recursion"] = {**_defaults(Recursion), **old["recursion"]}
    return found


def _defaults(options: type[Options]) -> dict[str, Any]:
    """The defaults of options as plain data."""
    fields = options.model_fields.items()
    values = {name: f.get_default(call_default_factory=True) for name, f in fields if not f.is_required()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def as_section(section: str, value: Any) -> Any:
    """A section given as one text, as the mapping it stands for."""
    if section == "model" and isinstance(value, ModelConfig):
        return value.model_dump(mode="json", exclude_defaults=True)
    if not isinstance(value, str):
        return dict(value) if isinstance(value, Mapping) else value
    if section != "model":
        return {"name": value}
    config = model_config(value, vocab_size=1)
    return {"family": value} if value != config.pattern else {"pattern": value}


__all__ = ["SECTIONS", "Experiment", "as_section", "completed"]
