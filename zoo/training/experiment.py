"""An experiment: one validated config of task, model, objective and training.

It is read from a recipe (a YAML file, shipped or one's own), from the `config.yaml` of a run folder, from a mapping or
from Python, with `key=value` overrides on top. A recipe may hold `variants`, each a name and its overrides, and `words`
that stand for `{name}` in their patterns, so that `words.mixer=mamba2` changes all of them:

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
import os
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import Field, field_validator, model_validator
from torch import nn

from zoo.core import yaml_text
from zoo.core.errors import UsageError, quoted, unknown
from zoo.core.options import Options
from zoo.core.readers import check_path
from zoo.models.token import ModelConfig, TokenModel, create_model, model_config
from zoo.objectives.base import Objective, create_objective, objectives
from zoo.protocol import Mixer
from zoo.tasks.protocol import Task, create_task
from zoo.tasks.protocol import registry as tasks
from zoo.training import imports, machine

SECTIONS = ("task", "model", "objective")
CONFIG = "config.yaml"
NEVER = 2**40  # steps that no training comes to


class Target(Options, label="train.target"):
    """A figure on validation that ends the training.

    Attributes:
        metric: a figure of the task's score, or "loss".
        value: the training ends once validation reaches it, from below, or from above where it is the loss.
    """

    metric: str = "accuracy"
    value: float

    def reached_by(self, score: Mapping[str, Any]) -> bool:
        """Whether a validation score meets it."""
        figure = score[self.metric]
        return figure <= self.value if self.metric == "loss" else figure >= self.value


class TrainConfig(Options, label="train"):
    """How a model is trained. A step is one batch.

    Attributes:
        steps: number of batches.
        batch_size: rows of a batch.
        rows: training rows, which come again in another order once all have been seen; by default every row is new.
        seed: of the initial weights, of the stream of training rows and of dropout.
        optimizer: adamw, or muon for the hidden matrices with AdamW for the rest.
        lr: peak learning rate.
        muon_lr: that of the Muon group, by default `lr` (its updates are scaled to the size of AdamW's).
        puzzle_lr: that of what a recursive model learns of each puzzle, which then moves by the sign of its gradient,
            and decays, in the steps that use it; by default it is trained as the rest.
        weight_decay: decoupled; not on norms, biases, decays and embeddings.
        decay_all: on those too.
        beta1: of AdamW.
        beta2: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
        clip: largest norm of the gradient; None leaves it.
        schedule: after the warm-up, cosine to the end; wsd holds and falls linearly over the last `decay_steps`.
        warmup_steps: linear warm-up.
        decay_steps: of wsd, by default a fifth of the steps.
        final_lr: learning rate to which the schedule falls, as a share of the peak; the last step is a step above it.
        ema: decay of the running average of the weights, which evaluation then reads.
        ema_warmup: forget the first steps faster, for runs of less than some 9,000 steps; false has one decay from the
            start (TRM).
        device: auto takes cuda, then mps, then cpu.
        precision: bfloat16 is autocast; auto takes it on GPUs and CPUs with hardware for it.
        compile: compile the layers with torch.compile.
        threads: CPU threads, by default torch's choice.
        eval_every: steps between evaluations on validation.
        eval_rows: validation rows.
        test_rows: test rows, read once at the end with the best weights.
        eval_batch_size: rows evaluated at once, by default `batch_size`.
        metric: the validation figure that selects the best weights, by default the target's or accuracy.
        target: ends the training once reached.
        time_budget: seconds of training after which it ends.
        log_every: steps between training lines in metrics.jsonl.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: seconds between checkpoints.
        keep: number of latest checkpoints kept, beside the best.
    """

    steps: int = Field(default=1000, ge=1, le=NEVER)
    batch_size: int = Field(default=64, ge=1)
    rows: int | None = Field(default=None, ge=1, le=NEVER)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    optimizer: Literal["adamw", "adam_atan2", "muon"] = "adamw"
    lr: float = Field(default=3e-3, gt=0)
    muon_lr: float | None = Field(default=None, gt=0)
    puzzle_lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay_all: bool = False
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    clip: float | None = Field(default=1.0, gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0, le=NEVER)
    decay_steps: int | None = Field(default=None, ge=0, le=NEVER)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    ema_warmup: bool = True
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    threads: int | None = Field(default=None, ge=1, le=1024)
    eval_every: int = Field(default=100, ge=1, le=NEVER)
    eval_rows: int = Field(default=512, ge=1)
    test_rows: int = Field(default=2048, ge=1)
    eval_batch_size: int | None = Field(default=None, ge=1)
    metric: str | None = None
    target: Target | None = None
    time_budget: float | None = Field(default=None, gt=0)
    log_every: int = Field(default=10, ge=1, le=NEVER)
    checkpoint_every: int | None = Field(default=None, ge=1, le=NEVER)
    checkpoint_seconds: float | None = Field(default=30.0, gt=0)
    keep: int = Field(default=2, ge=1, le=NEVER)

    @field_validator("target", mode="before")
    @classmethod
    def _target(cls, value: Any) -> Any:
        return Target.of(value)

    @property
    def selection(self) -> str:
        return self.metric or (self.target.metric if self.target else "accuracy")


BOOKKEEPING = {"train.keep", "train.checkpoint_every", "train.checkpoint_seconds", "train.time_budget"}
"""Keys that may change between the parts of one run: none of them changes a weight."""


class Parts(NamedTuple):
    """What an experiment is made of, before any weight exists."""

    task: Task
    objective: Objective
    model: ModelConfig


class Experiment(Options, label="experiment"):
    """One training run.

    What task and objective need is filled into the model where it is left out: `vocab_size`, `max_len` where there are
    weights for every position, `recursion.n_puzzles` where there are places for what is learned of each puzzle, and,
    where the task has irregular times that no mixer of the pattern reads, `time_feature`; a task of the layout
    `reconstruct` brings the `decoder`.

    Attributes:
        name: its name, and by default that of its folder.
        out: the run folder, by default `runs/<name>`.
        task: a name, or a mapping of `name` and options.
        model: a pattern, a family-size, or a mapping of model options with `pattern` or `family`, and `n_parameters` in
            place of `d_model` for the largest width that fits this number of parameters.
        objective: a name, or a mapping of `name` and options.
        train: options of `TrainConfig`.
    """

    name: str = "experiment"
    out: str | None = None
    task: dict[str, Any]
    model: dict[str, Any]
    objective: dict[str, Any] = Field(default_factory=lambda: {"name": "next_token"})
    train: TrainConfig = Field(default_factory=TrainConfig)

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

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        if "/" in self.name or self.name in ("", ".", ".."):
            raise UsageError(
                f"name={quoted(self.name)} is not allowed: it should be the name of a folder (out= takes a path)."
            )
        check_path(self.name, "name")
        check_path(self.out or "", "out")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.out or Path("runs", self.name))

    def build(self) -> Parts:
        """The task, the objective, and the model's config with what they need filled in.

        Raises:
            UsageError: any option that is wrong, or parts that do not fit together.
        """
        task = create_task(_tuples(self.task))
        given = dict(self.model)
        sized = {k: v for k, v in given.items() if k != "n_parameters"}
        draft = model_config({"vocab_size": 1, **sized})  # to learn whether it is causal
        objective = create_objective(_tuples(self.objective), task, causal=draft.causal)
        if objective.recursive and draft.recursion is None:
            raise UsageError(f"{objective.name} teaches a model that thinks in steps: set model.recursion={{}}.")
        if draft.recursion is not None and not objective.recursive:
            raise UsageError(f"{objective.name} does not teach recursive models: set objective=deep_supervision.")
        fill: dict[str, Any] = {}
        if "vocab_size" not in given:
            fill["vocab_size"] = objective.vocab_size
        elif draft.vocab_size < objective.vocab_size:
            told = f"{task.name} needs {objective.vocab_size}, which is filled in where it is left out"
            raise UsageError(f"model.vocab_size={draft.vocab_size} is too small: {told}.")
        length = objective.length + (draft.recursion.prefix if draft.recursion else 0)
        if draft.max_len is None and draft.reads_max_len():
            fill["max_len"] = length
        elif draft.max_len is not None and draft.max_len < length:
            raise UsageError(f"model.max_len={draft.max_len} is too small: {_reads(task, objective, length)}.")
        reconstructs = task.layout == "reconstruct"
        if reconstructs and "decoder" not in given:
            fill["decoder"] = True
        elif draft.decoder != reconstructs:
            told = "needs a decoder" if reconstructs else f"has no use for a decoder, with its layout {task.layout}"
            raise UsageError(f"model.decoder={draft.decoder} is not allowed: {task.name} {told}.")
        recursion = draft.recursion
        if task.n_puzzles and recursion is not None and recursion.prefix:
            if "n_puzzles" not in recursion.model_fields_set:
                fill["recursion"] = {**recursion.given(), "n_puzzles": task.n_puzzles}
            elif recursion.n_puzzles < task.n_puzzles:
                told = f"{task.name} numbers {task.n_puzzles}, which is filled in where it is left out"
                raise UsageError(f"model.recursion.n_puzzles={recursion.n_puzzles} is too small: {told}.")
        if self.train.puzzle_lr is not None and not (recursion is not None and recursion.prefix):
            raise UsageError("train.puzzle_lr is for what is learned of each puzzle: set model.recursion.prefix.")
        config = model_config({**given, **fill})
        self._has_room(length, config.d_model)
        model = _outlined(config)  # sizes that do not fit are refused before anything is written or trained
        for m in model.modules():
            if isinstance(m, Mixer) and m.traits.takes_length and m.length < length:
                told = f"{_reads(task, objective, length)}, which is filled in where length is left out"
                raise UsageError(f"model: {m.name}(length={m.length}) is too short: {told}.")
        if task.irregular_times and "time_feature" not in given and not reads_timespans(model):
            config = model_config({**given, **fill, "time_feature": True})
        return Parts(task, objective, config)

    def _has_room(self, length: int, width: int) -> None:
        """Refuses rows that this machine's memory cannot hold: those drawn at once, and those a model reads at once."""
        held = machine.total_memory()
        rows = 16 * length  # bytes of what is asked and what is answered
        sizes = {"rows": rows, "eval_rows": rows, "test_rows": rows, "batch_size": rows + 4 * length * width}
        sizes["eval_batch_size"] = sizes["batch_size"]
        for key, size in sizes.items():
            n = getattr(self.train, key)
            if held and n is not None and n * size > held:
                told = f"{n:,} rows of {length:,} tokens take {_gib(n * size)}, and this machine has {_gib(held)}"
                raise UsageError(f"train.{key}={n} is too large: {told}.")

    def resolved(self, parts: Parts) -> dict[str, Any]:
        """Every option spelt out, defaults included, as plain data: what `config.yaml` holds."""
        return {
            "name": self.name,
            "task": {"name": parts.task.name, **_plain(parts.task.config)},
            "model": _plain(parts.model),
            "objective": {"name": parts.objective.name, **_plain(parts.objective.config)},
            "train": _plain(self.train),
        }


def _places(option: str, data: Mapping[str, Any]) -> list[str]:
    """The sections of an experiment that have an option of this name."""
    fields: dict[str, Iterable[str]] = {
        "train": TrainConfig.model_fields,
        "model": [*ModelConfig.model_fields, "n_parameters"],
    }
    for section, known in (("task", tasks), ("objective", objectives)):
        named = data.get(section, "next_token")
        name = named.get("name") if isinstance(named, Mapping) else named
        if isinstance(name, str) and name in known:
            fields[section] = known[name].Config.model_fields
    return [section for section, names in fields.items() if option in names]


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.0f} GiB"


