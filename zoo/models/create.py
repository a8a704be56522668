"""Models by pattern, name or config: the one place that picks what is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zoo.core.errors import UsageError, closest, quoted, refuse_oversize
from zoo.models.budget import largest_width
from zoo.models.config import ModelConfig
from zoo.models.ends import Ends
from zoo.models.families import families
from zoo.models.recursive import RecursiveModel
from zoo.models.token import TokenModel
from zoo.models.uninitialised import Uninitialised
from zoo.pattern import Pattern, from_data, list_mixers

MOST_PARAMETERS = 2**40


def list_models(pattern: str = "*") -> list[str]:
    """Names of the families' sizes, such as `mamba2-tiny`."""
    return families.names(pattern)


def create_model(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> Ends:
    """Create a model from a pattern, a family-size name, or a config.

    Args:
        spec: `"4*(mamba2 swiglu)"`, `"mamba2-tiny"`, a mapping of model options, or a `ModelConfig`.
        **options: model options, over those of `spec`; `n_parameters` in place of `d_model` takes the largest width at
            which the model has no more parameters than that.

    Raises:
        UsageError: unknown word, option or family, a wrong type, or sizes that do not fit together.
    """
    return _built(model_config(spec, **options))


def _built(config: ModelConfig) -> Ends:
    with refuse_oversize("model"):
        return TokenModel(config) if config.recursion is None else RecursiveModel(config)


def model_config(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> ModelConfig:
    """The config that `spec` and keyword `options` stand for, with `d_model` where they give `n_parameters`."""
    config, budget = read_spec(spec, options)
    if budget is None:
        return config

    def count(width: int) -> int:
        with torch.device("meta"), Uninitialised():
            return _built(config.model_copy(update={"d_model": width})).n_parameters()

    return ModelConfig(**{**config.changed(), "d_model": largest_width(count, budget)})


def read_spec(spec: Any, options: Mapping[str, Any] = {}) -> tuple[ModelConfig, int | None]:
    """The config that `spec` and `options` stand for, and the number of parameters that its width should follow from,
    where they give that."""
    budget = None
    for source in (spec, options):
        budget = _budget(source, budget) if isinstance(source, Mapping) else budget
    return _config(_without_budget(spec), _without_budget(options)), budget


def is_family(spec: Any) -> bool:
    """Whether a text names a family, as `llama3-tiny` does, or was meant to."""
    return isinstance(spec, str) and (spec in families or _looks_like_family(spec))


def _budget(source: Mapping[str, Any], before: int | None) -> int | None:
    """The `n_parameters` of `source`, else those `before`, unless `source` gives the width."""
    width, budget = source.get("d_model"), source.get("n_parameters")
    if budget is None:
        return before if width is None else None
    if width is not None:
        raise UsageError(f"d_model={width!r} and n_parameters={budget!r} are both given: one follows from the other.")
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= MOST_PARAMETERS:
        allowed = f"a whole number from 1 to {MOST_PARAMETERS:,}"
        raise UsageError(f"model: n_parameters={quoted(budget)} is not allowed: it should be {allowed}.")
    return budget


def _without_budget(source: Any) -> Any:
    return {k: v for k, v in source.items() if k != "n_parameters"} if isinstance(source, Mapping) else source


def _config(spec: Any, options: dict[str, Any]) -> ModelConfig:
    if isinstance(spec, ModelConfig):
        return ModelConfig(**{**spec.changed(), **options}) if options else spec
    if isinstance(spec, Mapping):
        data = {**spec, **options}
        family = data.pop("family", None)
        return ModelConfig(**(families.options(family, data) if family else data))
    if is_family(spec):
        return ModelConfig(**families.options(spec, options))
    return ModelConfig(**{"pattern": spec if isinstance(spec, str) else str(from_data(spec)), **options})


def _looks_like_family(spec: str) -> bool:
    if spec in {family.name for family in families.all()}:
        return spec not in list_mixers()  # as `mamba2` is, which is a pattern
    return "-" in spec and bool(closest(spec, families.names())) and not set(spec) & set("()*|= ")
