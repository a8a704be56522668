"""The compiled kernels' foundation: building, refusing, elementary functions and small products."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import sys
import warnings

import forked
import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.core.errors import UsageError, UsageWarning
from zoo.core.imports import discover
from zoo.laws import spelled
from zoo.ops import native
from zoo.ops.common import logged_forms
from zoo.ops.kernel import Kernel
from zoo.training import doctor

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels here: {native.why_not()}")


PROBE = Kernel("probe")


def probed(x: torch.Tensor) -> list[torch.Tensor]:
    out = [torch.full_like(x, torch.nan) for _ in range(4)]
    PROBE("probe_functions", (x,), out, len(x))
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
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), torch.nan)
    PROBE("probe_product", (a, b), (c,), m, n, k, 0, 1)
    torch.testing.assert_close(c, a @ b, rtol=1e-5, atol=1e-5)
    added = torch.randn(m, n)
    expected = added + 0.5 * a @ b
    PROBE("probe_product", (a.T.contiguous(), b), (added,), m, n, k, 1, 1)
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)
    x, out = torch.randn(m, n), torch.full((n, m), torch.nan)
    PROBE("probe_product", (x, x), (out,), m, n, k, 2, 1)
    assert torch.equal(out, x.T)


@needs_compiler
def test_threads_are_those_of_torch():
    count = torch.zeros(1, dtype=torch.int64)
    PROBE("probe_threads", (), (count,))
    assert count.item() == torch.get_num_threads()


def test_kernels_take_their_dtypes_on_the_cpu_alone():
    assert PROBE.why_not(torch.zeros(1, dtype=torch.float64)) == "it computes in float32, the inputs are torch.float64"
    assert "meta" in (PROBE.why_not(torch.zeros(1, device="meta")) or "")
    assert PROBE.why_not(torch.zeros(1), None, torch.zeros(1, dtype=torch.int64)) == native.why_not()


@needs_compiler
def test_calls_are_typed():
    x, out = torch.ones(3), torch.zeros(3)
    with pytest.raises(
        TypeError, match="probe_functions reads 1 tensors, writes 4 and takes 1 numbers; it was given 1, 3"
    ):
        PROBE("probe_functions", (x,), (out, out, out), 3)
    wrong = {"float64": out.double(), "meta": out.to("meta"), r"strides \(2,\)": torch.zeros(6)[::2]}
    for why, tensor in wrong.items():
        with pytest.raises(TypeError, match=f"takes a contiguous tensor of torch.float32 on the CPU.*{why}"):
            PROBE("probe_functions", (x,), (out, out, out, tensor), 3)


@needs_compiler
def test_sizes_on_which_python_and_cpp_disagree_are_refused(tmp_path):
    """Buffers have the sizes that Python believes: with another chunk the kernel would write beyond them."""
    source = (native.SOURCES / "mlstm.cpp").read_text()
    changed = tmp_path / "mlstm.cpp"
    changed.write_text(source.replace("C = 64", "C = 32"))
    kernel = Kernel(changed, sizes=native.SIZES["mlstm"])
    with pytest.warns(UsageWarning, match="mlstm is left out"):
        assert kernel.why_not() == "mlstm.cpp and its declaration disagree: C = 32 (in Python 64)"
    with pytest.raises(native.Unavailable, match="C = 32"):
        kernel("mlstm_forward", (), ())


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"ZOO_KERNELS": "off"}, "switched off by ZOO_KERNELS"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (install g++ or clang, or name one in CXX)"),
        ({"CXX": "false"}, "false cannot build probe.cpp: it failed"),
        ({"ZOO_CACHE": "/proc/nowhere"}, "No such file or directory: /proc/nowhere"),
    ],
)
def test_without_kernels_the_reason_is_told(environment, why, tmp_path, monkeypatch):
    for name, value in ({"ZOO_CACHE": str(tmp_path)} | environment).items():
        monkeypatch.setenv(name, value)
    if "ZOO_KERNELS" not in environment:
        monkeypatch.delenv("ZOO_KERNELS", raising=False)
    forget()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UsageWarning)
            assert (native.why_not() or "").startswith(why)
    finally:
        forget()


@needs_compiler
def test_built_once_for_several_processes(tmp_path):
    code = "from zoo.ops import native; native.load('probe')"
    env = {**os.environ, "ZOO_CACHE": str(tmp_path)}
    running = [forked.start([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [p.wait(120) for p in running] == [0, 0]
    assert len(list(tmp_path.glob("kernels/*.so"))) == 1
    (built,) = tmp_path.glob("kernels/*.so")
    assert native.is_whole(built)


# ---- the cache

KERNELS = sorted(source.stem for source in native.SOURCES.glob("*.cpp"))
discover("zoo.ops")  # whose modules declare them
QUICK = "silu_product"  # the one that is built in the shortest time


def forget():
    for known in (native.load, native.folder, native._why_not, native._version):
        known.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A copy of the kernels built so far as this process's cache: its folder. Of those that the tests damage, other
    versions of the project may have built theirs here too: these stay out."""
    taken = {pathlib.Path(native.load(name)._library._name).stem for name in (QUICK, "probe")}

    def others(_, names):
        ours = [name for name in names if name.startswith((f"{QUICK}-", "probe-"))]
        return [name for name in ours if name.partition(".")[0] not in taken]

    folder = tmp_path / "cache" / "kernels"
    shutil.copytree(native.folder(), folder, ignore=others)
    for path in (folder.parent, folder):
        path.chmod(0o700)
    monkeypatch.setenv("ZOO_CACHE", str(folder.parent))
    monkeypatch.delenv("ZOO_KERNELS", raising=False)
    forget()
    yield folder
    forget()