def _reads(task: Task, objective: Objective, length: int) -> str:
    return f"{task.name} under {objective.name} reads {length} tokens"


def _outlined(config: ModelConfig) -> TokenModel:
    """The model without memory for its weights.

    Raises:
        UsageError: sizes that do not go together, or weights that no tensor or this machine's memory can hold.
    """
    with torch.device("meta"):
        model = create_model(config)
    n, held = model.n_parameters(), machine.total_memory()
    if held and 4 * n > held:
        told = f"{_gib(4 * n)}, and this machine has {_gib(held)}"
        raise UsageError(f"model: its {n:,} parameters take {told}: choose smaller sizes.")
    return model


def reads_timespans(model: nn.Module) -> bool:
    """Whether any mixer of the model works in continuous time."""
    return any(m.traits.reads_timespans for m in model.modules() if isinstance(m, Mixer))


def _tuples(value: Any) -> Any:
    """YAML's lists as the tuples that strict options ask for."""
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _plain(options: Options) -> dict[str, Any]:
    return options.model_dump(mode="json")


def as_section(section: str, value: Any) -> Any:
    """A section given as one text, as the mapping it stands for."""
    if not isinstance(value, str):
        return dict(value) if isinstance(value, Mapping) else value
    if section != "model":
        return {"name": value}
    config = model_config(value, vocab_size=1)
    return {"family": value} if value != config.pattern else {"pattern": value}


