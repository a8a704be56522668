"""What a training would take, as `zoo train --dry-run` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.core import yaml_text
from zoo.report.units import count, size


def estimate_lines(found: Mapping[str, Any]) -> list[str]:
    """An estimate of `zoo.training.estimate` for a person: the config as YAML, then what it takes."""
    memory = {name: "not estimated" if n is None else size(n) for name, n in found["memory"].items()}
    parts = ", ".join(f"{name} {n}" for name, n in memory.items() if name != "total")
    rows = {
        "folder": found["out"],
        **({"first weights": found["first_weights"]} if found["first_weights"] else {}),
        "parameters": f"{found['n_parameters']:,}",
        "a step": f"{count(found['tokens_per_step'])} tokens, {count(found['flops_per_step'])} FLOPs",
        "memory": f"{memory['total']}, estimated: {parts}",
    }
    width = max(map(len, rows))
    config = yaml_text.dump(dict(found["config"])).rstrip("\n").split("\n")
    return [*config, "", *(f"{name:<{width}}  {text}" for name, text in rows.items())]
