"""Other systems, simulated: what Linux alone has, and what nobody has to install, is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from zoo.ops.common import widest
from zoo.training import machine

HIDDEN = (
    "fcntl", "resource", "termios", "pwd", "grp",  # of POSIX
    "torchdiffeq", "tokenizers", "tensorboard", "fla", "mamba_ssm", "causal_conv1d", "transformers", "peft",
)  # fmt: skip
OF_LINUX = (
    "fork", "forkpty", "geteuid", "getuid", "getpgid", "killpg", "sched_getaffinity", "sysconf", "O_NOFOLLOW",
    "O_NONBLOCK", "O_CLOEXEC",
)  # fmt: skip
CODE = f"""
import sys
sys.modules.update(dict.fromkeys({HIDDEN}))
import json, os, pathlib, pkgutil, subprocess, torch
for name in {OF_LINUX}:
    if hasattr(os, name):
        delattr(os, name)
import zoo
from zoo.training import doctor, machine
machine.STATUS = pathlib.Path("nowhere")
own = ("zoo.__main__", "zoo.tasks.code_trace.child")  # commands; and kernels for GPUs, which need Triton
for module in pkgutil.walk_packages(zoo.__path__, "zoo."):
    if module.name not in own and ".studies" not in module.name and not module.name.startswith("zoo.ops.kernels."):
        __import__(module.name)
experiment = {{
    "task": {{"name": "mqar", "vocab_size": 64, "seq_len": 16}},
    "model": {{"pattern": "mha neural_ode", "d_model": 16}},
    "train": {{"steps": 2, "eval_rows": 8, "test_rows": 8}},
}}
result = zoo.train(experiment, quiet=True)
zoo.load(result.path)
from zoo.report import load_runs, table
table(load_runs(["runs"]))
print(json.dumps([result.data["peak_memory_bytes"], machine.no_peak_memory(torch.device("cpu")), result.status]))
"""


def test_every_module_and_a_run_do_without_linux_and_extras(tmp_path):
    environment = os.environ | {"ZOO_KERNELS": "off", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, why, status = json.loads(done.stdout)
    assert (peak, status) == (None, "finished")
    assert why.startswith("not measured: ")


def test_what_mps_has_not_is_said():
    mps = torch.device("mps")
    assert widest(mps) is torch.float32
    assert widest(torch.device("cpu")) is torch.float64
    assert machine.peak_memory(mps) is None
    assert "MPS" in machine.no_peak_memory(mps)