def library(folder: pathlib.Path, name: str) -> pathlib.Path:
    (path,) = folder.glob(f"{name}-*.so")
    assert native.is_whole(path)
    return path


def halved(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def linked(path):
    shutil.move(path, path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


DAMAGES = {
    "half": halved,
    "one bit": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": pathlib.Path.unlink,
    "a link": linked,
    "without a seal": lambda path: path.with_suffix(".json").unlink(),
    "a seal that is empty": lambda path: path.with_suffix(".json").write_text(""),
    "a seal of another type": lambda path: path.with_suffix(".json").write_text("[" * 5000),
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [QUICK, "probe"])
def test_what_is_damaged_is_built_again(cache, monkeypatch, name, damage):
    path = library(cache, name)
    content, built = path.read_bytes(), []

    def build(compiler, source, out):
        built.append(source.stem)
        out.unlink(missing_ok=True)
        out.write_bytes(content)

    monkeypatch.setattr(native, "_build", build)
    DAMAGES[damage](path)
    assert not native.is_whole(path)
    assert native.why_not(name) is None
    assert native.is_whole(path)
    assert built == [name]


@needs_compiler
def test_a_damaged_library_of_an_earlier_process_kills_no_command(cache):
    for path in cache.glob("*.so"):
        halved(path)
    code = f"from zoo.ops import native; print(native.why_not({QUICK!r}))"
    done = forked.run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


@needs_compiler
def test_a_library_that_is_whole_is_loaded_as_it_is(cache, monkeypatch):
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("it was there"))
    assert native.why_not(QUICK) is None


def without(monkeypatch, *names, why="out of order"):
    """No kernel of these names can be built."""
    building = native._build

    def build(compiler, source, path):
        if source.stem in names:
            raise native.Unavailable(why)
        building(compiler, source, path)

    monkeypatch.setattr(native, "is_whole", lambda path: path.name.rpartition("-")[0] not in names and path.exists())
    monkeypatch.setattr(native, "_build", build)


@needs_compiler
@pytest.mark.parametrize("name", [k for k in KERNELS if k != "probe"])
def test_a_kernel_that_cannot_be_built_is_left_out_alone(cache, monkeypatch, name):
    without(monkeypatch, name)
    with pytest.warns(
        UsageWarning, match=f"The compiled kernel {name} is left out, plain PyTorch runs instead: out of"
    ):
        assert native.why_not(name) == "out of order"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert Kernel(name, sizes=native.SIZES[name]).why_not(torch.zeros(1)) == "out of order"
        assert native.why_not() is None


@needs_compiler
def test_every_mixer_runs_in_plain_pytorch_without_its_kernels(cache, monkeypatch):
    without(monkeypatch, *(k for k in KERNELS if k != "probe"))
    x = torch.randn(2, 40, 32)
    with warnings.catch_warnings(), logged_forms() as forms:
        warnings.simplefilter("ignore", UsageWarning)
        for word in zoo.list_mixers():
            spelled(zoo.create_mixer(word, 32, place=zoo.Place(length=40)))(x)[0].sum().backward()
    assert len(forms) > 9
    assert "compiled" not in set().union(*forms.values())
    with pytest.raises(UsageError, match=r"backend='compiled' cannot run here: out of order"):
        zoo.ops.scan(x, x, backend="compiled")


def test_every_kernel_is_declared():
    assert native.SIZES.keys() >= set(KERNELS)


@needs_compiler
def test_the_doctor_names_what_is_left_out(cache, monkeypatch):
    without(monkeypatch, *(k for k in KERNELS if k not in (QUICK, "probe")), why="no room")
    found = doctor.kernels()
    assert found["available"]
    assert found["folder"] == str(cache)
    assert set(found["seconds"]) == {QUICK, "probe"}
    assert found["refused"] == {k: "no room" for k in KERNELS if k not in found["seconds"]}
    assert "plain PyTorch in place of scan: no room" in doctor._kernels(found)


@needs_compiler
def test_a_library_without_its_functions_is_refused_and_not_kept(cache, monkeypatch):
    path = library(cache, QUICK)
    path.unlink()
    monkeypatch.setattr(native, "_build", lambda compiler, source, out: shutil.copy(library(cache, "probe"), out))
    with pytest.warns(UsageWarning, match="the library lacks silu_product_forward_float"):
        assert native.why_not(QUICK) == f"the library lacks silu_product_forward_float: {QUICK}"
    assert not path.exists()
    assert native.why_not("probe") is None


@needs_compiler
def test_a_folder_in_place_of_a_library_is_a_reason(cache):
    path = library(cache, QUICK)
    path.unlink()
    (path / "inner").mkdir(parents=True)
    with pytest.warns(UsageWarning, match=QUICK):
        assert "directory" in (native.why_not(QUICK) or "")


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_the_functions_of_a_kernel_are_known(name):
    functions = native.exported((native.SOURCES / f"{name}.cpp").read_text())
    assert functions
    native.Library(pathlib.Path(native.load(name)._library._name), functions)
    assert (native.SOURCES / f"{name}.cpp").read_text().count('extern "C" void') <= len(functions)


@needs_compiler
@pytest.mark.parametrize("which", ["root", "kernels"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_a_cache_that_others_may_write_to_is_refused(cache, which, mode):
    folder = cache if which == "kernels" else cache.parent
    folder.chmod(mode)
    with pytest.warns(UsageWarning, match="There are no compiled kernels"):
        why = native.why_not()
    assert why == f"others may write to {folder}: chmod go-w it, or name another folder in ZOO_CACHE"


@needs_compiler
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["root", "kernels"])
def test_a_cache_of_another_user_is_refused(cache, which):
    folder = cache if which == "kernels" else cache.parent
    os.chown(folder, 54321, 54321)
    with pytest.warns(UsageWarning, match=f"{folder} belongs to another user; name a folder of your own in ZOO_CACHE"):
        assert native.why_not() is not None


@pytest.mark.parametrize("home", ["none", "nowhere", "unsafe", "relative"])
def test_without_a_safe_home_kernels_lie_in_a_private_temporary_folder(tmp_path, monkeypatch, home):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ZOO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "home/.cache/sequence-zoo").mkdir(parents=True)
    (tmp_path / "home/.cache/sequence-zoo").chmod(0o777)
    homes = {"nowhere": "/proc/nowhere", "unsafe": str(tmp_path / "home"), "relative": "home"}
    if home == "none":
        monkeypatch.setattr(pathlib.Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", homes[home])
    forget()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = native.folder()
    forget()
    assert folder == tmp_path / f"sequence-zoo-{os.geteuid()}" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [str(w.message)[:46] for w in said] == ["The cache for compiled kernels is not used: oth"[:46]] * (
        home == "unsafe"
    )


@needs_compiler
def test_the_compiler_may_have_arguments(tmp_path, monkeypatch):
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} {native.compiler()} '-DWORDS=a b'")
    command = native._compiler()
    assert command == [str(wrapper), *shlex.split(native.compiler().partition(" ")[2])]
    assert command[-1] == "-DWORDS=a b"
    native._build(command, native.SOURCES / f"{QUICK}.cpp", tmp_path / "built.so")
    native.Library(tmp_path / "built.so", ["silu_product_forward_float"])
    monkeypatch.setenv("CXX", str(wrapper))  # one word, as a path with spaces may be too
    assert native._compiler() == [str(wrapper)]
    for none in ("no-such-compiler g++", "'g++", " "):
        monkeypatch.setenv("CXX", none)
        assert native.compiler() is None
