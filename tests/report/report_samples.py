"""Run folders as training writes them, with made-up but lifelike figures: `python report_samples.py FOLDER`."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import yaml

MODELS: dict[str, dict[str, Any]] = {
    "gated-deltanet": {
        "pattern": "2*(short_conv gated_deltanet swiglu)",
        "accuracy": 0.9986, "solved_at": 700, "rate": 21_400, "decode": 910, "state": 68_608, "parameters": 437_504,
    },
    "attention": {
        "pattern": "2*(short_conv mha swiglu)",
        "accuracy": 0.9991, "solved_at": 420, "rate": 33_800, "decode": 1_240, "state": 133_120, "parameters": 412_160,
    },
    "mamba2": {
        "pattern": "2*(mamba2 swiglu)",
        "accuracy": 0.9948, "solved_at": 900, "rate": 24_900, "decode": 1_020, "state": 137_216, "parameters": 455_296,
    },
    "window": {
        "pattern": "2*(swa(window=16) swiglu)",
        "accuracy": 0.713, "solved_at": 1_100, "rate": 35_200, "decode": 1_310, "state": 32_768, "parameters": 409_600,
    },
    "lstm": {
        "pattern": "2*(lstm swiglu)",
        "accuracy": 0.312, "solved_at": 1_900, "rate": 11_700, "decode": 2_890, "state": 2_048, "parameters": 494_080,
    },
}  # fmt: skip
TASK = {
    "name": "mqar",
    "vocab_size": 256,
    "seq_len": 64,
    "n_pairs": [2, 4, 8],
    "power_a": 0.01,
    "random_non_queries": True,
}
TOKENS_PER_STEP, LAST_STEP, TARGET = 4096, 2000, 0.99


def write_samples(folder: Path) -> list[Path]:
    """All models as run folders below `folder`."""
    return [write_sample(folder / name, name) for name in MODELS]


def write_sample(folder: Path, like: str = "attention", *, result: bool = True, **changes: Any) -> Path:
    """One run folder; `changes` go over the entries of its result."""
    folder.mkdir(parents=True)
    model = MODELS[like]
    config = {
        "name": like,
        "task": TASK,
        "model": {"pattern": model["pattern"], "d_model": 128, "vocab_size": 256},
        "objective": {"name": "next_token"},
        "train": {
            "steps": LAST_STEP,
            "batch_size": 64,
            "lr": 0.003,
            "target": {"accuracy": TARGET},
            "time_budget": 120,
        },
        "seed": 0,
    }
    metrics, reached = _metrics(like)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if result:
        (folder / "result.json").write_text(json.dumps(_result(config, metrics, reached) | changes, indent=1))
    return folder


def _metrics(name: str) -> tuple[list[dict[str, Any]], float | None]:
    """A sigmoid on the way up, a loss to match, noise; it stops at the target."""
    draw = random.Random(name)
    model = MODELS[name]
    lines: list[dict[str, Any]] = []
    for step in range(10, LAST_STEP + 1, 10):
        risen = 1 / (1 + math.exp(-(step - 0.8 * model["solved_at"]) / (0.07 * model["solved_at"])))
        accuracy = 0.008 + (model["accuracy"] - 0.008) * risen
        seconds = step * TOKENS_PER_STEP / model["rate"]
        common = {"step": step, "seconds": round(seconds, 2), "tokens": step * TOKENS_PER_STEP}
        loss = 5.5 * (1 - risen) ** 1.2 + 0.9 * (1 - model["accuracy"]) * 5.5 + 0.02
        lines.append(common | {
            "split": "train", "loss": loss * math.exp(draw.gauss(0, 0.07)), "accuracy": accuracy, "lr": 0.003,
            "tokens_per_second": model["rate"] * draw.gauss(1, 0.02),
        })  # fmt: skip
        if step % 50 == 0:
            seen = min(max(accuracy + draw.gauss(0, 0.006 * (1 - risen) + 0.0004), 0), 1)
            lines.append(common | {"split": "validation", "loss": loss, "accuracy": seen, "exact": seen**4})
            if seen >= TARGET:
                return lines, round(seconds, 2)
    return lines, None


def _result(config: dict[str, Any], metrics: list[dict[str, Any]], reached: float | None) -> dict[str, Any]:
    model = MODELS[config["name"]]

    def scores(accuracy: float, n: int) -> dict[str, Any]:
        slices = {pairs: accuracy ** (int(pairs) ** 1.3 / 4) for pairs in ("2", "4", "8")}
        sliced = {pairs: {"accuracy": a, "exact": a ** int(pairs), "n": n // 3} for pairs, a in slices.items()}
        return {"accuracy": accuracy, "exact": accuracy**4, "n": n, "slices": {"n_pairs": sliced}}

    last = metrics[-1]
    return {
        "name": config["name"],
        "status": "target" if reached else "finished",
        **{key: config[key] for key in ("task", "model", "objective", "train", "seed")},
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"] + 1.8,
        "seconds_to_target": reached,
        "compile_seconds": 0.0,
        "validation": scores(last["accuracy"], 1000),
        "test": scores(model["accuracy"], 3000),
        "n_parameters": model["parameters"],
        "state_bytes": model["state"],
        "context_length": 64,
        "flops_per_token": 2 * model["parameters"],
        "tokens_per_second": model["rate"],
        "decode_tokens_per_second": model["decode"],
        "peak_memory_bytes": 310_000_000 + 700 * model["parameters"] // 4,
        "machine": {"cpu": "an example CPU", "cores": 2, "threads": 2, "memory_bytes": 16 << 30, "device": "cpu"},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "sequence-zoo": "0.1.0"},
        "backends": {"attention": "sdpa"} if config["name"] == "attention" else {"causal_conv1d": "chunked"},
        "precision": "bfloat16",
        "commit": "0000000",
    }


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
