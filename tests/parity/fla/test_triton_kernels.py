"""Our own Triton kernels: interpreted, against the definition in float64 at awkward sizes; and compiled for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.benchmarks.studies.triton_kernels import CASES, REGISTERS, SHARED, narrow
from zoo.ops.bridge import OPERATORS
from zoo.ops.common import logged_forms

KERNELS = {name for name, operator in OPERATORS.items() if "triton" in operator.forms}


def test_every_kernel_has_a_case():
    assert {name.partition(",")[0] for name in CASES} == KERNELS


def outcome(op, leaves: dict[str, Tensor], **how: object) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = tree_leaves(op(**leaves, **how))
    real = [torch.view_as_real(x) if x.is_complex() else x for x in outputs]
    noise = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=noise, dtype=torch.float64).to(x)).sum() for x in real)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(loss, list(leaves.values())))]


STEPS = {"scan": 37, "selective_scan": 37, "causal_conv1d": 37, "oscillate": 37, "mlstm": 130}
"""More than one chunk, which `mlstm` has 64 steps in, the others here 32; `m2rnn` has 16, and the rest none."""


@pytest.mark.parametrize("how", ["one step", "many", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_its_definition(name, how):
    op, make = CASES[name]
    packed, T = how == "packed", 1 if how == "one step" else STEPS.get(name.partition(",")[0], 18)
    leaves = narrow(make(3, T, 3))
    given: dict[str, object] = {}
    if packed:
        starts = torch.arange(T)[None] % torch.tensor([[T - 4], [7], [1]]) == 0
        given = {"lengths": torch.tensor([T, T // 2, 0]), "resets": starts}
    with logged_forms() as forms:
        found = outcome(op, leaves, backend="triton", **given)
    assert {"triton"} in forms.values()
    wide = {name: x.to(torch.promote_types(x.dtype, torch.float64)) for name, x in leaves.items()}
    tolerance = 2e-2 if "bfloat16" in name else 2e-5
    for i, (a, e) in enumerate(zip(found, outcome(op, wide, backend="reference", **given), strict=True)):
        assert a.shape == e.shape
        if a.numel() > 0:
            assert (a - e).abs().max() <= tolerance * e.abs().max() + 1e-30, i


PRODUCTS = "states", "outputs", "adjoints", "values", "keys"
"""Kernels of `mlstm` that multiply matrices."""


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_kernel_compiles_for_sm_90(name, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "zoo.benchmarks.studies.triton_kernels", "--only", name, "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])["compiled"].values()
    assert len([row for rows in found.values() for row in rows]) >= 4
    for case, rows in found.items():
        for row in rows:
            assert row["registers"] <= REGISTERS
            assert row["shared"] <= SHARED
            assert row["spilled"] == 0, row
            on_tensor_cores = "bfloat16" in case and row["kernel"] in PRODUCTS
            assert (row["products"] > 0) == on_tensor_cores, row  # products of float32 are exact
