"""Models by pattern, name or config: the one place that picks what is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zoo.core.errors import closest, refuse_oversize
from zoo.models.budget import SIZES, Budget, largest_width, read_budget
from zoo.models.config import ModelConfig
from zoo.models.ends import Ends
from zoo.models.families import families
from zoo.models.recursive import RecursiveModel
from zoo.models.token import TokenModel
from zoo.models.uninitialised import Uninitialised
from zoo.pattern import Pattern, from_data, list_mixers


def list_models(pattern: str = "*") -> list[str]:
    """Names of the families' sizes, such as `mamba2-tiny`."""
    return families.names(pattern)


def create_model(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> Ends:
    """Create a model from a pattern, a family-size name, or a config.

    Args:
        spec: `"4*(mamba2 swiglu)"`, `"mamba2-tiny"`, a mapping of model options, or a `ModelConfig`.
        **options: model options, over those of `spec`; `n_parameters` in place of `d_model` takes the largest width at
            which the model has no more parameters than that. `state_bytes` and `flops_per_token` do the same for the
            bytes of one sequence's state and the FLOPs of a token, both after `context_length` tokens.

    Raises:
        UsageError: unknown word, option or family, a wrong type, or sizes that do not fit together.
    """
    return _built(model_config(spec, **options))


def _built(config: ModelConfig) -> Ends:
    with refuse_oversize("model"):
        return TokenModel(config) if config.recursion is None else RecursiveModel(config)


def model_config(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> ModelConfig:
    """The config that `spec` and keyword `options` stand for, with `d_model` where they give a budget."""
    config, budget = read_spec(spec, options)
    return config if budget is None else fitted(config, budget)


def fitted(config: ModelConfig, budget: Budget) -> ModelConfig:
    """A config with the largest width that stays within a budget."""

    def count(width: int) -> int:
        with torch.device("meta"), Uninitialised():
            model = _built(config.model_copy(update={"d_model": width}))
        if budget.option == "n_parameters":
            return model.n_parameters()
        context = budget.context_length or 1
        if budget.option == "state_bytes":
            return model.state_bytes(1, context)
        return model.flops_per_token(context)

    return ModelConfig(**{**config.changed(), "d_model": largest_width(count, budget)})


def read_spec(spec: Any, options: Mapping[str, Any] = {}) -> tuple[ModelConfig, Budget | None]:
    """The config that `spec` and `options` stand for, and the budget that its width should follow from, where they
    give one."""
    budget = None
    for source in (spec, options):
        budget = read_budget(source, budget) if isinstance(source, Mapping) else budget
    return _config(without_budget(spec), without_budget(options)), budget


def is_family(spec: Any) -> bool:
    """Whether a text names a family, as `llama3-tiny` does, or was meant to."""
    return isinstance(spec, str) and (spec in families or _looks_like_family(spec))


def without_budget(source: Any) -> Any:
    """Options without those that a width follows from; all else as it is."""
    return {k: v for k, v in source.items() if k not in SIZES[1:]} if isinstance(source, Mapping) else source


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
