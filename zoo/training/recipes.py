"""Recipes: experiments as YAML, with overrides, variants and words.

An experiment is read from a recipe (a YAML file, shipped or one's own), from the `config.yaml` of a run folder, from a
mapping or from Python, with `key=value` overrides on top. A recipe may hold `variants`, each a name and its overrides,
and `words` that stand for `{name}` in their patterns, so that `words.mixer=mamba2` changes all of them:

    task: {name: mqar, n_pairs: 4}
    model: {n_parameters: 100_000} # the width follows
    train: {steps: 1000}
    words: {mixer: gated_deltanet}
    variants:
      attention: {model.pattern: "2*(mha swiglu)"}
      hybrid: {model.pattern: "{mixer} swiglu mha swiglu"}
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from zoo.core import yaml_text
from zoo.core.errors import UsageError, quoted, unknown
from zoo.core.options import tuples
from zoo.core.readers import check_path
from zoo.core.run_files import CONFIG, as_written_now, is_run, no_run
from zoo.models.budget import BUDGETS, SIZES
from zoo.recipes import list_recipes, recipe_text
from zoo.tasks.protocol import Task, create_task
from zoo.tasks.protocol import registry as tasks
from zoo.training import imports
from zoo.training.init import as_init
from zoo.training.options import SECTIONS, Experiment, as_section
from zoo.training.sources import model_section, same_source


def parse_value(text: str) -> Any:
    """The value of `key=value`, read as YAML; what is not YAML is text."""
    try:
        return yaml_text.load(text, quoted(text, 40))
    except yaml.YAMLError:
        return text


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`["train.lr=1e-3", ...]` as a mapping.

    Raises:
        UsageError: an item that is not `key=value`.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, mark, value = item.partition("=")
        if not mark or not key.strip():
            raise UsageError(f"{item!r} is not an override: write key=value, such as train.steps=500.")
        overrides[key.strip()] = parse_value(value)
    return overrides


def override(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with dotted keys set; a mapping is merged unless it names something else, any other value replaces.

    Of `model.d_model` and the budgets that set a width, such as `model.n_parameters`, one given here takes the place of
    any other; a `model.family` brings a width of its own, and its own pattern.
    """
    new = copy.deepcopy(dict(data))
    for section in SECTIONS:
        if section in new:
            new[section] = as_section(section, new[section])
    if "init" in new:
        new["init"] = _of_this_start(as_init(new["init"]), overrides)
    if {"d_model", *BUDGETS, "family"} & _of_the_model(overrides) and isinstance(new.get("model"), dict):
        new["model"] = {k: v for k, v in new["model"].items() if k not in SIZES}
    for key, value in overrides.items():
        *path, last = str(key).split(".")
        where = new
        for part in path:
            if not isinstance(where.get(part), dict):
                where[part] = {}
            where = where[part]
        old = where.get(last)
        if isinstance(value, Mapping) and isinstance(old, dict) and value.get("name") in (None, old.get("name")):
            where[last] = override(where[last], value)
        else:
            where[last] = as_section(last, value) if not path and last in SECTIONS else value
            if key == "init" and isinstance(value, str | Path):
                where[last] = {**(old if isinstance(old, dict) else {}), **as_init(value)}
        family = key == "model" and isinstance(value, Mapping) and "family" in value and "pattern" not in value
        if family or key == "model.family":
            new["model"].pop("pattern", None)
    return new


def _of_this_start(init: Any, overrides: Mapping[str, Any]) -> Any:
    """A section `init` without what a run recorded of its own start, where overrides name another source."""
    if not isinstance(init, Mapping) or init.get("digest") is None:
        return init
    whole = as_init(overrides.get("init"))
    named = {k: whole[k] for k in ("source", "which") if k in whole} if isinstance(whole, Mapping) else {}
    named |= {k: overrides[f"init.{k}"] for k in ("source", "which") if f"init.{k}" in overrides}
    if same_source(init, {**init, **named}):
        return init
    return {} if named.get("source", init.get("source")) != init.get("source") else {**init, "digest": None}


