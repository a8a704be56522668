"""Options that came later than a trial: every table of trials has their defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import get_args

import polars as pl

from zoo.core.options import Options
from zoo.models.config import ModelConfig
from zoo.objectives.base import objectives
from zoo.tasks.protocol import registry as tasks
from zoo.training.train_options import TrainConfig


def with_defaults(trials: pl.DataFrame) -> pl.DataFrame:
    """A table of trials, with the default of every option that was not there yet when a trial was trained.

    An option that may be None stays empty, since None may have been given.
    """
    filled: dict[str, pl.Expr] = {}
    for section, options, rows in _options_of(trials):
        for name, field in options.model_fields.items():
            column, default = f"config.{section}.{name}", field.default
            if type(None) in get_args(field.annotation) or not isinstance(default, bool | int | float | str):
                continue
            found = filled.get(column, pl.col(column) if column in trials.columns else pl.lit(None))
            if trials.schema.get(column) == pl.String and not isinstance(default, str):
                default = json.dumps(default)  # a column of values of several kinds
            filled[column] = pl.coalesce(found, pl.when(rows).then(pl.lit(default)))
    return trials.with_columns(**filled)


def _options_of(trials: pl.DataFrame) -> Iterator[tuple[str, type[Options], pl.Expr]]:
    """The sections of the trials' configs, the options of each, and the rows that have these."""
    for section, options in (("train", TrainConfig), ("model", ModelConfig)):
        if any(column.startswith(f"config.{section}.") for column in trials.columns):
            yield section, options, pl.lit(True)
    for section, known in (("task", tasks), ("objective", objectives)):
        column = f"config.{section}.name"
        if column in trials.columns:
            for name in trials[column].unique().drop_nulls().to_list():
                if name in known:
                    yield section, known[name].Config, pl.col(column) == name


__all__ = ["with_defaults"]
