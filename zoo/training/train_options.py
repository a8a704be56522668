"""The options of training: how long, by which optimizer, in which precision, judged when, saved when."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from zoo.core.errors import UsageError
from zoo.core.needs import Need, Needs
from zoo.core.options import Options
from zoo.tasks.scores import LOWER_IS_BETTER

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
        parallel: what each of several processes holds of the model: ddp, all of it (PyTorch's DDP); or fsdp, its rows
            of every weight, with their share of the optimizer's moments and of the average (PyTorch's FSDP2), where a
            layer is gathered while it computes. It may be changed in a run that goes on.
        sequence_processes: number of processes that share one sequence, each with a contiguous piece of its steps; the
            number of all processes is a multiple of it. It may be changed in a run that goes on.
        expert_parallel: number of processes that share out the experts of every `moe`: tokens are sent to the process
            that holds their experts, and what these return is sent back. The number of all processes is a multiple of
            it, and it divides the number of experts. It may be changed in a run that goes on.
        compile: compile the layers with torch.compile, as one graph, before the first step. Where evaluation generates
            answers token by token (next_token), its steps run as one graph too.
        cuda_graphs: replay the compiled layers as CUDA graphs (torch.compile's reduce-overhead), which saves the launch
            of each kernel: for models so small that launches take most of a step. It needs `compile` and a GPU of
            NVIDIA.
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
        timeout: seconds after which one of several processes that does not answer counts as lost, and all of them end.
            It has to be longer than what one process does alone, such as the writing of a checkpoint.
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
    parallel: Literal["ddp", "fsdp"] = "ddp"
    sequence_processes: int = Field(default=1, ge=1, le=2**20)
    expert_parallel: int = Field(default=1, ge=1, le=2**20)
    compile: bool = False
    cuda_graphs: bool = False
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
    timeout: float = Field(default=600.0, ge=1, le=10**6)

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
        for option in ("sequence_processes", "expert_parallel"):
            if self.compile and (n := getattr(self, option)) > 1:
                raise UsageError(f"train.{option}={n}: train.compile is not allowed with it.")
        if self.cuda_graphs and not self.compile:
            raise UsageError("train.cuda_graphs=true replays what train.compile=true compiles: set both.")
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
    "train.timeout",
    "train.recompute",
    "train.parallel",
    "train.sequence_processes",
    "train.expert_parallel",
}
"""Keys that may change between the parts of one run: none of them changes a weight."""


__all__ = ["BOOKKEEPING", "Target", "TrainConfig"]
