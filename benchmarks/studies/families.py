"""How near every published family is to the public code it was compared with, and its sizes.

    PARITY_RECORD=record.jsonl make parity
    python -m zoo.benchmarks.studies.families --record record.jsonl

`make parity` adds a line to the record for every whole model that it compares: the largest differences from the
model of transformers, or of flash-linear-attention, with the same random weights, in float32. A record of some
families leaves the rows of the others as they are. Parameters are counted on the meta device.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

import zoo
from zoo.benchmarks.studies.harness import Data, Study
from zoo.models.families import families
from zoo.training.machine import describe_machine, versions

FIGURES = ("one pass", "chunks", "steps", "gradients")


def rows(record: pathlib.Path, old: Data) -> list[dict[str, Any]]:
    """One row for each family: its architecture, its sizes and the largest of each difference, which a family that the
    record does not have keeps from the `old` data."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    before = {row["family"]: row for row in old.get("families", [])}
    found = []
    for family in families.all():
        cases = [line for line in lines if line["family"] == family.name]
        kept = {} if cases else before.get(family.name, {})
        largest = {figure: max((case[figure] for case in cases), default=kept.get(figure)) for figure in FIGURES}
        sizes = {size: parameters(f"{family.name}-{size}") for size in family.sizes}
        found.append(
            {
                "family": family.name,
                "architecture": family.architecture,
                "cases": len(cases) or kept.get("cases", 0),
                **largest,
                "sizes": sizes,
            }
        )
    return found


def parameters(name: str) -> int:
    """Number of parameters of a family's size."""
    with torch.device("meta"):
        return zoo.create_model(name).n_parameters()


def short(n: int) -> str:
    """A number of parameters for a person."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if n >= 0.9995 * size:
            return f"{n / size:.3g}{unit}"
    return f"{n / 1e3:.3g}k"


def markdown(data: Data) -> str:
    """The page."""
    lines = [
        "# Published families",
        "",
        "Small random models of the public code, with awkward sizes and options on and off, read by `zoo.from_hf`: the",
        "largest difference over all cases, in float32, of the logits in one pass, in chunks and token by token",
        "(absolute; the bound is 1e-4), and of the gradients of the loss (of a tensor, over its largest; the bound is",
        "1e-3). Writing back gives every weight bit for bit. Families without a case have no public weights, or share",
        "the classes of another family; `mamba_ssm` is the authors' form of `mamba`, `mamba2` and `mamba3`; `dream`,",
        "`hrm`, `llada`, `mdlm` and `trm` are compared in `tests/interop` with a record of their authors' code, within",
        "3e-5.",
        "",
        "The cases of `deepseek_v32` have 12 indexer heads. With few heads, the indexer's ReLU makes many of its",
        "scores exactly 0; of equal scores the zoo takes the latest step, transformers any, so that the two then",
        "attend to different steps, and logits differ by far more than rounding: by 0.3 to 0.7 with 4 heads,",
        "`index_topk=8` and 33 tokens. So does `deepseek_v32-tiny`, which has 4 heads. With `index_topk` no smaller",
        "than the context, or with 16 heads, they agree (5e-7). The published model has 64.",
        "",
        "Every family was compared at such small sizes. The published checkpoints themselves were not run.",
        "",
        f"Made by `python -m zoo.benchmarks.studies.families` after `make parity`; "
        f"{data['machine']['cpu']}, torch {data['versions']['torch']}.",
        "",
        "| family | compared with | cases | one pass | chunks | steps | gradients | sizes (parameters) |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in data["families"]:
        figures = ["—" if row[f] is None else f"{row[f]:.1e}" for f in FIGURES]
        sizes = ", ".join(f"{size} ({short(n)})" for size, n in row["sizes"].items())
        lines.append(
            f"| `{row['family']}` | {row['architecture']} | {row['cases']} | {' | '.join(figures)} | {sizes} |"
        )
    return "\n".join(lines) + "\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=pathlib.Path, required=True)


def measure(args: argparse.Namespace, old: Data) -> Iterator[Data]:
    machine = describe_machine(torch.device("cpu"))
    yield {"machine": machine, "versions": versions(), "families": rows(args.record, old)}


STUDY = Study("families", __doc__, arguments, measure, markdown)

if __name__ == "__main__":
    STUDY.main()
