"""A training step of recursive models beside its matrix products alone, and beside the authors' code.

    python -m zoo.benchmarks.studies.trm_step [REPOSITORY] [--threads 1] [--repeats 7]

One supervision step, loss and backward pass (no optimizer), in bfloat16: TRM's MLP form in the authors' Sudoku
configuration (width 512, 81 cells behind 16 places, 3 cycles of 6 updates, 8 puzzles), also recomputing, and the
recipes of Sudoku. REPOSITORY is a checkout of SamsungSAILMontreal/TinyRecursiveModels: then the authors' step too, with
the same weights and puzzles.

The floor of a step is its matrix products: the same shapes, the same number, forward and backward, each in the fastest
form that torch has for it (either order of memory, the transposed product). Steps and floors take turns in one process.
Times are those of the processor; ratios are of neighbours in a turn, with quartiles.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zoo import tasks
from zoo.benchmarks.studies.harness import Data, Study, facts, quartiles, table
from zoo.interop.trm import from_authors
from zoo.models import create_model
from zoo.models.recursive import RecursiveModel
from zoo.objectives import Objective, create_objective
from zoo.training.fit import fit
from zoo.training.recipes import read_experiment

RECIPES = {"sudoku-6x6-trm": 64, "sudoku-6x6-fast": 64, "sudoku-9x9-fast": 4}  # puzzles
PATTERN = '2*(token_mlp(length=97, d_hidden=512, norm_axis="time") swiglu(d_hidden=1536))'
ROWS, SIDE = 8, 2048
CONFIG: dict[str, Any] = {
    "batch_size": ROWS,
    "seq_len": 81,
    "puzzle_emb_ndim": 512,
    "num_puzzle_identifiers": 1,
    "vocab_size": 11,
    "H_cycles": 3,
    "L_cycles": 6,
    "H_layers": 0,
    "L_layers": 2,
    "hidden_size": 512,
    "expansion": 4,
    "num_heads": 8,
    "pos_encodings": "none",
    "mlp_t": True,
    "puzzle_emb_len": 16,
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.0,
}


class Theirs:
    """The authors' model and loss; every call is one step and gives the loss of a puzzle."""

    rows = ROWS

    def __init__(self, repository: pathlib.Path, inputs: Tensor, targets: Tensor):
        sys.path.insert(0, str(repository))
        kind = import_module("models.recursive_reasoning.trm").TinyRecursiveReasoningModel_ACTV1
        self.model = kind(CONFIG)
        self.head = import_module("models.losses").ACTLossHead(self.model, "stablemax_cross_entropy").train()
        self.batch = {"inputs": inputs, "labels": targets, "puzzle_identifiers": torch.zeros(ROWS, dtype=torch.int64)}

    def __call__(self) -> float:
        carry = self.head.initial_carry(self.batch)
        _, loss, *_ = self.head(return_keys=[], carry=carry, batch=self.batch)
        (loss / ROWS).backward()
        self.model.zero_grad()
        return loss.item() / ROWS


class Ours:
    """The same step here."""

    def __init__(
        self,
        model: RecursiveModel,
        objective: Objective,
        batch: tasks.Batch,
        *,
        recompute: bool = False,
        autocast: bool = True,
        device: str = "cpu",
    ):
        self.model, self.objective, self.autocast = model.to(device).train(), objective, autocast
        self.recompute, self.rows, self.device = recompute, len(batch.inputs), device
        self.data, self.generator = objective.encode(batch).to(torch.device(device)), torch.Generator()

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        self.model.zero_grad()
        return loss.item()

    def loss(self) -> Tensor:
        """Of the forward pass."""
        self.model.recompute = self.recompute
        with self.precision():
            (update,) = self.objective.updates(self.model, self.data, {}, self.generator)
        return update.loss

    def precision(self) -> Any:
        """The context of the forward pass."""
        return torch.autocast(self.device, torch.bfloat16) if self.autocast else nullcontext()

    def applications(self) -> tuple[int, int]:
        """How often the network is applied, and how often its backward pass is."""
        r = self.model.recursion
        return (r.cycles + self.recompute) * (r.updates + 1), r.updates + 1


