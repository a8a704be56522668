"""Models by pattern, name or config: the one place that picks what is built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zoo.backbone import Backbone
from zoo.core.errors import closest, refuse_oversize, unknown
from zoo.models.budget import SIZES, Budget, largest_width, read_budget
from zoo.models.config import ModelConfig
from zoo.models.ends import Ends, make_backbone
from zoo.models.families import families
from zoo.models.recursive import RecursiveModel
from zoo.models.series import SeriesModel
from zoo.models.token import TokenModel
from zoo.models.uninitialised import where_none_are_held
from zoo.pattern import Pattern, from_data, list_mixers


def list_models(pattern: str = "*") -> list[str]:
    """Names of the families' sizes, such as `mamba2-tiny`."""
    return families.names(pattern)


def create_model(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> Ends:
    """Create a model from a pattern, a family-size name, or a config: of tokens with `vocab_size`, of real vectors with
    `inputs` and `outputs`.

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
    with refuse_oversize("model"), where_none_are_held():
        if config.recursion is not None:
            return RecursiveModel(config)
        return SeriesModel(config) if config.inputs else TokenModel(config)


BACKBONE_OPTIONS = (
    *("pattern", *SIZES, "causal", "norm", "placement", "norm_eps", "norm_axis"),
    *("in_scale", "out_scale", "residual_scale", "residual", "max_len"),
)
"""The model options that say something of the layers between the ends."""


def create_backbone(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> Backbone:
    """Create the layers of a pattern without ends: x (B, T, D) to ((B, T, D), next state), for inputs and heads of
    one's own.

    The result is the residual stream: norm it before a head, unless `placement` is "post".

    Args:
        spec: `"2*(cfc swiglu)"`; or a family-size, a mapping of model options, or a `ModelConfig`, whose layers are
            taken.
        **options: model options that concern the layers, such as `d_model` and `causal`; `n_parameters` and the other
            budgets in place of `d_model` are those of the layers.

    Raises:
        UsageError: unknown word or option, an option of a model's ends, or sizes that do not fit together.
    """
    named = [*options, *(k for k in (spec if isinstance(spec, Mapping) else ()) if k != "family")]
    for name in map(str, named):
        if name not in BACKBONE_OPTIONS and not name.startswith("residual_"):
            raise unknown("option of a backbone", name, BACKBONE_OPTIONS)
    ends = {} if isinstance(spec, ModelConfig) else {"vocab_size": 1}

    def build(config: ModelConfig) -> Backbone:
        with refuse_oversize("model"), where_none_are_held():
            backbone = make_backbone(config, config.pattern)
        backbone.config = config
        return backbone

    config, budget = read_spec(spec, {**ends, **options})
    return build(config if budget is None else fitted(config, budget, build))


def model_config(spec: str | Pattern | Mapping[str, Any] | ModelConfig | Sequence[Any], **options: Any) -> ModelConfig:
    """The config that `spec` and keyword `options` stand for, with `d_model` where they give a budget."""
    config, budget = read_spec(spec, options)
    return config if budget is None else fitted(config, budget)


def fitted(config: ModelConfig, budget: Budget, build: Callable[[ModelConfig], Any] | None = None) -> ModelConfig:
    """A config with the largest width at which what is built of it, by default a model, stays within a budget."""
    bare = config.model_copy(update={"published": None})  # a mapping, which has no hash
    width = _width(bare, budget) if build is None else _largest(bare, budget, build)
    return ModelConfig(**{**config.changed(), "d_model": width})


@functools.lru_cache(maxsize=256)  # an experiment is built several times, before its run and in it
def _width(config: ModelConfig, budget: Budget) -> int:
    return _largest(config, budget, _built)


def _largest(config: ModelConfig, budget: Budget, build: Callable[[ModelConfig], Any]) -> int:
    def count(width: int) -> int:
        with torch.device("meta"):
            model = build(config.model_copy(update={"d_model": width}))
        if budget.option == "n_parameters":
            return model.n_parameters()
        context = budget.context_length or 1
        if budget.option == "state_bytes":
            return model.state_bytes(1, context)
        return model.flops_per_token(context)

    return largest_width(count, budget)


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