def _of_the_model(overrides: Mapping[str, Any]) -> set[str]:
    """The model options that overrides set."""
    whole = overrides.get("model")
    dotted = {str(key).removeprefix("model.") for key in overrides if str(key).startswith("model.")}
    return dotted | set(whole if isinstance(whole, Mapping) else ())


def _names_a_model(overrides: Mapping[str, Any]) -> bool:
    """Whether overrides say which model it is."""
    return isinstance(overrides.get("model"), str) or bool({"pattern", "family"} & _of_the_model(overrides))


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The mapping in a shipped recipe, a YAML file or a run folder; its name is filled in.

    Raises:
        UsageError: no such recipe or file, or one that is not a mapping in YAML.
    """
    if str(source) in list_recipes():
        return {"name": str(source), **yaml_text.load(recipe_text(str(source)), str(source))}
    path = check_path(source)
    if not is_run(path) and path.is_dir():
        raise UsageError(no_run(path))
    if not path.exists():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            told = f"it does not exist or holds no {CONFIG}"
            raise UsageError(f"{source} is neither a recipe file nor a run folder: {told}.")
        raise unknown("recipe", str(source), list_recipes())
    data = yaml_text.read(path / CONFIG if is_run(path) else path)
    if not isinstance(data, dict):
        told = f"a mapping with the keys task, model, train; it holds {quoted(data, 60)}"
        raise UsageError(f"{source} should hold {told}.")
    if "experiment" in data:
        raise UsageError(f"{source} is a sweep and no recipe: run it with zoo sweep {source}.")
    if is_run(path):
        data = {**as_written_now(data), "out": str(path)}
        imports.check(path)
    return {"name": path.name if is_run(path) else path.stem, **data}


def read_experiments(
    source: str | Path | Mapping[str, Any] | Experiment,
    overrides: Mapping[str, Any] | None = None,
    variants: Iterable[str] = (),
) -> dict[str, Experiment]:
    """The experiments of a recipe, one per variant; `{"": experiment}` where it has none.

    Args:
        source: a recipe's name, a YAML file, a run folder, a mapping, or an experiment.
        overrides: dotted keys and values, over those of every variant.
        variants: names of those wanted, all by default.

    Raises:
        UsageError: a key, name or value that is wrong, or one model for variants that differ in theirs.
    """
    try:
        return _read_experiments(source, {str(k): v for k, v in (overrides or {}).items()}, variants)
    except RecursionError:  # of a mapping from Python
        raise UsageError("This experiment is nested too deeply.") from None


def _read_experiments(source: Any, overrides: Mapping[str, Any], variants: Iterable[str]) -> dict[str, Experiment]:
    if isinstance(source, Experiment):
        return {"": source if not overrides else _experiment(source.model_dump(), overrides, [])}
    data = {str(k): v for k, v in source.items()} if isinstance(source, Mapping) else read_recipe(source)
    table = _variants(data.pop("variants", None))
    chosen = [str(v) for v in variants] or list(table)
    for name in chosen:
        if name not in table:
            raise unknown("variant", name, table)
    declared = data.get("words")
    known = list(declared) if isinstance(declared, Mapping) else []
    if not chosen:
        return {"": _experiment(data, overrides, known)}
    if len(chosen) > 1 and _names_a_model(overrides) and all(_names_a_model(table[name]) for name in chosen):
        words = ", ".join(f"words.{name}" for name in known)
        told = f"override {words}, or name one by --variant" if known else "name one by --variant"
        raise UsageError(f"One model.pattern or model.family makes all {len(chosen)} variants the same model: {told}.")
    experiments = {}
    for name in chosen:
        varied = override(data, table[name])
        placed = {**overrides, "name": name, "out": str(_folder(override(varied, overrides)) / name)}
        experiments[name] = _experiment(varied, placed, known, varied=_names_a_model(table[name]))
    return experiments


def _experiment(
    data: Mapping[str, Any],
    overrides: Mapping[str, Any],
    words: Iterable[str],
    varied: bool = False,
) -> Experiment:
    """An experiment of a recipe and overrides; options of its model that `init` gives are filled in.

    Where `init` is an override, it brings the source's model in place of the recipe's, unless a variant, a word or an
    override names another one; `model.pattern` and other options are set in that of the source.
    """
    merged = override(data, overrides)
    init = merged.get("init")
    if isinstance(init, Mapping) and init.get("source") is not None:
        named = isinstance(merged.get("model"), Mapping) and {"pattern", "family"} & merged["model"].keys()
        sections = {str(key).partition(".")[0] for key in overrides}
        whole = isinstance(overrides.get("model"), str) or "family" in _of_the_model(overrides)
        chosen = varied or whole or "words" in sections
        if not named or ("init" in sections and not chosen):
            source = model_section(init, _folder(merged))
            ends = ("inputs", "outputs", "vocab_size") if source.get("inputs") else ()  # a series' are its task's
            base = {**data, "model": {k: v for k, v in source.items() if k not in ends}}
            given = {} if named or not isinstance(data.get("model"), Mapping) else {"model": data["model"]}
            merged = override(override(base, given), overrides)
    return Experiment(**_with_words(merged, words))


def _folder(data: Mapping[str, Any]) -> Path:
    """The run folder of an experiment's mapping."""
    return Path(data.get("out") or Path("runs", str(data.get("name", "experiment"))))


