"""The options of an experiment: one validated config of task, model, objective and training."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from zoo.core.errors import UsageError, quoted
from zoo.core.needs import Need, Needs
from zoo.core.options import Options
from zoo.core.readers import check_path
from zoo.models.budget import SIZES
from zoo.models.config import ModelConfig, Recursion
from zoo.models.create import model_config
from zoo.objectives.base import objectives
from zoo.tasks.protocol import Task
from zoo.tasks.protocol import registry as tasks
from zoo.tasks.scores import LOWER_IS_BETTER
from zoo.training import machine
from zoo.training.fit import Parts, fit
from zoo.training.given import FROM_PYTHON
from zoo.training.init import Init, as_init

SECTIONS = ("task", "model", "objective")
NEVER = 2**40  # steps that no training comes to
LARGEST_BETA = 1 - 2**-8  # of moments in bfloat16: multiplied by more, a number of 8 significant bits may stay as it is


class Target(Options, label="train.target"):
    """A figure on validation that ends the training.

    Attributes:
        metric: a figure of the task's score, or "loss".
        value: training ends when validation reaches this value (of the loss and other errors: falls to this value).
    """

    metric: str = "accuracy"
    value: float

    def reached_by(self, score: Mapping[str, Any], lower_is_better: Container[str] = LOWER_IS_BETTER) -> bool:
        """Whether a validation score meets it; of figures in `lower_is_better` less is better."""
        figure = score[self.metric]
        return figure <= self.value if self.metric in lower_is_better else figure >= self.value


class TrainConfig(Options, label="train"):
    """How a model is trained. A step is one batch.

    Attributes:
        steps: number of batches. A run that is given more goes on; its schedule is then that of the new number, and
            the bits of `constant` are those of a run that had all steps from its start.
        batch_size: rows of a batch.
        accumulate: number of parts in which a batch is read, one after another, for one step with the gradient of the
            whole batch: memory for one part. Losses that mixers leave (moe, dsa) are the mean of those of the parts.
        recompute: store no activations within the layers and compute them again in the backward pass: the same bits,
            memory for one layer (of a recursive model: for one application of its network), about a third more time.
        rows: number of training rows, which repeat in another order each epoch; by default every row is new. A run
            that goes on may be given another number, from its next step on.
        seed: seed of the initial weights, of the stream of training rows and of dropout.
        optimizer: adamw; or muon for the hidden matrices and AdamW for the rest.
        lr: peak learning rate.
        muon_lr: learning rate of the Muon group, by default `lr`, which fits the default of `muon_scaling`.
        muon_scaling: factor on Muon's updates of a matrix (rows, columns): match_rms_adamw has 0.2 sqrt(max(rows,
            columns)), the size of AdamW's updates; original has sqrt(max(1, rows / columns)), for learning rates near
            0.02.
        muon_weight_decay: weight decay of the Muon group, by default `weight_decay`.
        puzzle_lr: learning rate of the puzzle embeddings of a recursive model. An embedding then moves by the sign of
            its gradient, and decays, in the steps that use it; by default it is trained like all other weights.
        weight_decay: decoupled weight decay; not on norms, biases, decays and embeddings.
        decay_all: weight decay on these too.
        beta1: beta1 of AdamW.
        beta2: beta2 of AdamW.
        eps: epsilon of AdamW.
        momentum: momentum of Muon.
        nesterov: Nesterov's momentum in Muon.
        newton_schulz_steps: steps of the Newton-Schulz iteration by which Muon makes an update orthogonal.
        clip: largest norm of the gradient; None does not clip.
        schedule: the learning rate after the warm-up: cosine to the end; constant; or wsd, which is constant and then
            falls linearly over the last `decay_steps`.
        warmup_steps: steps of linear warm-up.
        decay_steps: falling steps of wsd, by default a fifth of the steps.
        final_lr: learning rate at the end of the schedule, as a share of the peak; the last step is one step before it.
        ema: decay of the running average of the weights; evaluation then uses the average.
        ema_start: step after which the average starts, from the weights of then; before, evaluation uses the weights.
        ema_warmup: a faster decay in the first steps, for runs of less than about 9,000 steps; false has a constant
            decay (TRM).
        device: auto chooses cuda, else mps, else cpu.
        precision: bfloat16 is autocast; auto chooses bfloat16 on GPUs and CPUs with hardware for it.
        parameters: type of the weights that are trained. In bfloat16 the weights, their gradients, the optimizer's
            moments and the checkpoints take half the memory, and so does everything computed; the running average
            stays in float32. Weights have 8 significant bits then: an update of less than 1/512 of a weight is lost.
        compile: compile the layers with torch.compile.
        threads: CPU threads, by default torch's choice.
        eval_every: steps between evaluations on validation.
        eval_rows: validation rows.
        test_rows: test rows, read once at the end with the best weights.
        eval_batch_size: rows evaluated at once, by default `batch_size`.
        metric: the validation figure that selects the best weights, by default the target's, or else the objective's:
            accuracy, or for regression mse.
        target: a figure on validation that ends the training.
        time_budget: seconds after which training ends.
        log_every: steps between training lines in metrics.jsonl.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: seconds between checkpoints.
        keep: number of latest checkpoints to keep, beside the best.
    """

    steps: int = Field(default=1000, ge=1, le=NEVER)
    batch_size: int = Field(default=64, ge=1)
    accumulate: int = Field(default=1, ge=1)
    recompute: bool = False
    rows: int | None = Field(default=None, ge=1, le=NEVER)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    optimizer: Literal["adamw", "adam_atan2", "muon"] = "adamw"
    lr: float = Field(default=3e-3, gt=0)
    muon_lr: float | None = Field(default=None, gt=0)
    muon_scaling: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    muon_weight_decay: float | None = Field(default=None, ge=0)
    puzzle_lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay_all: bool = False
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    newton_schulz_steps: int = Field(default=5, ge=1, le=99)
    clip: float | None = Field(default=1.0, gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0, le=NEVER)
    decay_steps: int | None = Field(default=None, ge=0, le=NEVER)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    ema_start: int = Field(default=0, ge=0, le=NEVER)
    ema_warmup: bool = True
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    parameters: Literal["float32", "bfloat16"] = "float32"
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

    @model_validator(mode="after")
    def _goes_together(self) -> TrainConfig:
        if self.accumulate > self.batch_size:
            told = f"a batch has {self.batch_size} rows, and every part needs one"
            raise UsageError(f"train.accumulate={self.accumulate} is too large: {told}.")
        if self.ema_start and self.ema is None:
            raise UsageError(f"train.ema_start={self.ema_start} belongs to train.ema, which is not set.")
        if self.ema_start >= self.steps:
            told = f"training ends after train.steps={self.steps}, before the average would start"
            raise UsageError(f"train.ema_start={self.ema_start} is too large: {told}.")
        if self.parameters == "bfloat16":
            if self.precision == "float32":
                told = "computes in bfloat16: leave out train.precision, or set train.parameters=float32"
                raise UsageError(f"train.precision=float32 is not allowed: train.parameters=bfloat16 {told}.")
            for name in ("beta1", "beta2", "momentum"):
                if (beta := getattr(self, name)) > LARGEST_BETA:
                    told = f"train.parameters=bfloat16 takes at most {LARGEST_BETA}, as a running mean in it forgets"
                    raise UsageError(f"train.{name}={beta:g} is too large: {told} in larger steps only.")
        return self

    def needs(self) -> Needs:
        """What the training needs of the model."""
        if self.puzzle_lr is None:
            return Needs()
        why = "train.puzzle_lr is for what is learned of each puzzle: set model.recursion.prefix"
        return Needs(prefix=Need(True, why))

    @property
    def computes_in(self) -> str:
        """`precision`, which bfloat16 parameters decide."""
        return self.precision if self.parameters == "float32" else self.parameters

    def selects_by(self, default: str = "accuracy") -> str:
        """The validation figure that selects the best weights: by default the target's, or else the objective's."""
        return self.metric or (self.target.metric if self.target else default)


BOOKKEEPING = {
    "train.keep",
    "train.checkpoint_every",
    "train.checkpoint_seconds",
    "train.time_budget",
    "train.recompute",
}
"""Keys that may change between the parts of one run: none of them changes a weight."""


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
                told = f"{n:,} rows of {length:,} tokens take {machine.gib(n * size)}"
                raise UsageError(f"train.{key}={n} is too large: {told}, and this machine has {machine.gib(memory)}.")

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


__all__ = ["BOOKKEEPING", "Experiment", "Target", "TrainConfig", "as_section", "completed"]
