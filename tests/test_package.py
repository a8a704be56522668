"""One importable name: `import zoo` works beside anybody's `tasks` and `benchmarks`, and is light."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys, zoo
from zoo import tasks, benchmarks
assert tasks.__name__ == "zoo.tasks" and benchmarks.__name__ == "zoo.benchmarks"
assert tasks.create_task("mqar").sample(2, split="train", seed=0).inputs.shape[0] == 2
assert zoo.create_mixer("short_conv", d_model=16) is not None
"""


def python(code: str, folder: Path, *root: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ["{}.py", pytest.param("{}/__init__.py", marks=pytest.mark.slow)])
def test_a_project_may_have_modules_of_these_names(tmp_path, name):
    """As Invoke and Celery have; the folder comes first on the path, as it does for a script of one's own."""
    for own in ("tasks", "benchmarks"):
        path = tmp_path / name.format(own)
        path.parent.mkdir(exist_ok=True)
        path.write_text("def build(): pass\n")
    own = "import tasks as own, benchmarks as other; own.build(); other.build()"
    done = forked.run([sys.executable, "-c", f"{own}\n{USE}"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_clone_has_no_second_copy():
    for name in ("tasks", "benchmarks"):
        done = python(f"import {name}", ROOT)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"ImportError: {name} is zoo.{name} now")


STEPS = {
    "import sys, zoo, zoo.core": ["torch", "numpy", "pydantic", "matplotlib", "scipy"],
    """
from zoo import tasks
for name in tasks.list_tasks():
    tasks.create_task(name)
tasks.create_task("mqar").sample(4, split="train", seed=0)
""": ["numba", "matplotlib", "zoo.protocol"],
    "import zoo.ops": ["torch._dynamo"],  # it takes a second: those who compile or train pay it
    "import zoo.report": ["matplotlib", "jinja2", "rich", "plotly"],
    "import zoo.training.launch": ["torch.distributed.launcher"],  # which several processes need
    USE: [],
    "for name in zoo.__all__: assert getattr(zoo, name) is not None and name in dir(zoo)": [],
}
"""What a fresh process does, step after step, and what it has not imported then."""


def test_nothing_heavy_is_imported_before_it_is_needed():
    """A real process, from the root of a clone; at its end every public name is there."""
    code = [f"{step}\nassert not sys.modules.keys() & {names}, {step!r}" for step, names in STEPS.items()]
    done = python("\n".join(code), ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["tasks", "benchmarks"])
def test_links_that_became_text_files_are_named(tmp_path, name):
    """A clone without symbolic links, or an archive that was unpacked without them."""
    shutil.copytree(ROOT / "zoo", tmp_path / "zoo", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    link = tmp_path / "zoo" / name
    target = os.readlink(link)
    link.unlink()
    link.write_text(target)
    done = python("import zoo", tmp_path, tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: zoo/{name} should be a link to ../{name}, but in this checkout it is a text file"
    )


MOVED = {
    "from tasks.registry import Options": "zoo.core",
    "from tasks.protocol import register": "zoo.tasks",
    "from benchmarks.records import Record": "zoo.",
    "from zoo.training.run import load": "zoo.load",
    "from zoo.protocol import fork": "zoo.states.fork",
}


@pytest.mark.parametrize(
    "found", [pytest.param(True, id="from a clone"), pytest.param(False, id="from a wheel", marks=pytest.mark.slow)]
)
def test_files_from_before_the_move_name_the_new_path(tmp_path, found):
    for i, line in enumerate(MOVED):
        (tmp_path / f"own{i}.py").write_text(line + "\n")
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    hide = "" if found else f"sys.path = [p for p in sys.path if p != {str(ROOT)!r}]; "
    code = f"import sys; {hide}sys.argv = ['zoo', 'list', 'mixers', 'mha']; from zoo.cli import main; main()"
    sources = os.pathsep.join(f"own{i}.py" for i in range(len(MOVED)))
    env = os.environ | {"PYTHONPATH": str(ROOT if found else tmp_path), "ZOO_IMPORT": sources}
    command = [sys.executable, "-c", code]
    done = forked.run(command, cwd=tmp_path, env=env)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == len(MOVED)
    for line, now in zip(lines, MOVED.values(), strict=True):
        assert now in line
        assert " now" in line


@pytest.mark.slow
def test_an_editable_install_brings_no_other_name(tmp_path):
    """What is installed is `zoo` alone: the root of the checkout is not on the path."""
    tree = tmp_path / "tree"
    for name in ("zoo", "tasks", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    target, project = tmp_path / "target", tmp_path / "project"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, "--editable", tree]
    subprocess.run(install, check=True, capture_output=True)
    project.mkdir()
    (project / "tasks.py").write_text("def build(): pass\n")
    code = f"""
import importlib.util, site, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]  # that of this tree
for name in [name for name in sys.modules if "editable" in name]:
    del sys.modules[name]
sys.path.insert(0, {str(target)!r})
site.addsitedir({str(target)!r})
{USE}
assert zoo.__file__.startswith({str(tree)!r}), zoo.__file__
import tasks as own; own.build()
assert importlib.util.find_spec("benchmarks") is None
"""
    env = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