def products_of(step: Ours) -> list[tuple[tuple[int, int, int], int]]:
    """The sizes (m, k, n) of the matrix products of the layers in a step of ours, and how often each is done."""
    n, length = step.rows, step.model.recursion.prefix + step.data.tokens.shape[1]
    forward, backward = step.applications()
    found = []
    mixer: Any
    for mixer in step.model.mixers():
        width, rows = step.model.config.d_model, n * length
        if mixer.name == "token_mlp":
            width, rows = length, n * width
        hidden = mixer.d_hidden
        both = [(rows, width, 2 * hidden), (rows, hidden, width)]
        slopes = [(rows, width, hidden), (rows, 2 * hidden, width)]
        weights = [(width, rows, hidden), (2 * hidden, rows, width)]
        for sizes, count in [(both, forward), (slopes, backward), (weights, backward)]:
            found += [(size, count) for size in sizes]
    return found


def flops_of(step: Ours) -> int:
    """Floating-point operations of all those products."""
    return sum(2 * m * k * n * count for (m, k, n), count in products_of(step))


class Floor:
    """The matrix products of the layers in a step of ours, alone."""

    def __init__(self, step: Ours):
        self.products = [(fastest(*size), count) for size, count in products_of(step)]
        self.flops = flops_of(step)

    def __call__(self) -> None:
        for product, count in self.products:
            for _ in range(count):
                product()


@functools.cache
def fastest(m: int, k: int, n: int) -> Callable[[], Tensor]:
    """A product of (m, k) and (k, n) in bfloat16, with its factors in the order of memory that is the fastest."""
    forms: list[Callable[[], Tensor]] = []
    for swapped, *across in itertools.product((False, True), repeat=3):
        a, b = (
            torch.randn(shape[::-1] if turned else shape).bfloat16()
            for shape, turned in zip([(n, k), (k, m)] if swapped else [(m, k), (k, n)], across, strict=True)
        )
        a, b = a.t() if across[0] else a, b.t() if across[1] else b
        forms.append(functools.partial(torch.mm, a, b, out=torch.empty(len(a), b.shape[1], dtype=torch.bfloat16)))
    return min(forms, key=lambda form: min(seconds(form) for _ in range(4)))