# ---- reading


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

    Of `model.d_model` and `model.n_parameters`, one given here takes the place of the other; a `model.family` brings a
    width of its own, and its own pattern.
    """
    new = copy.deepcopy(dict(data))
    for section in SECTIONS:
        if section in new:
            new[section] = as_section(section, new[section])
    sizes = {"d_model", "n_parameters"}
    if {*sizes, "family"} & _of_the_model(overrides) and isinstance(new.get("model"), dict):
        new["model"] = {k: v for k, v in new["model"].items() if k not in sizes}
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
        family = key == "model" and isinstance(value, Mapping) and "family" in value and "pattern" not in value
        if family or key == "model.family":
            new["model"].pop("pattern", None)
    return new


def _of_the_model(overrides: Mapping[str, Any]) -> set[str]:
    """The model options that overrides set."""
    whole = overrides.get("model")
    dotted = {str(key).removeprefix("model.") for key in overrides if str(key).startswith("model.")}
    return dotted | set(whole if isinstance(whole, Mapping) else ())


def _names_a_model(overrides: Mapping[str, Any]) -> bool:
    """Whether overrides say which model it is."""
    return isinstance(overrides.get("model"), str) or bool({"pattern", "family"} & _of_the_model(overrides))


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _shipped().iterdir() if f.name.endswith(".yaml"))


def recipe_about(name: str) -> str:
    """The first line of a shipped recipe's opening comment."""
    first = (_shipped() / f"{name}.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _shipped() -> Any:
    return resources.files("zoo.recipes")


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The mapping in a shipped recipe, a YAML file or a run folder; its name is filled in.

    Raises:
        UsageError: no such recipe or file, or one that is not a mapping in YAML.
    """
    if str(source) in list_recipes():
        text = (_shipped() / f"{source}.yaml").read_text(encoding="utf-8")
        return {"name": str(source), **yaml_text.load(text, str(source))}
    path = check_path(source)
    is_run = (path / CONFIG).is_file()
    if not is_run and path.is_dir():
        raise UsageError(no_run(path))
    if not path.exists():
        if path.suffix in (".yaml", ".yml") or "/" in str(source):
            told = f"it does not exist or holds no {CONFIG}"
            raise UsageError(f"{source} is neither a recipe file nor a run folder: {told}.")
        raise unknown("recipe", str(source), list_recipes())
    data = yaml_text.read(path / CONFIG if is_run else path)
    if not isinstance(data, dict):
        told = f"a mapping with the keys task, model, train; it holds {quoted(data, 60)}"
        raise UsageError(f"{source} should hold {told}.")
    if is_run:
        data["out"] = str(path)
        imports.check(path)
    return {"name": path.name if is_run else path.stem, **data}


def no_run(path: Path) -> str:
    """What to say of a folder that is no run's: which folders in it are."""
    names = sorted(p.name for p in path.iterdir() if (p / CONFIG).is_file()) if os.access(path, os.R_OK) else []
    if not names:
        return f"{path} is no run folder: it has no {CONFIG}."
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{path} is no run folder, but holds some: {', '.join(str(path / n) for n in names[:3])}{more}."


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
        return {"": source if not overrides else Experiment(**override(source.model_dump(), overrides))}
    data = {str(k): v for k, v in source.items()} if isinstance(source, Mapping) else read_recipe(source)
    table = _variants(data.pop("variants", None))
    chosen = [str(v) for v in variants] or list(table)
    for name in chosen:
        if name not in table:
            raise unknown("variant", name, table)
    declared = data.get("words")
    known = list(declared) if isinstance(declared, Mapping) else []
    if not chosen:
        return {"": Experiment(**_with_words(override(data, overrides), known))}
    if len(chosen) > 1 and _names_a_model(overrides) and all(_names_a_model(table[name]) for name in chosen):
        words = ", ".join(f"words.{name}" for name in known)
        told = f"override {words}, or name one by --variant" if known else "name one by --variant"
        raise UsageError(f"One model.pattern or model.family makes all {len(chosen)} variants the same model: {told}.")
    experiments = {}
    for name in chosen:
        merged = _with_words(override(override(data, table[name]), overrides), known)
        base = Path(merged.get("out") or Path("runs", str(merged.get("name", "experiment"))))
        merged |= {"name": name, "out": str(base / name)}
        experiments[name] = Experiment(**merged)
    return experiments


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
        return create_task(_tuples({"name": source, **given}))
    recipe = override(read_recipe(source), overrides)
    if "task" not in recipe:
        raise UsageError(f"{source} names no task.")
    return create_task(_tuples(recipe["task"]))


def names_folder(source: str) -> bool:
    """Whether what could be a task's name, a recipe's or a path is a folder's path."""
    return source not in tasks and source not in list_recipes() and check_path(source).is_dir()


def _is_recipe(source: str) -> bool:
    return source in list_recipes() or check_path(source).exists()


def differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    keys: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        path = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing(a, b, path + ".")
        elif a != b:
            keys.append(path)
    return keys


__all__ = [
    "Experiment",
    "Parts",
    "Target",
    "TrainConfig",
    "differing",
    "list_recipes",
    "names_folder",
    "override",
    "parse_overrides",
    "read_experiment",
    "read_experiments",
    "read_recipe",
    "read_task",
    "recipe_about",
]
