"""The compiled kernels' foundation: building, refusing, elementary functions and small products."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from zoo.ops import native

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")


def probed(x: torch.Tensor) -> list[torch.Tensor]:
    out = [torch.full_like(x, torch.nan) for _ in range(4)]
    native.load("probe").probe_functions(x, *out, len(x))
    return out


@needs_compiler
def test_elementary_functions():
    x = torch.cat([torch.linspace(-86, 86, 100_001), 0.1 * torch.randn(50_000), torch.zeros(1)])
    exact = x.double()
    for got, function in zip(probed(x), (torch.exp, torch.tanh, torch.sigmoid, F.logsigmoid), strict=True):
        expected = function(exact)
        relative = (got - expected).abs() / expected.abs().clamp(min=1e-30)
        assert relative.max() < 1e-6, function.__name__


@needs_compiler
def test_elementary_functions_far_out():
    e, t, s, log_s = probed(torch.tensor([-5000.0, -200.0, 200.0, 5000.0]))
    assert e[:2].tolist() == [0, 0]
    assert e[2:].isfinite().all()
    assert t.tolist() == [-1, -1, 1, 1]
    assert s.tolist() == [0, 0, 1, 1]
    assert log_s.tolist() == [-5000, -200, 0, 0]


@needs_compiler
@pytest.mark.parametrize("m", [1, 3, 13, 64])
@pytest.mark.parametrize("n", [1, 15, 16, 65, 100])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_products(m, n, k):
    library = native.load("probe")
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), torch.nan)
    library.probe_product(a, b, c, m, n, k, 0, 1)
    torch.testing.assert_close(c, a @ b, rtol=1e-5, atol=1e-5)
    added = torch.randn(m, n)
    expected = added + 0.5 * a @ b
    library.probe_product(a.T.contiguous(), b, added, m, n, k, 1, 1)
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)
    x, out = torch.randn(m, n), torch.full((n, m), torch.nan)
    library.probe_product(x, x, out, m, n, k, 2, 1)
    assert torch.equal(out, x.T)


@needs_compiler
def test_threads_are_those_of_torch():
    count = torch.zeros(1, dtype=torch.int64)
    native.load("probe").probe_threads(count)
    assert count.item() == torch.get_num_threads()


def test_serves_float32_on_the_cpu_alone():
    assert "torch.float64" in (native.serves(torch.zeros(1, dtype=torch.float64)) or "")
    assert "meta" in (native.serves(torch.zeros(1, device="meta")) or "")
    assert native.serves(torch.zeros(1), None) == native.why_not()


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"ZOO_KERNELS": "off"}, "switched off by ZOO_KERNELS"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (install g++ or clang, or name one in CXX)"),
        ({"CXX": "false"}, "false cannot build probe.cpp: it failed"),
        ({"ZOO_CACHE": "/proc/nowhere"}, "No such file or directory: /proc/nowhere"),
    ],
)
def test_without_kernels_the_reason_is_told(environment, why, tmp_path):
    code = "from zoo.ops import native; print(native.why_not())"
    inherited = {name: value for name, value in os.environ.items() if name != "ZOO_KERNELS"}
    env = {**inherited, "ZOO_CACHE": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(why)


@needs_compiler
def test_built_once_for_several_processes(tmp_path):
    code = "from zoo.ops import native; native.load('probe')"
    env = {**os.environ, "ZOO_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [p.wait(120) for p in running] == [0, 0, 0]
    assert len(list(tmp_path.glob("kernels/*.so"))) == 1