def seconds(form: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    form()
    return time.process_time() - start


def published_step(rows: int, device: str = "cpu", *, size: int = 9, width: int = CONFIG["hidden_size"]) -> Ours:
    """TRM's step in the authors' configuration, or at another size of puzzles and another width."""
    task = tasks.create_task("sudoku", size=size)
    objective = create_objective("deep_supervision", task, causal=False, exploration=0.0)
    return Ours(_published(width), objective, task.sample(rows, split="train", seed=0), device=device)


def recipe_step(name: str, rows: int, device: str = "cpu", changes: Mapping[str, Any] | None = None) -> Ours:
    """The step of a recipe of Sudoku."""
    experiment = read_experiment(name, changes)
    parts = fit(experiment.task, experiment.objective, experiment.model)
    made = create_model(parts.model)
    assert isinstance(made, RecursiveModel)
    made = made.bfloat16() if experiment.train.parameters == "bfloat16" else made
    batch = parts.task.sample(rows, split="train", seed=0)
    return Ours(made, parts.objective, batch, autocast=experiment.train.precision == "bfloat16", device=device)


def steps_of(repository: pathlib.Path | None) -> dict[str, Theirs | Ours]:
    torch.manual_seed(0)
    task = tasks.create_task("sudoku", size=9)
    batch = task.sample(ROWS, split="train", seed=0)
    steps: dict[str, Theirs | Ours] = {}
    if repository is not None:
        steps["theirs"] = theirs = Theirs(repository, batch.inputs, batch.targets)
        model = from_authors(theirs.model.state_dict(), CONFIG)
    else:
        model = _published()
    objective = create_objective("deep_supervision", task, causal=False, exploration=0.0)
    steps["ours"] = Ours(model, objective, batch)
    steps["ours, recomputing"] = Ours(model, objective, batch, recompute=True)
    return steps | {recipe: recipe_step(recipe, rows) for recipe, rows in RECIPES.items()}


def _published(width: int = CONFIG["hidden_size"]) -> RecursiveModel:
    recursion = {"cycles": CONFIG["H_cycles"], "updates": CONFIG["L_cycles"], "prefix": CONFIG["puzzle_emb_len"]}
    options = {"causal": False, "placement": "post", "norm": "rmsnorm_plain", "max_len": 97, "recursion": recursion}
    model = create_model(PATTERN, d_model=width, vocab_size=CONFIG["vocab_size"], **options)
    assert isinstance(model, RecursiveModel)
    return model


def measured(repository: pathlib.Path | None, repeats: int) -> Data:
    steps = steps_of(repository)
    floors = {name: Floor(step) for name, step in steps.items() if isinstance(step, Ours)}
    a, b = torch.randn(2, SIDE, SIDE).bfloat16()
    losses = {name: step() for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    alone: dict[str, list[float]] = {name: [] for name in floors}
    large: list[float] = []
    for _ in range(repeats):
        large.append(seconds(lambda: a @ b))
        for name, step in steps.items():
            times[name].append(seconds(step))
            if name in floors:
                alone[name].append(seconds(floors[name]))
    rate = 2 * SIDE**3 / statistics.median(large)
    found: dict[str, Data] = {}
    for name, step in steps.items():
        found[name] = {"median_s": statistics.median(times[name]), "rows": step.rows, "loss": losses[name]}
        if name in floors:
            found[name] |= {
                "flops": floors[name].flops,
                "products_s": statistics.median(alone[name]),
                "over_products": ratio(times[name], alone[name]),
                "share_of_matmul_rate": floors[name].flops / statistics.median(times[name]) / rate,
            }
        if "theirs" in times and name in ("ours", "ours, recomputing"):
            found[name]["over_theirs"] = ratio(times[name], times["theirs"])
    return {"steps": found, "matmul_rate": rate}


def ratio(times: list[float], others: list[float]) -> list[float]:
    """The median of the ratios of neighbours, and the quartiles on its sides."""
    low, middle, high = quartiles(times, others)
    return [middle, low, high]


def shown(found: list[float] | None) -> str:
    return "" if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def markdown(report: Data) -> str:
    at, steps = report["machine"], report["steps"]
    lines = [
        "# A training step of recursive models beside its matrix products",
        "",
        textwrap.fill(
            f"{at['cpu']}, threads: {at['threads']}, torch {at['versions']['torch']}, bfloat16; forward and backward "
            "pass of one supervision step, without the optimizer, in seconds of processor time. `ours` is TRM's MLP "
            f"form in the authors' Sudoku configuration ({ROWS} puzzles of 9x9, width 512, 3 cycles of 6 updates), "
            "`theirs` the authors' code with the same weights. The products of a step are those of its layers: same "
            "shapes, same number, forward and backward, each in torch's fastest form. Steps and products took turns in "
            f"one process ({report['repeats']} turns); ratios are medians with quartiles. A product of {SIDE} x {SIDE} "
            f"matrices runs at {report['matmul_rate'] / 1e12:.2f} TFLOP/s in the same process.",
            width=120,
        ),
        "",
    ]
    head = ["step", "puzzles", "products, TFLOP", "products, s", "step, s", "over the products", "share of that rate"]
    rows = [
        [
            name,
            str(m["rows"]),
            f"{m['flops'] / 1e12:.3f}" if "flops" in m else "",
            f"{m['products_s']:.3f}" if "products_s" in m else "",
            f"{m['median_s']:.3f}",
            shown(m.get("over_products")),
            f"{m['share_of_matmul_rate']:.0%}" if "share_of_matmul_rate" in m else "",
            shown(m.get("over_theirs")),
            f"{m['loss']:.4f}",
        ]
        for name, m in steps.items()
    ]
    return "\n".join([*lines, *table([*head, "over theirs", "loss"], rows)]) + "\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", type=pathlib.Path, nargs="?", help="a checkout of the authors' repository")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    torch.set_num_threads(args.threads)
    yield {"machine": facts(), "repeats": args.repeats, **measured(args.repository, args.repeats)}


STUDY = Study("trm_step", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
