"""Sweeps as the engine stores them, made up but lifelike: `report_trials.py FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from zoo.sweeps.store import Record, Store

SKILL = {"gated_deltanet": 2.2, "gqa": 1.6, "mamba2": 0.9, "lstm": -0.6, "gla": 0.4, "hgrn2": -3.0}
"""How good each word is, on a scale on which problems are hard."""
BEST_LR = 3e-3
CHANCE, PROBLEMS, ROWS = 0.05, 60, 2


def write_sweep(
    folder: Path,
    words: Iterable[str] = tuple(SKILL),
    lrs: Iterable[float] = (1e-3, BEST_LR, 1e-2),
    seeds: Iterable[int] = (0, 1, 2),
    *,
    choose_seeds: Iterable[int] = (),
    config: Mapping[str, Any] | None = None,
    changes: Mapping[tuple[str, float, int], Mapping[str, Any]] | None = None,
) -> Path:
    """A sweep of words, learning rates and seeds; with `choose_seeds` these choose the rate of each word.

    Args:
        folder: of the sweep.
        words, lrs, seeds: what is swept.
        choose_seeds: seeds of the trials that choose; the others then run at the best rate alone.
        config: over the config of every trial, by dotted keys.
        changes: over the row of single trials, by word, rate and seed.
    """
    folder.mkdir(parents=True)
    words, lrs, seeds, choose_seeds = list(words), list(lrs), list(seeds), list(choose_seeds)
    plan = [(word, lr, seed, "grid") for word in words for lr in lrs for seed in seeds]
    if choose_seeds:
        plan = [(word, lr, seed, "choose") for word in words for lr in lrs for seed in choose_seeds]
        plan += [(word, BEST_LR, seed, "final") for word in words for seed in seeds]
    space = {"words.mixer": words, "train.lr": lrs, "train.seed": seeds}
    sweep: dict[str, Any] = {"experiment": {"recipe": "mqar"}, "space": space}
    if choose_seeds:
        sweep["choose"] = {"key": "train.lr", "seeds": choose_seeds}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    store = Store(folder)
    for trial, (word, lr, seed, stage) in enumerate(plan):
        store.add(record(trial, word, lr, seed, stage, config or {}, (changes or {}).get((word, lr, seed), {})))
    store.compact()
    return folder


def record(
    trial: int, word: str, lr: float, seed: int, stage: str, config: Mapping[str, Any], changes: Mapping[str, Any]
) -> Record:
    """One trial: `changes` go over its row; without a status that ends a trial it has no test figures."""
    random = np.random.default_rng([trial, seed])
    hard = np.random.default_rng(0).normal(size=PROBLEMS)  # of the problems, which all trials share
    skill = SKILL.get(word, 0.5) - 2.0 * abs(np.log10(lr / BEST_LR)) + 0.25 * random.normal()
    right = 1 / (1 + np.exp(2 * hard - 2 * skill))
    rows = np.repeat(right, ROWS)
    accuracy = np.clip(CHANCE + (1 - CHANCE) * rows * (skill > -2) + 0.03 * random.normal(size=rows.shape), 0, 1)
    accuracy = np.where(skill > -2, accuracy, random.random(rows.shape) < CHANCE).astype(float)
    exact = (random.random(rows.shape) < accuracy**3).astype(float)
    seen = float(accuracy.mean() + 0.01 * random.normal())
    settings = {
        "name": f"mqar-{trial}", "out": f"runs/s/trials/{trial:05d}", "task.name": "mqar", "task.n_pairs": 4,
        "model.pattern": f"2*({word} swiglu)", "model.d_model": 64, "words.mixer": word, "train.lr": lr,
        "train.seed": seed, "train.steps": 400, "train.metric": None, **config,
    }  # fmt: skip
    size = 40_000 + 1_000 * (sum(map(ord, word)) % 17)
    row: dict[str, Any] = {
        "trial": trial, "id": f"{trial:05d}", "stage": stage, "status": "finished", "reason": None, "attempts": 1,
        "seed": seed, "steps": 400, "seconds": 20.0 + trial % 7, "parameters": size,
        "state_bytes": 512 * (2 + sum(map(ord, word)) % 31), "flops_per_token": 2 * size, "peak_memory": None,
        "tokens_per_second": 20_000.0, "chance": CHANCE, "started": "2026-01-01T00:00:00", "ended": None,
        "zoo_version": "0.2.0",
        **{f"config.{key}": value for key, value in settings.items()},
        "set.words.mixer": word, "set.train.lr": lr, "set.train.seed": seed,
        "validation.accuracy": seen, "validation.loss": 3 * (1 - seen),
        "machine.cpu": "an example CPU", "machine.threads": 1,
    }  # fmt: skip
    tested = stage != "choose" and changes.get("status", "finished") in ("finished", "target", "time_budget")
    if tested:
        row |= {"test.accuracy": float(accuracy.mean()), "test.exact": float(exact.mean()), "test.n_problems": PROBLEMS}
    curves = []
    for step in range(20, 401, 20):
        risen = seen / (1 + np.exp(-(step - 160 + 10 * random.normal()) / 40))
        line = {"step": step, "seconds": step / 20, "tokens": step * 4096}
        curves.append(line | {"split": "train", "loss": 3 * (1 - risen), "accuracy": risen})
        if step % 40 == 0:
            curves.append(line | {"split": "validation", "loss": 3 * (1 - risen), "accuracy": risen})
    problems = {
        "row": list(range(len(rows))),
        "problem": np.repeat(np.arange(PROBLEMS), ROWS).tolist(),
        "accuracy": accuracy.tolist(),
        "exact": exact.tolist(),
    }
    return Record({**row, **changes}, curves, problems if tested else None)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_sweep(root / "grid")
    write_sweep(root / "chosen", choose_seeds=(100, 101))
    write_sweep(root / "large", lrs=(1e-3, BEST_LR, 1e-2, 3e-2, 1e-1), seeds=range(10))
