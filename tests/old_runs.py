"""Old runs: folders in `tests/data/runs` that today's code has to read, and how one is added to them.

    python tests/old_runs.py NAME RECIPE.yaml

trains the recipe twice, once to its end and once until it is killed half-way, and writes what both must say. What is
there is never made anew. Only what a user may call is called, so that this survives any change within the package.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import zoo

RUNS = Path(__file__).parent / "data" / "runs"
EXPECTED = "expected.json"
TEXT = "text.txt"  # which runs on a text read, in the working folder
KINDS = ("finished", "interrupted")
PROMPT = [1, 2, 3, 4, 5]


def names() -> list[str]:
    """The runs that are kept, each a finished and an interrupted one of the same config."""
    return sorted(path.parent.name for path in RUNS.glob(f"*/{EXPECTED}"))


def config_of(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def zoo_says(*arguments: str) -> str:
    """What `python -m zoo ARGUMENTS` prints, in this process."""
    argv, form, out = sys.argv, warnings.formatwarning, io.StringIO()
    sys.argv = ["zoo", *arguments]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module("zoo", run_name="__main__", alter_sys=False)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"zoo {' '.join(arguments)} ended with {ended.code}") from None
    finally:
        sys.argv, warnings.formatwarning = argv, form
    return out.getvalue()


def answers(run: Path) -> dict[str, Any]:
    """What a run says: its weights' names, its scores, an answer to an example, and where it can, a continuation."""
    said: dict[str, Any] = {}
    for which in ("best", "last"):
        model = zoo.load(run, which)
        named = {name: list(weight.shape) for name, weight in model.state_dict().items()}
        said[which] = {
            "weights": named,
            **{split: _told("eval", run, "--split", split, "--which", which) for split in ("validation", "test")},
            "example": _told("generate", run, "--example", "0", "--which", which),
        }
        if config_of(run)["model"]["causal"]:
            prompt = ("--tokens", " ".join(map(str, PROMPT)))
            greedy = ("--temperature", "0", "--max-new-tokens", "16")
            said[which]["continued"] = _told("generate", run, *prompt, *greedy, "--which", which)
            with torch.no_grad():
                said[which]["logits"] = model(torch.tensor([PROMPT]))[0][0, -1].tolist()
    return said


def _told(command: str, run: Path, *options: str) -> dict[str, Any]:
    told = json.loads(zoo_says(command, str(run), "--json", *options))
    return {k: Path(v).name if k == "checkpoint" else v for k, v in told.items() if k not in ("run", "model")}


def machine() -> dict[str, str]:
    """All that the bits of a result on a CPU may depend on, apart from this package."""
    found = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    found["libc"], found["kernels"] = " ".join(platform.libc_ver()), os.environ.get("ZOO_KERNELS", "")
    found["vectors"] = torch.backends.cpu.get_cpu_capability()
    told = ("vendor_id", "cpu family", "model\t", "stepping", "flags", "CPU ", "Features")
    cpu = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        cpu = "\n".join(line for line in lines if line.startswith(told))
    found["cpu"] = hashlib.sha256((cpu + platform.machine()).encode()).hexdigest()[:16]
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True) if compiler else None
    found["compiler"] = version.stdout.split("\n")[0] if version else ""
    return found


# ---- adding one


def add(name: str, recipe: Path) -> None:
    """Train and keep a finished and an interrupted run, with what they say."""
    place = RUNS / name
    place.mkdir()
    settings = {**yaml.safe_load(recipe.read_text()), "name": name}
    finished, interrupted = (place / kind for kind in KINDS)
    with contextlib.chdir(RUNS):
        zoo.train({**settings, "out": f"{name}/finished"}, quiet=True)
        config = json.dumps({**settings, "out": f"{name}/interrupted"})
        code = f"import json, sys, zoo; zoo.train(json.loads({config!r}), quiet=True)"
        process = subprocess.Popen([sys.executable, "-c", code])
        half = settings["train"]["steps"] // 2 + 1
        while not (interrupted / "metrics.jsonl").exists() or f'"step": {half},' not in _metrics(interrupted):
            assert process.poll() is None
            time.sleep(0.0005)
        process.kill()
        process.wait()
        assert not (interrupted / "result.json").exists(), "it was not killed in time"
        assert not list(interrupted.glob("**/*.tmp")), "it was killed as it wrote: delete it, and once more"
        said = {kind: answers(Path(name, kind)) for kind in KINDS}
    (place / EXPECTED).write_text(json.dumps({"machine": machine(), **said}, indent=1) + "\n")
    assert finished.exists()


def _metrics(run: Path) -> str:
    return (run / "metrics.jsonl").read_text()


def files(run: Path) -> Iterator[Path]:
    return (path for path in sorted(run.rglob("*")) if path.is_file())


if __name__ == "__main__":
    torch.set_num_threads(1)
    add(sys.argv[1], Path(sys.argv[2]))
