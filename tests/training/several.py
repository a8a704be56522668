"""Trainings whose gradients are kept, in this process, or in several of them: `python several.py KIND,FOLDER ...`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import torch

import zoo
from zoo.training import checkpoint
from zoo.training.optimizer import Optimizer

ROOT = Path(__file__).resolve().parents[2]
MQAR = {"name": "mqar", "vocab_size": 32, "seq_len": 16, "n_pairs": 2}
SUDOKU = {"name": "sudoku", "size": 4}
RECURSIVE = {"causal": False, "placement": "post", "recursion": {"cycles": 2, "updates": 2, "max_steps": 3}}
HALTS = {"name": "deep_supervision", "exploration": 0.5, "random_start": True}
EARLY = "shortcut(moe(n_experts=4, n_zero_experts=2, top_k=3, bias=True, balance='bias', d_hidden=16), gqa swiglu)"
NOISES = {"name": "masked_diffusion", "prompt_dropout": 0.3}
BALANCED = "gqa moe(n_experts=4, d_hidden=16, balance='bias', bias_rate=0.01)"

KINDS: dict[str, dict[str, Any]] = {
    "next_token": {"task": MQAR, "model": "mamba2 gqa swiglu", "train": {"ema": 0.9}},
    "fill_in": {"task": SUDOKU, "model": "gqa swiglu", "train": {"accumulate": 2}},
    "masked_diffusion": {"task": SUDOKU, "model": {"pattern": "gqa swiglu", "causal": False}, "objective": NOISES},
    "uniform_diffusion": {
        "task": SUDOKU,
        "model": {"pattern": "bidirectional(gla) swiglu", "causal": False},
        "objective": "uniform_diffusion",
    },
    "deep_supervision": {"task": SUDOKU, "model": {"pattern": "gqa swiglu", **RECURSIVE}, "objective": HALTS},
    "q": {
        "task": SUDOKU,
        "model": {"pattern": "gqa swiglu", **RECURSIVE},
        "objective": {**HALTS, "halting": "q", "random_start": False},
        "train": {"accumulate": 2},
    },
    "regression": {"task": {"name": "oscillators"}, "model": "gru swiglu", "objective": "regression"},
    "classification": {"task": {"name": "digits"}, "model": "gru swiglu", "objective": "classification"},
    "muon": {"task": MQAR, "model": "gated_deltanet swiglu", "train": {"optimizer": "muon", "clip": 0.1}},
    "experts": {"task": MQAR, "model": BALANCED},
    "early_experts": {"task": MQAR, "model": EARLY, "train": {"optimizer": "muon", "ema": 0.9, "clip": 0.1}},
    "expert_puzzles": {
        "task": SUDOKU,
        "model": {"pattern": "gqa loop(2, moe(n_experts=4, d_hidden=16, balance='none'))", **RECURSIVE},
        "objective": HALTS,
        "train": {"accumulate": 2},
    },
    "shared": {
        "task": MQAR,
        "model": 'gru shared("a", gqa(adapter_rank=2) geglu(residual_scale=0.0), inject="wide", enters="next", '
        'out_proj=True) gru shared("a") swiglu shared("b", swiglu) gru shared("b")',
        "train": {"clip": 0.1},
    },
    "recompute": {"task": MQAR, "model": "gqa swiglu", "train": {"recompute": True, "rows": 20}},
}
PARTS: dict[str, dict[str, Any]] = {
    "balance_loss": {"task": MQAR, "model": "gqa moe(n_experts=4, d_hidden=16, balance_loss=0.1, z_loss=0.1)"},
    "dsa": {"task": MQAR, "model": "dsa(top_k=4) swiglu"},
}
"""Kinds whose layers leave losses of the part of a batch that they read: as many processes are as many parts."""

TRAIN = {
    "steps": 20,
    "batch_size": 8,
    "eval_every": 10,
    "eval_rows": 24,
    "test_rows": 8,
    "log_every": 1,
    "warmup_steps": 1,
    "threads": 1,
    "checkpoint_every": 7,
}


def experiment(kind: str, out: str | Path, **train: Any) -> dict[str, Any]:
    """A small training into a folder."""
    chosen = {**KINDS, **PARTS}[kind]
    model = chosen["model"]
    model = {"pattern": model} if isinstance(model, str) else model
    train = {**TRAIN, **chosen.get("train", {}), **train}
    return {**chosen, "model": {"d_model": 16, **model}, "train": train, "name": kind, "out": str(out)}


def whole(gradient: torch.Tensor) -> torch.Tensor:
    """A copy of a gradient, put together where it lies in pieces."""
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def train(kind: str, out: str | Path, **more: Any) -> list[torch.Tensor]:
    """Train in float64; returns the gradients of the first step, before clipping."""
    found: list[torch.Tensor] = []
    original = Optimizer.step

    def step(self: Optimizer, index: int) -> Any:
        if not index:
            found.extend(torch.zeros(p.shape) if p.grad is None else whole(p.grad) for p in self.parameters)
        return original(self, index)

    Optimizer.step = step  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        zoo.train(experiment(kind, out, **more), quiet=True)
    finally:
        torch.set_default_dtype(torch.float32)
        Optimizer.step = original  # type: ignore[method-assign]
    return found


def start(n: int, *command: str, cwd: Path, **more: str) -> list[subprocess.Popen[str]]:
    """Python with these arguments in n processes that torch can join, as `torchrun` would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), **more}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    return [forked.start([sys.executable, *command], env=os.environ | common | rank, cwd=cwd) for rank in ranks]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 240.0) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each; one that has not ended by then is killed."""
    until, found = time.monotonic() + seconds, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 1.0))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return found


# ---- trainings in several processes, and their checkpoints

HELD = 'parallel="fsdp",schedule="constant"'


def in_processes(n: int, *jobs: str, cwd: Path | None = None) -> None:
    """Train kinds with options, `KIND,FOLDER,OPTION=VALUE`, in n processes."""
    found = ended(start(n, __file__, *jobs, cwd=Path.cwd() if cwd is None else cwd))
    assert all(status == 0 for status, _, _ in found), found


def at_end(run: str) -> Path:
    return Path(run, "checkpoints/step_20")


def tensors_of(run: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, by name."""
    path = at_end(run)
    found = {**checkpoint.read_weights(path, average=False)}
    found |= {f"average.{k}": v for k, v in checkpoint.read_weights(path).items()}
    for i, part in enumerate(checkpoint.read_training(path)["optimizer"]):
        found |= {f"{i}.{j}.{k}": torch.as_tensor(v) for j, s in part["state"].items() for k, v in s.items()}
    return found


def distance(run: str, other: str) -> float:
    """The largest difference of a tensor, as a share of its norm."""
    pairs = [(tensors_of(run)[name], tensor) for name, tensor in tensors_of(other).items()]
    return max(float((a.double() - b).norm() / b.double().norm().clamp(min=1e-30)) for a, b in pairs)


if __name__ == "__main__":
    for job in sys.argv[1:]:
        kind, out, *options = job.split(",")
        gradients = train(kind, out, **{k: json.loads(v) for k, v in (o.split("=") for o in options)})
        torch.save(gradients, f"{out}.{os.environ['RANK']}.pt")
