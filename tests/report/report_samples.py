"""Runs and measurements as training and `zoo bench` write them, made up but lifelike: `report_samples.py FOLDER`."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MODELS: dict[str, dict[str, Any]] = {
    "gated-deltanet": {
        "pattern": "2*(short_conv gated_deltanet swiglu)",
        "lr": 0.002,
        "accuracy": 0.9986, "solved_at": 700, "rate": 21_400, "decode": 910, "state": 68_608, "parameters": 437_504,
    },
    "attention": {
        "pattern": "2*(short_conv mha swiglu)",
        "lr": 0.001,
        "accuracy": 0.9991, "solved_at": 420, "rate": 33_800, "decode": 1_240, "state": 133_120, "parameters": 412_160,
    },
    "mamba2": {
        "pattern": "2*(mamba2 swiglu)",
        "lr": 0.003,
        "accuracy": 0.9948, "solved_at": 900, "rate": 24_900, "decode": 1_020, "state": 137_216, "parameters": 455_296,
    },
    "window": {
        "pattern": "2*(swa(window=16) swiglu)",
        "lr": 0.003,
        "accuracy": 0.713, "solved_at": 1_100, "rate": 35_200, "decode": 1_310, "state": 32_768, "parameters": 409_600,
    },
    "lstm": {
        "pattern": "2*(lstm swiglu)",
        "lr": 0.003,
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
OF_ERRORS = {"error-by-time", "error-by-state"}  # plots of real vectors, which no sample predicts
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
            "lr": model["lr"],
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
        by_pairs = {pairs: accuracy ** (int(pairs) ** 1.3 / 4) for pairs in ("2", "4", "8")}
        sliced = {pairs: {"accuracy": a, "exact": a ** int(pairs), "n": n // 3} for pairs, a in by_pairs.items()}
        far = {str(d): {"accuracy": accuracy ** (1 + d / 16), "exact": 0.0, "n": n // 4} for d in (8, 16, 32, 64)}
        by_length = {f"accuracy_{n}": accuracy ** (n / 32) for n in (32, 64, 128)}
        slices = {"n_pairs": sliced, "distance": far}
        return {"accuracy": accuracy, "exact": accuracy**4, **by_length, "n": n, "slices": slices}

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


LAYERS = {"mamba2": False, "mha": False, "gated_deltanet": False, "torch.nn.LSTM": True}
"""Layers that were measured, and whether each is someone else's."""


def write_measurements(path: Path) -> Path:
    """A file as `zoo bench` writes it, with every benchmark in it."""
    path.write_text("".join(json.dumps(record) + "\n" for record in _records()))
    return path


def _records() -> Iterator[dict[str, Any]]:
    for i, (name, peer) in enumerate(LAYERS.items(), 1):
        grows = name == "mha"
        for length in (256, 1024, 4096):
            for direction in ("train", "forward"):
                setting = {"width": 64, "length": length, "batch_size": 4096 // length, "direction": direction}
                rate = 2e5 / i / (1 + length / 512 if grows else 1)
                late = peer and length == 4096
                yield record("throughput", name, setting, {} if late else {"tokens_per_second": figure(rate)},
                             peer=peer, status="over budget" if late else "ok", why="90 s" if late else "")  # fmt: skip
        for length in (1024, 65_536, 1_048_576):
            state = float(512 * length if grows else 40_000 * i)
            how = "measured" if length < 1e6 else "formula"
            setting = {"width": 64, "length": length, "batch_size": 1, "part": "state"}
            yield record("memory", name, setting, {"state_bytes": figure(state, how, 0)}, peer=peer)
            setting = {"width": 64, "context": length, "batch_size": 1, "part": "step"}
            rate, how = 3000 / i, "random cache" if grows else "measured"
            yield record("decode", name, setting, {"tokens_per_second": figure(rate, how)}, peer=peer)
        setting = {"width": 64, "length": 1024, "batch_size": 1, "part": "training"}
        yield record("memory", name, setting, {"peak_bytes": figure(1e6 * i)}, peer=peer)
        if peer:
            continue
        trained = {"task": "niah", "width": 64, "layers": f"2*({name} swiglu)", "train_length": 64}
        for length in (64, 128, 256):
            share = max(0.1, 1 - 0.3 * i * (length > 64))
            depths = {depth: {"accuracy": share * at} for depth, at in (("0", 1.0), ("0.5", 0.9))}
            yield record("long-context", name, trained | {"length": length}, {"accuracy": figure(share, spread=0)},
                         slices={"depth": depths})  # fmt: skip
        yield record("long-context", name, trained | {"length": 0}, {"effective_length": figure(64.0 * i, spread=0)})
        setting = {"task": "average", "variation": "baseline", "share": 0.01, "width": 64, "layers": name}
        by_task = {"compression": {"accuracy": 0.5}, "memorization": {"accuracy": 1 - 0.1 * i}}
        yield record("mad", name, setting, {"accuracy": figure(0.9 - 0.1 * i)}, slices={"task": by_task})


def figure(value: float, how: str = "measured", spread: float = 0.05) -> dict[str, Any]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread), "n": 5, "how": how}


def record(benchmark: str, name: str, setting: dict[str, Any], figures: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One line of a file of `zoo bench`."""
    return {
        "benchmark": benchmark, "name": name, "peer": False, "setting": setting, "status": "ok", "why": "",
        "figures": figures, "slices": {}, "laws": ["chunks"], "n_parameters": 1000, "precision": "float32",
        "threads": 2, "device": "cpu", "backends": {}, "machine": {"cpu": "an example CPU", "threads": 2},
        "versions": {"torch": "2.13.0"}, "commit": "0000000", "date": "2026-01-01T00:00:00+00:00", **more,
    }  # fmt: skip


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
    write_measurements(Path(sys.argv[1]) / "bench.jsonl")
