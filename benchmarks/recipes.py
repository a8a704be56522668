"""What every shipped recipe reaches on this machine, and in what time.

    python -m benchmarks.recipes [--budget 600] [--only sudoku-4x4 ...] [--out docs/results]

Each is `zoo train RECIPE` in a process of its own; training stops at the recipe's own end or after the budget,
whichever comes first, and the table says which. (Those of state tracking are for `benchmarks.state_tracking`.) Rows of
recipes not run this time are kept. Writes recipes.json and recipes.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.state_tracking import RECIPES as STATE_TRACKING
from zoo.training.experiment import list_recipes, read_recipe

ENDED = {"target": "target reached", "finished": "all its steps", "time_budget": "time budget"}


def run(recipe: str, budget: float, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The results of one recipe, one for each of its variants."""
    # Recipes with variants bring a budget of their own.
    overrides = [] if "variants" in read_recipe(recipe) else [f"train.time_budget={budget}"]
    command = [sys.executable, "-m", "zoo", "train", recipe, "--quiet", f"out={folder / recipe}", *overrides]
    subprocess.run(command, check=True)
    return [json.loads(file.read_text()) for file in sorted((folder / recipe).rglob("result.json"))]


def row(recipe: str, result: dict[str, Any]) -> dict[str, Any]:
    """The figures that the table shows."""
    test = result["test"]
    return {
        "recipe": recipe if result["name"] == recipe else f"{recipe}, {result['name']}",
        "pattern": result["model"]["pattern"],
        "n_parameters": result["n_parameters"],
        "status": result["status"],
        "steps": result["steps"],
        "seconds": round(result["seconds"], 1),
        "test": {k: v for k, v in test.items() if k != "slices"},
        "tokens_per_second": result["tokens_per_second"],
        "precision": result["precision"],
        "commit": result["commit"],
        "machine": f"{result['machine']['cpu']}, {result['machine']['threads']} threads",
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as a page."""
    lines = [
        "# What the recipes reach",
        "",
        "Scores on unseen test examples, read once with the weights that validation chose. `valid`: the answer is a",
        f"shortest path, the expected one or another. Machine: {rows[0]['machine']}, {rows[0]['precision']}.",
        "",
        "| recipe | layers | parameters | exact | accuracy | valid | training | ended by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        t = r["test"]
        valid = f"{t['valid']:.1%}" if "valid" in t else ""
        layers = r["pattern"].replace("|", "\\|")
        lines.append(
            f"| {r['recipe']} | `{layers}` | {r['n_parameters']:,} | {t['exact']:.2%} | {t['accuracy']:.2%} | {valid} "
            f"| {r['seconds']:.0f} s, {r['steps']:,} steps | {ENDED[r['status']]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in list_recipes() if name not in STATE_TRACKING]
    parser.add_argument("--budget", type=float, default=600, help="seconds of training for each recipe")
    parser.add_argument("--only", nargs="*", choices=list_recipes(), default=default)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "recipes.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(store.read_text()) if store.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in args.only:
            rows[recipe] = [row(recipe, result) for result in run(recipe, args.budget, pathlib.Path(scratch))]
            store.write_text(json.dumps(rows, indent=1) + "\n")
            (args.out / "recipes.md").write_text(markdown([r for name in sorted(rows) for r in rows[name]]))


if __name__ == "__main__":
    main()
