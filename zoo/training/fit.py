"""A task, an objective and a model that fit together: what they need of the model is filled in where it is left out.

Each part says what it needs of the model (`Task.needs`, `Objective.needs`, `TrainConfig.needs`). One loop goes over all
needs; `WAYS` says for each kind of need by which option of the model it is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from zoo.core.errors import UsageError
from zoo.core.memory import gib
from zoo.core.needs import Needs, merge
from zoo.core.options import tuples
from zoo.models.config import ModelConfig
from zoo.models.create import create_model, model_config, without_budget
from zoo.models.ends import Ends
from zoo.objectives.base import Objective, create_objective
from zoo.pattern import parse
from zoo.protocol import Mixer, mixers
from zoo.tasks.protocol import Task, create_task
from zoo.training import machine
from zoo.training.given import check_named


class Parts(NamedTuple):
    """What an experiment is made of, before any weight exists."""

    task: Task
    objective: Objective
    model: ModelConfig


class Way(NamedTuple):
    """How a model meets one kind of need.

    Attributes:
        chosen: what the model has of it, from its config and the options as they were given; None where that is left
            out.
        option: the option that is filled in then, with a dot where it is one of a section; None where a person has to
            choose.
        concerns: whether the need is about this model at all.
        exact: whether a larger size does not serve.
        section: whether the option is a section of options, which is filled in with their defaults.
    """

    chosen: Callable[[ModelConfig, Mapping[str, Any]], Any]
    option: str | None = None
    concerns: Callable[[ModelConfig, Mapping[str, Any]], bool] = lambda config, given: True
    exact: bool = False
    section: bool = False


def _learns_of_puzzles(config: ModelConfig, given: Mapping[str, Any] = {}) -> bool:
    return config.recursion is not None and config.recursion.prefix > 0


def _n_puzzles(config: ModelConfig, given: Mapping[str, Any]) -> int | None:
    recursion = config.recursion
    return recursion.n_puzzles if recursion is not None and "n_puzzles" in recursion.model_fields_set else None


def _has_positions(config: ModelConfig, given: Mapping[str, Any]) -> bool:
    return config.max_len is not None or config.reads_max_len()


def _wants_time(config: ModelConfig, given: Mapping[str, Any]) -> bool:
    """Whether nothing is said about the time between tokens, and no mixer reads it."""
    patterns = [config.pattern, config.recursion.outer if config.recursion else None]
    words = {name for pattern in patterns if pattern for name in parse(pattern).names()}
    return "time_feature" not in given and not any(mixers[name].traits.reads_timespans for name in words)


WAYS: dict[str, Way] = {
    "recursion": Way(lambda config, given: config.recursion is not None),
    "vocab_size": Way(lambda config, given: given.get("vocab_size"), "vocab_size"),
    "inputs": Way(lambda config, given: given.get("inputs"), "inputs", exact=True),
    "outputs": Way(lambda config, given: given.get("outputs"), "outputs", exact=True),
    "length": Way(lambda config, given: config.max_len, "max_len", _has_positions),
    "decoder": Way(lambda config, given: given.get("decoder"), "decoder"),
    "n_puzzles": Way(_n_puzzles, "recursion.n_puzzles", _learns_of_puzzles),
    "timespans": Way(lambda config, given: None, "time_feature", _wants_time),
    "prefix": Way(_learns_of_puzzles),
    "unmasking_policy": Way(
        lambda config, given: None if config.unmasking_policy is None else True, "unmasking_policy", section=True
    ),
    "halting": Way(
        lambda config, given: given.get("halting"), "halting", lambda config, given: config.recursion is None
    ),
}
"""By the fields of `Needs`, in the order in which they are looked at."""


def fit(
    task: Any,
    objective: Any,
    model: Mapping[str, Any],
    *more: Needs,
    given: Task | None = None,
    grows: bool | None = None,
) -> Parts:
    """The task, the objective, and the model's config with what they need filled in.

    Args:
        task: name, or mapping with the key `name`.
        objective: the same.
        model: options, with `pattern` or `family`, and perhaps a budget that the width follows from: `n_parameters`,
            `state_bytes` or `flops_per_token`, the latter two after the tokens that a row has, or `context_length`.
        *more: needs of others.
        given: the task itself, in place of its name.
        grows: whether a vocabulary that is too small is made larger; None where the model starts from new weights.

    Raises:
        UsageError: any option that is wrong, or parts that do not fit together.
    """
    if given is None:
        check_named(task)
    made = create_task(tuples(task)) if given is None else given
    ends = _ends(made, model)
    draft = model_config({**ends, **without_budget(model)})
    teacher = create_objective(tuples(objective), made, causal=draft.causal)
    needs = merge([made.needs(), teacher.needs(draft), *more])
    read = {"context_length": teacher.length} if model.keys() & {"state_bytes", "flops_per_token"} else {}
    untied = {"tie_embeddings": False} if "tie_embeddings" in ends else {}
    config = model_config({**read, **untied, **model, **filled(needs, draft, model, grows)})
    if grows and config.published is not None and config.published.get("vocab_size") == model.get("vocab_size"):
        published = {**config.published, "vocab_size": config.vocab_size}
        config = ModelConfig(**{**config.changed(), "published": published})
    check_lengths(_outline(config), needs)
    return Parts(made, teacher, config)


def _ends(task: Task, model: Mapping[str, Any]) -> dict[str, Any]:
    """Ends for the draft of a model, as the task has tokens or real vectors; a family's own are left out then.

    Raises:
        UsageError: the model is given ends of the other kind.
    """
    series = task.layout == "series"
    for name in ("vocab_size",) if series else ("inputs", "outputs"):
        if model.get(name):
            told = f"the rows of {task.name} are {'real vectors' if series else 'tokens'}: leave it out"
            raise UsageError(f"model.{name}={model[name]} is not allowed: {told}.")
    if not series:
        return {"vocab_size": 1}
    return {"inputs": 1, "outputs": 1, "vocab_size": 0, "tie_embeddings": False}


def filled(needs: Needs, draft: ModelConfig, given: Mapping[str, Any], grows: bool | None = None) -> dict[str, Any]:
    """The options that meet the needs where they are left out.

    Args:
        needs: of all parts.
        draft: the model's config without what is filled in.
        given: the options as they were given.
        grows: as in `fit`.

    Raises:
        UsageError: what is given does not meet a need.
    """
    fill: dict[str, Any] = {}
    for name, way in WAYS.items():
        need = getattr(needs, name)
        if need is None or not way.concerns(draft, given):
            continue
        chosen = way.chosen(draft, given)
        if way.option is None:
            if chosen != need.value:
                raise UsageError(f"{need.why}.")
        elif chosen is None:
            section, _, option = way.option.rpartition(".")
            value: Any = {} if way.section else need.value
            fill |= {section: {**getattr(draft, section).given(), option: value}} if section else {option: value}
        elif isinstance(need.value, bool) or way.exact:
            if chosen != need.value:
                raise UsageError(f"model.{way.option}={chosen} is not allowed: {need.why}.")
        elif chosen < need.value and name == "vocab_size" and grows:
            fill[name] = need.value
        elif chosen < need.value:
            hint = "; init.resize_vocab=true adds the rest" if name == "vocab_size" and grows is False else ""
            raise UsageError(f"model.{way.option}={chosen} is too small: {need.why}{hint}.")
    return fill


def _outline(config: ModelConfig) -> Ends:
    """The model without memory for its weights, so that sizes are refused before anything is written or trained.

    Raises:
        UsageError: sizes that do not go together, or weights that no tensor or this machine's memory can hold.
    """
    with torch.device("meta"):
        model = create_model(config)
    n, memory = model.n_parameters(), machine.total_memory()
    if memory and 4 * n > memory:
        told = f"{gib(4 * n)}, and this machine has {gib(memory)}"
        raise UsageError(f"model: its {n:,} parameters take {told}: choose smaller sizes.")
    return model


def check_lengths(model: Ends, needs: Needs) -> None:
    """Refuses mixers with weights for fewer steps than the model has to read."""
    length = needs.length
    for m in model.modules():
        if length is not None and isinstance(m, Mixer) and m.traits.takes_length and m.length < length.value:
            told = f"{length.why}, which is filled in where length is left out"
            raise UsageError(f"model: {m.name}(length={m.length}) is too short: {told}.")


__all__ = ["WAYS", "Parts", "Way", "filled", "fit"]