def _variants(table: Any) -> dict[str, Mapping[str, Any]]:
    """A recipe's variants by name."""
    if not isinstance(table, Mapping | None):
        raise UsageError(f"variants should be a mapping of names to overrides, not {quoted(table, 60)}.")
    named = {str(name): {} if changes is None else changes for name, changes in (table or {}).items()}
    for name, changes in named.items():
        if not isinstance(changes, Mapping):
            told = f"it should be a mapping of keys to values, such as {{train.lr: 1e-3}}, not {quoted(changes, 60)}"
            raise UsageError(f"variants.{name} is not allowed: {told}.")
    return named


def _with_words(data: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """An experiment's mapping with the `words` of its recipe put into its pattern.

    Raises:
        UsageError: a word that the recipe does not have, or one that is no text.
    """
    words = data.pop("words", None) or {}
    if not isinstance(words, Mapping):
        raise UsageError(f"words should be a mapping of names to mixers, not {quoted(words)}.")
    for name, word in words.items():
        if name not in known:
            raise unknown("word of this recipe", name, known)
        if not isinstance(word, str):
            raise UsageError(f"words.{name}={quoted(word)} is not allowed: it should be a mixer, such as mamba2.")

    def word_of(match: re.Match[str]) -> str:
        if match[1] not in words:
            raise unknown("word of this recipe", match[1], words)
        return words[match[1]]

    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("pattern"), str):
        data["model"] = {**model, "pattern": re.sub(r"\{(\w+)\}", word_of, model["pattern"])}
    return data


def read_experiment(source: Any, overrides: Mapping[str, Any] | None = None, variant: str | None = None) -> Experiment:
    """As `read_experiments`, where exactly one is meant."""
    experiments = read_experiments(source, overrides, [variant] if variant else [])
    if len(experiments) > 1:
        raise UsageError(f"This recipe has variants; name one of: {', '.join(experiments)}.")
    return next(iter(experiments.values()))


def read_task(source: str, overrides: Mapping[str, Any] | None = None) -> Task:
    """The task that a task's name with its options, or a recipe with dotted keys, stands for.

    Raises:
        UsageError: neither a task nor a recipe, or a wrong option.
    """
    overrides = dict(overrides or {})
    if source in tasks or not _is_recipe(source):
        given = {k.removeprefix("task."): v for k, v in overrides.items()}
        return create_task(tuples({"name": source, **given}))
    recipe = override(read_recipe(source), overrides)
    if "task" not in recipe:
        raise UsageError(f"{source} names no task.")
    return create_task(tuples(recipe["task"]))


def names_folder(source: str) -> bool:
    """Whether what could be a task's name, a recipe's or a path is a folder's path."""
    return source not in tasks and source not in list_recipes() and check_path(source).is_dir()


def _is_recipe(source: str) -> bool:
    return source in list_recipes() or check_path(source).exists()


__all__ = [
    "names_folder",
    "override",
    "parse_overrides",
    "parse_value",
    "read_experiment",
    "read_experiments",
    "read_recipe",
    "read_task",
]
