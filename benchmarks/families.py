"""How near every published family is to the public code it was compared with, and its sizes.

    PARITY_RECORD=record.jsonl make parity
    python -m zoo.benchmarks.families --record record.jsonl --out docs/results

`make parity` adds a line to the record for every whole model that it compares: the largest differences from
transformers' (for rwkv7 flash-linear-attention's) model with the same random weights, in float32. Parameters are
counted on the meta device. Writes families.json and families.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import torch

import zoo
from zoo.models.families import families
from zoo.training.machine import describe_machine, versions

FIGURES = ("one pass", "chunks", "steps", "gradients")


def rows(record: pathlib.Path) -> list[dict[str, Any]]:
    """One row for each family: its architecture, its sizes and the largest of each difference."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    found = []
    for family in families.all():
        cases = [line for line in lines if line["family"] == family.name]
        largest = {figure: max((case[figure] for case in cases), default=None) for figure in FIGURES}
        sizes = {size: parameters(f"{family.name}-{size}") for size in family.sizes}
        found.append(
            {"family": family.name, "architecture": family.architecture, "cases": len(cases), **largest, "sizes": sizes}
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


def markdown(found: list[dict[str, Any]], machine: dict[str, Any], libraries: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Published families",
        "",
        "Small random models of the public code, with awkward sizes and options on and off, read by `zoo.from_hf`: the",
        "largest difference over all cases, in float32, of the logits in one pass, in chunks and token by token",
        "(absolute; the bound is 1e-4), and of the gradients of the loss (of a tensor, over its largest; the bound is",
        "1e-3). Writing back gives every weight bit for bit. Families without a case have no public weights, or share",
        "the classes of another family; `mamba_ssm` is the authors' form of `mamba` and `mamba2`; `hrm`, `llada`,",
        "`mdlm` and `trm` are compared in `tests/interop` with a record of their authors' code, within 3e-5.",
        "",
        "The cases of `deepseek_v32` have 12 indexer heads. With few heads, the indexer's ReLU makes many of its",
        "scores exactly 0; of equal scores the zoo takes the latest step, transformers any, so that the two then",
        "attend to different steps, and logits differ by far more than rounding: by 0.3 to 0.7 with 4 heads,",
        "`index_topk=8` and 33 tokens. So does `deepseek_v32-tiny`, which has 4 heads. With `index_topk` no smaller",
        "than the context, or with 16 heads, they agree (5e-7). The published model has 64.",
        "",
        "Every family was compared at such small sizes. The published checkpoints themselves were not run.",
        "",
        f"Made by `python -m zoo.benchmarks.families` after `make parity`; "
        f"{machine['cpu']}, torch {libraries['torch']}.",
        "",
        "| family | compared with | cases | one pass | chunks | steps | gradients | sizes (parameters) |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in found:
        figures = ["—" if row[f] is None else f"{row[f]:.1e}" for f in FIGURES]
        sizes = ", ".join(f"{size} ({short(n)})" for size, n in row["sizes"].items())
        lines.append(
            f"| `{row['family']}` | {row['architecture']} | {row['cases']} | {' | '.join(figures)} | {sizes} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    found, machine, libraries = rows(arguments.record), describe_machine(torch.device("cpu")), versions()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine, "versions": libraries, "families": found}
    (arguments.out / "families.json").write_text(json.dumps(data, indent=1) + "\n")
    (arguments.out / "families.md").write_text(markdown(found, machine, libraries))


if __name__ == "__main__":
    main()
