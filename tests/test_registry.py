"""Mixers by name: one class is enough to add one, and a slip of the pen is answered with the likely word."""

from __future__ import annotations

import ast
import copy
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import forked
import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

import zoo
from zoo.core import imports
from zoo.core.errors import UsageError, UsageWarning
from zoo.core.imports import import_source
from zoo.core.options import Options
from zoo.core.registry import Registry
from zoo.listing import listing
from zoo.models.budget import SIZES
from zoo.models.config import ModelConfig, Recursion
from zoo.models.families import families
from zoo.objectives.base import create_objective, objectives
from zoo.pattern import mixer_config, mixer_of
from zoo.protocol import Context, Mixer, Place, derive_heads, mixers, norms
from zoo.residual import residuals
from zoo.tasks.protocol import create_task
from zoo.tasks.protocol import registry as tasks
from zoo.training.train_options import TrainConfig


@pytest.fixture
def running_mean(monkeypatch):
    """A new mixer, registered for one test."""
    monkeypatch.setattr(mixers, "_classes", dict(mixers._classes) if mixers.names() else {})

    @zoo.register("running_mean")
    class RunningMean(Mixer):
        class Config(Options):
            decay: float = Field(default=0.5, gt=0, lt=1)
            depth: int = 1

        def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
            super().__init__(d_model, config, place=place)
            self.place = place
            self.proj = nn.Linear(d_model, d_model)

        def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
            return (torch.zeros(batch_size, self.d_model),)

        def forward(self, x, state=None, context: Context | None = None):
            (h,) = state or self.init_state(len(x))
            ys = []
            for x_t in self.proj(x).unbind(1):
                h = self.config.decay * h + x_t
                ys.append(h)
            return torch.stack(ys, 1), (h,)

        def flops_per_token(self, context_length):
            return 2 * self.d_model**2

    return RunningMean


def test_a_new_mixer_is_one_class(running_mean):
    assert "running_mean" in zoo.list_mixers()
    assert "running_mean" in zoo.list_mixers("running*", kind="sequence")
    assert "running_mean" not in zoo.list_mixers(kind="channel")
    mixer = zoo.create_mixer("running_mean(decay=0.25)", d_model=16)
    assert type(mixer) is running_mean
    assert mixer.config.decay == 0.25
    model = zoo.create_model("2*(running_mean(decay=0.9) swiglu)", d_model=16, vocab_size=7)
    assert model(torch.zeros(2, 3, dtype=torch.int64))[0].shape == (2, 3, 7)


def test_every_way_to_name_a_mixer(running_mean):
    config = running_mean.Config(decay=0.25)
    for spec in ("running_mean(decay=0.25)", {"name": "running_mean", "decay": 0.25}, config):
        assert zoo.create_mixer(spec, 16).config == config
    assert zoo.create_mixer(" running_mean ", 16, decay=0.25).config == config
    assert zoo.create_mixer(config, 16, depth=2).config == running_mean.Config(decay=0.25, depth=2)
    assert zoo.create_mixer({"name": "running_mean", "decay": 0.5}, 16, decay=0.25).config == config
    assert zoo.create_mixer("running_mean", 16, place=Place(3, 5)).place == Place(3, 5)
    assert mixer_of(config) is running_mean
    assert mixer_config("running_mean", decay=0.25) == config


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("runing_mean", {}, "Unknown mixer 'runing_mean'. Did you mean 'running_mean'? Available: "),
        ("qqqq", {}, "Unknown mixer 'qqqq'. Available: "),
        (
            "running_mean",
            {"dekay": 0.5},
            "option of running_mean 'dekay'. Did you mean 'decay'? Available: decay, depth.",
        ),
        (
            "running_mean(dekay=0.5)",
            {},
            "option of running_mean 'dekay'. Did you mean 'decay'? Available: decay, depth, ",
        ),
        ("running_mean", {"decay": "fast"}, "running_mean: decay='fast' is not allowed: it should be a valid number."),
        ("running_mean", {"decay": 1.0}, "running_mean: decay=1.0 is not allowed: it should be less than 1."),
        ("running_mean", {"depth": 1.5}, "running_mean: depth=1.5 is not allowed: it should be a valid integer."),
        ("running_mean running_mean", {}, "is a pattern of several steps where one mixer is asked for"),
        ('running_mean(norm="none")', {}, "sets step options, which belong to a word of a model's pattern"),
        ({"decay": 0.5}, {}, "A mixer is given by a name or a mapping with the key 'name', not {'decay': 0.5}."),
        (3, {}, "A mixer is given by a name or a mapping with the key 'name', not 3."),
    ],
)
def test_refusals(running_mean, spec, options, message):
    with pytest.raises(UsageError) as refusal:
        zoo.create_mixer(spec, 16, **options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("d_model", [0, 8, 14, 17, -32, 32.0, "32", True, None])
def test_refused_widths(d_model):
    with pytest.raises(UsageError, match="it should be an even whole number from 16"):
        zoo.create_mixer("swiglu", d_model=d_model)


def test_a_name_is_taken_once(running_mean):
    with pytest.raises(UsageError, match=r"name 'running_mean'.* is taken by .*: register another name"):

        @zoo.register("running_mean")
        class Other(Mixer):
            pass


def test_configs_are_frozen_and_known():
    config = mixers["swiglu"].Config()
    with pytest.raises(ValueError, match="frozen"):
        config.bias = True
    with pytest.raises(UsageError, match="config of no registered mixer"):
        mixer_of(Options())


def test_listing():
    names = zoo.list_mixers()
    assert names == sorted(names)
    assert set(zoo.list_mixers(kind="sequence")) | set(zoo.list_mixers(kind="channel")) == set(names)
    assert "swiglu" in zoo.list_mixers("*glu", kind="channel")
    assert zoo.list_mixers("no such*") == []
    assert "bidirectional" not in names
    with pytest.raises(UsageError, match=r"Unknown kind 'chanel'. Available: sequence, channel"):
        zoo.list_mixers(kind="chanel")


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_declares_itself(name):
    cls = mixers[name]
    assert cls.name == name
    assert cls.kind in ("sequence", "channel")
    assert issubclass(cls.Config, Options)
    assert cls.__doc__
    assert cls.Config.__doc__
    documented = " ".join(config.__doc__ for config in cls.Config.__mro__ if issubclass(config, Options))
    assert not [option for option in cls.Config.model_fields if option not in documented]


def test_registry_of_anything():
    shapes: Registry = Registry("shape")

    @shapes.register("circle")
    class Circle:
        pass

    assert shapes["circle"] is Circle
    assert shapes.names("c*") == ["circle"]
    assert "circle" in shapes
    assert "square" not in shapes
    with pytest.raises(UsageError, match=r"Unknown shape 'cirle'. Did you mean 'circle'\? Available: circle."):
        shapes["cirle"]


@pytest.mark.parametrize(
    ("d_model", "head_dim", "heads"), [(128, 64, 2), (16, 64, 1), (130, 64, 2), (66, 16, 3), (192, 64, 3)]
)
def test_derive_heads(d_model, head_dim, heads):
    assert derive_heads(d_model, head_dim) == heads


def test_a_mapping_may_hold_lists_as_yaml_gives_them():
    config = zoo.create_mixer({"name": "gated_deltanet", "A_init_range": [0.0, 1.0]}, d_model=32).config
    assert config.A_init_range == (0.0, 1.0)


# ---- files elsewhere


@pytest.fixture
def things(monkeypatch):
    """A module `things` that files import, and a registry in it that nothing has been asked of."""
    things = type(sys)("things")
    monkeypatch.setitem(sys.modules, "things", things)
    monkeypatch.setattr(imports, "failed", {})
    things.registry = Registry("thing")
    return things


def thing(folder, name, code="", file=None):
    """A file that registers a thing of that name after `code`."""
    path = folder / (file or f"{name}.py")
    path.write_text(f"import things\n{code}\n@things.registry.register('{name}')\nclass Thing: pass\n")
    return str(path)


def name_in_environment(monkeypatch, *sources):
    monkeypatch.setenv("ZOO_IMPORT", os.pathsep.join(map(str, sources)))


def test_files_elsewhere_are_imported_where_the_environment_names_them(tmp_path, monkeypatch, things):
    name_in_environment(monkeypatch, thing(tmp_path, "first"), thing(tmp_path, "copy"))  # one is named as Python's own
    assert things.registry.names() == ["copy", "first"]
    assert copy.__file__ != str(tmp_path / "copy.py")
    things.registry = Registry("thing")  # another registry imports no file again
    assert things.registry.names() == []


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("1 / 0", r"ZeroDivisionError: division by zero \(bad.py, line 2\)\.$"),
        ("\ndef f():\n    return none\nf()", r"NameError: name 'none' is not defined \(bad.py, line 4\)\.$"),
        ("from zoo.protocol import Mixr", r".*'zoo.protocol' \(bad.py, line 2\)\. Did you mean 'Mixer'\?$"),
        ("import torch\ntorch.nn.Linaer", r"AttributeError: .* \(bad.py, line 3\)\. Did you mean 'Linear'\?$"),
        ("import sys; sys.exit(0)", r"it ends the process \(sys.exit\(0\)\)"),
        ("raise SystemExit", r"it ends the process"),
        ("raise GeneratorExit('no')", "GeneratorExit: no"),
        ("def f(:", r"SyntaxError: invalid syntax \(bad.py, line 2\)\.$"),
        ("\0", "(SyntaxError|ValueError): source code"),
        (
            "from zoo.core.options import Options\nclass Own(Options):\n    size = 3",
            r"PydanticUserError: A non-annotated attribute .* require a type annotation \(bad.py, line 3\)\.$",
        ),
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("import zoo; zoo.create_mixer('mhaa', 32)", "Unknown mixer 'mhaa'. Did you mean 'mha'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
    ],
)
def test_a_file_that_fails_is_left_out_and_named(tmp_path, monkeypatch, things, code, told):
    good, bad = thing(tmp_path, "good"), thing(tmp_path, "bad", code)
    name_in_environment(monkeypatch, bad, good)
    with pytest.warns(UsageWarning) as said:
        assert things.registry.names() == ["good"]
    assert len(said) == 1
    line = str(said[0].message)
    assert re.match(rf"ZOO_IMPORT '{re.escape(bad)}' failed: {told}", line)
    assert "\n" not in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once, and not tried again
        assert "good" in things.registry
        with pytest.raises(UsageError) as refusal:
            things.registry["bad"]
    assert str(refusal.value) == f"Unknown thing 'bad'. Available: good. {line}"
    thing(tmp_path, "bad", "# mended now")
    assert things.registry.names() == ["bad", "good"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere.py", "FileNotFoundError"),
        ("folder.py", "it is a folder"),
        ("folder", "it is no file that ends in .py, nor a module's name"),
        ("script", "it is no file that ends in .py, nor a module's name"),
        ("pipe.py", "it is no file"),
        ("no_such_module_here", "ModuleNotFoundError"),
        ("run/own.py", "it lies in a run folder, whose code is never imported"),
    ],
)
def test_what_is_no_file_to_import(tmp_path, monkeypatch, things, source, told):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "script").write_text("")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    thing(tmp_path / "run", "own")
    source = source if source.startswith("no_such") else str(tmp_path / source)
    name_in_environment(monkeypatch, source, thing(tmp_path, "good"))
    with pytest.warns(UsageWarning, match=re.escape(f"ZOO_IMPORT {source!r} failed: {told}")):
        assert things.registry.names() == ["good"]
    with pytest.raises(UsageError, match=re.escape(f"--import {source!r} failed: {told}")):
        import_source(source, "--import")


def test_one_file_by_several_paths_is_imported_once(tmp_path, monkeypatch, things):
    things.count = []
    path = thing(tmp_path, "once", "things.count.append(1)")
    (tmp_path / "inner").mkdir()
    (tmp_path / "link.py").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    name_in_environment(monkeypatch, path, "once.py", "./once.py", "inner/../once.py", "link.py")
    assert things.registry.names() == ["once"]
    assert len(things.count) == 1
    assert things.registry.origin("once").path == path


def test_paths_that_differ_in_punctuation_alone_are_two_files(tmp_path, monkeypatch, things):
    (tmp_path / "a-b").mkdir()
    (tmp_path / "a_b").mkdir()
    name_in_environment(
        monkeypatch, thing(tmp_path / "a-b", "one", file="x.py"), thing(tmp_path / "a_b", "two", file="x.py")
    )
    assert things.registry.names() == ["one", "two"]


def test_of_two_files_with_one_word_the_first_has_it(tmp_path, monkeypatch, things):
    first, second = thing(tmp_path, "word", file="first.py"), thing(tmp_path, "word", file="second.py")
    name_in_environment(monkeypatch, first, second)
    with pytest.warns(
        UsageWarning, match=re.escape(f"The thing name 'word' of {second} is taken by Thing of {first}: register")
    ):
        assert things.registry.names() == ["word"]
    assert things.registry.origin("word").path == first


def test_the_running_script_is_not_imported_again(tmp_path, monkeypatch, things):
    path = thing(tmp_path, "script", "1 / 0")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", path, raising=False)
    name_in_environment(monkeypatch, path)
    assert things.registry.names() == []


def test_a_file_named_later_is_found(tmp_path, monkeypatch, things):
    monkeypatch.delenv("ZOO_IMPORT", raising=False)
    with pytest.raises(UsageError, match=r"Unknown thing 'late'. Available: none. ZOO_IMPORT adds files of your own."):
        things.registry["late"]
    name_in_environment(monkeypatch, path := thing(tmp_path, "late"))
    assert things.registry["late"].name == "late"
    with pytest.raises(UsageError, match=re.escape(f"ZOO_IMPORT={path} adds no more.")):
        things.registry["other"]


def test_an_interrupted_import_is_taken_up_again(tmp_path, monkeypatch, things):
    things.calls = []
    path = thing(tmp_path, "slow", "things.calls.append(1)\nif len(things.calls) == 1: raise KeyboardInterrupt")
    name_in_environment(monkeypatch, path)
    with pytest.raises(KeyboardInterrupt):
        things.registry.names()
    assert things.registry.names() == ["slow"]


def test_any_thread_may_ask_first(tmp_path, monkeypatch, things):
    things.other = Registry("other")
    code = "import time; time.sleep(0.2)\nassert things.registry.names() == []\nassert things.other.names() == []"
    name_in_environment(monkeypatch, thing(tmp_path, "slow", code))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (things.registry, things.other)[i % 2].names(), range(16)))
    assert found == [["slow"], []] * 8


def test_every_registry_is_asked_first_by_several_threads_at_once():
    code = """
import zoo
from zoo import tasks
from concurrent.futures import ThreadPoolExecutor
asked = [lambda: zoo.create_mixer("mamba2", 16).name, lambda: zoo.create_model("mamba2-tiny").config.d_model,
         lambda: tasks.create_task("mqar").name, lambda: zoo.list_objectives()[0], lambda: len(zoo.list_models()) > 99]
with ThreadPoolExecutor(10) as pool:
    print(list(pool.map(lambda i: asked[i % 5](), range(10))))
"""
    done = forked.run([sys.executable, "-c", code])
    assert done.stderr == ""
    one = ["mamba2", zoo.create_model("mamba2-tiny").config.d_model, "mqar", "block_diffusion", True]
    assert ast.literal_eval(done.stdout) == one * 2


MIXER = """
import torch, zoo
from zoo.core.options import Options
from zoo.protocol import Mixer, Place
@zoo.register("{name}")
class Own(Mixer):
    'Adds nothing.'
    class Config(Options):
        pass
    def __init__(self, d_model, config, *, place=Place()):
        super().__init__(d_model, config, place=place)
    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None): return ()
    def forward(self, x, state=None, context=None): return x, ()
    def flops_per_token(self, context_length): return 0
"""
TASK = """
from zoo.tasks.mqar import MQAR
from zoo.tasks.protocol import Batch, Task, register
from zoo.core.options import Options
@register("{name}")
class Own(Task):
    'Asks nothing.'
    layout = "next_token"
    class Config(Options):
        pass
    def sample(self, n, *, split, seed, start=0): return Batch(None, None)
    def render(self, batch, row=0, predictions=None): return ""
"""
OBJECTIVE = """
from zoo.core.options import Options
from zoo.objectives.base import Objective, register
@register("{name}")
class Own(Objective):
    'Teaches nothing.'
    class Config(Options):
        pass
    def encode(self, batch): ...
    def updates(self, model, data, carry, generator): ...
    def solve(self, model, batch): ...
    def evaluate(self, model, batch): ...
"""
OWN = {"mixer": (mixers, MIXER), "task": (tasks, TASK), "objective": (objectives, OBJECTIVE)}
FAULTS = [
    *[("mixer", method, f"it lacks {method}") for method in ("forward", "init_state", "flops_per_token")],
    *[("task", method, f"it lacks {method}") for method in ("sample", "render")],
    *[("objective", method, f"it lacks {method}") for method in ("encode", "updates", "solve", "evaluate")],
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a file that registers something, its text changed, and imports it; all is forgotten afterwards."""
    for registered, _ in OWN.values():
        registered.names()
        for table in ("_classes", "_modules", "_refused"):
            monkeypatch.setattr(registered, table, dict(getattr(registered, table)))

    def write(kind, name, change=lambda text: text, also=""):
        path = tmp_path / f"{name}_{kind}.py"
        path.write_text(change(OWN[kind][1].format(name=name)) + also)
        import_source(str(path), "ZOO_IMPORT")
        return OWN[kind][0]

    return write


@pytest.mark.parametrize("kind", OWN)
def test_what_keeps_the_contract_is_registered(own, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registered = own(kind, "own_word")
    assert registered["own_word"].name == "own_word"
    assert registered.origin("own_word").sha256 is not None
    assert registered.origin(registered.names()[0]) is None or registered.names()[0] == "own_word"


def dropped(method):
    return lambda text: re.sub(rf"(?m)^    def {method}\(.*\n", "", text)


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        *[(kind, dropped(method), told) for kind, method, told in FAULTS],
        *[
            (kind, lambda text: re.sub(r"(?m)^    class Config.*\n.*\n", "", text), "it lacks class Config")
            for kind in OWN
        ],
        *[
            (kind, lambda text: text.replace("Config(Options)", "Config"), "its Config is no subclass of")
            for kind in OWN
        ],
        *[(kind, lambda text: re.sub(r"class Own\(.*\)", "class Own", text), "it is no subclass of") for kind in OWN],
        (
            "mixer",
            lambda text: text.replace("x, state=None, context=None", "x"),
            "its forward does not take x, state, con",
        ),
        (
            "mixer",
            lambda text: text.replace("(self, d_model, config, *, place=Place())", "(self, d_model)"),
            "its __init__ does",
        ),
        (
            "mixer",
            lambda text: text.replace("    'Adds", "    kind = 'sequnce'\n    'Adds"),
            "its kind is 'sequnce'; it should",
        ),
        ("task", lambda text: text.replace('layout = "next_token"', ""), "its layout is missing; it should be one of"),
        ("task", lambda text: text.replace("next_token", "next"), "its layout is 'next'; it should be one of"),
        (
            "task",
            lambda text: text.replace("row=0, predictions=None", ""),
            "its render does not take batch, row, predictions",
        ),
        ("objective", lambda text: text.replace("model, data, carry, generator", "model"), "its updates does not take"),
        ("objective", lambda text: text.replace("own_word", "own word"), "its name should be of letters"),
    ],
)
def test_a_class_that_lacks_something_is_refused_alone(own, kind, change, told):
    second = OWN[kind][1].format(name="second_word").replace("class Own", "class Second")
    with pytest.warns(UsageWarning) as said:
        registered = own(kind, "own_word", change, also=second)
    assert len(said) == 1
    line = str(said[0].message)
    assert re.match(rf"The {kind} 'own.word' of .*own_word_{kind}.py is refused: {told}", line)
    assert "\n" not in line
    assert "second_word" in registered.names()
    assert "own_word" not in registered
    if "its name" not in told:
        with pytest.raises(UsageError, match=re.escape(line)):
            registered["own_word"]


def test_a_class_that_is_registered_by_hand_is_refused_by_an_error():
    with pytest.raises(
        UsageError, match=r"The mixer 'own_word' of .*test_registry.py is refused: it lacks flops_per_token"
    ):

        @zoo.register("own_word")
        class Own(Mixer):
            pass


def test_sizes_that_no_init_sets_are_missed(own):
    own("task", "own_word")
    own("objective", "own_word")
    with pytest.raises(UsageError, match="The task 'own_word' sets no vocab_size, which its __init__ should"):
        create_task("own_word")
    with pytest.raises(UsageError, match="The objective 'own_word' sets no vocab_size"):
        create_objective("own_word", create_task("mqar"))


def test_a_subclass_without_a_config_has_one_of_its_own(own):
    """One that is known by its Config would else be taken for its parent."""
    swiglu = mixers["swiglu"]

    @zoo.register("a_swiglu")
    class Own(swiglu):
        pass

    assert Own.Config is not swiglu.Config
    assert zoo.create_mixer("swiglu", 16).name == "swiglu"
    assert zoo.create_mixer("a_swiglu(bias=True)", 16).name == "a_swiglu"
    with pytest.raises(UsageError, match="The mixer 'another' is 'a_swiglu' already: one class, one name"):
        zoo.register("another")(Own)


def test_the_package_imports_without_a_problem():
    for registered in (mixers, tasks, objectives, families.registry, norms, residuals):
        assert registered.names()
        assert registered._problems == []
        assert all(registered.origin(name) is None for name in registered.names() if "own" not in name)


FAMILY = """
from dataclasses import replace
from zoo.models.families import families
llama = next(f for f in families.all() if f.name == "llama3")
own = dict(name="{name}", architecture="{name}ForCausalLM", options=lambda p: llama.options(p))
families.add(replace(llama, **own, {more}))
"""


def test_families_of_files_are_found_in_any_order(tmp_path, monkeypatch):
    (tmp_path / "family.py").write_text(FAMILY.format(name="own_llama", more=""))
    (tmp_path / "broken.py").write_text(FAMILY.format(name="own_broken", more="weights=None"))
    (tmp_path / "wrong.py").write_text(FAMILY.format(name="own_wrong", more="sizes={'tiny': {}}, defaults={}"))
    known, fresh = families.all(), Registry("family", "zoo.models.families")
    monkeypatch.setattr(imports, "failed", {})
    monkeypatch.setattr(families, "registry", fresh)
    families.add(*known)
    sources = os.pathsep.join(str(tmp_path / f"{name}.py") for name in ("family", "broken", "wrong"))
    monkeypatch.setenv("ZOO_IMPORT", sources)
    with pytest.warns(
        UsageWarning, match=r"The family 'own_broken' of .*broken.py is refused: its weights is no function"
    ):
        assert "own_llama-tiny" in families.names("own_llama*")
    assert zoo.create_model("own_llama-tiny").config.published["architectures"] == ["own_llamaForCausalLM"]
    listed = {entry["name"]: entry["about"] for entry in listing("models")}
    assert listed["own_llama-tiny"] == listed["llama3-tiny"]
    assert listed["own_wrong-tiny"].startswith("cannot be made: ")
    with pytest.raises(UsageError, match="Unknown model 'own_broken-tiny'"):
        zoo.create_model({"family": "own_broken-tiny"})


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        (
            "import sys; sys.exit(0)",
            2,
            "zoo: ZOO_IMPORT 'own.py' failed: it ends the process (sys.exit(0)) (own.py, line 1).\n",
        ),
        (MIXER.format(name="own_word"), 0, ""),
        (
            dropped("forward")(MIXER.format(name="own_word")),
            2,
            "zoo: The mixer 'own_word' of own.py is refused: it lacks forward.\n",
        ),
    ],
)
def test_the_command_says_what_it_leaves_out_in_one_line_and_does_the_rest(tmp_path, code, status, told):
    """A file that cannot be imported, or a word of it that is refused, is wrong input; all other words are there."""
    (tmp_path / "own.py").write_text(code)
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "zoo", "list", "mixers", "mha"]
    done = forked.run(command, env=os.environ | {"ZOO_IMPORT": "own.py", "PYTHONPATH": paths}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (status, told)
    assert done.stdout.startswith("mha  ")


CLASHES = """
from dataclasses import replace
import zoo
from zoo.core.options import Options
from zoo.models.families import families
from zoo.protocol import Norm, norms
from zoo.tasks.mqar import MQAR
from zoo.tasks.protocol import register

@norms.register("rmsnorm")
class Mine(Norm):
    def forward(self, x):
        return x

@register("mqar")
class MyTask(MQAR):
    pass

llama = next(f for f in families.all() if f.name == "llama3")
families.add(replace(llama, name="mine", options=lambda p: llama.options(p)))
"""


def test_names_that_are_taken_end_with_status_2_and_name_both_places(tmp_path):
    """Whichever registry is asked first: the package's own names come first."""
    (tmp_path / "own.py").write_text(CLASHES + MIXER.format(name="gla"))
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "zoo", "list", "norms", "layernorm"]
    done = forked.run(command, env=os.environ | {"ZOO_IMPORT": "own.py", "PYTHONPATH": paths}, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("layernorm  ")
    lines = done.stderr.splitlines()
    taken = ["norm name 'rmsnorm'", "task name 'mqar'", "family 'mine'", "mixer name 'gla'"]
    by = [
        "RMSNorm of zoo.norms.rms",
        "MQAR of zoo.tasks.mqar",
        "'llama3' of zoo.models.families.llama3",
        "zoo.mixers.gla",
    ]
    assert len(lines) == len(taken)
    for line, name, place in zip(lines, taken, by, strict=True):
        assert line.startswith(f"zoo: The {name} of own.py is ")
        assert place in line


def test_options_take_numpy_s_numbers():
    """As the Python numbers that they are, so that what is written down is plain; a truth is still no number."""

    class Some(Options):
        count: int = 1
        share: float = 0.5
        on: bool = False
        sizes: tuple[int, ...] = ()

    made = Some(count=np.int64(3), share=np.float32(0.25), on=np.bool_(True), sizes=(np.int8(1), 2))
    assert made == Some(count=3, share=0.25, on=True, sizes=(1, 2))
    assert [type(v) for v in (made.count, made.share, made.on, made.sizes[0])] == [int, float, bool, int]
    for wrong in ({"count": np.float64(3)}, {"count": np.bool_(True)}, {"on": np.int64(1)}):
        with pytest.raises(UsageError):
            Some(**wrong)


@pytest.mark.parametrize("axes", ["channels", (), ("channels", "tme"), ["time"], None])
def test_axes_of_a_norm_are_those_that_there_are(axes):
    with pytest.raises(UsageError, match=r"The norm 'own_norm'.* is refused: its axes are .*'channels' or 'time'"):
        norms.register("own_norm")(type("Own", (norms["none"],), {"axes": axes}))


@pytest.mark.parametrize("registry", [mixers, norms, residuals, tasks], ids=lambda registry: registry.kind)
def test_a_class_is_registered_by_a_name(registry):
    with pytest.raises(UsageError, match=r"Own has no name to be registered by: write @\.\.\.register\(\"my_"):
        registry.register(type("Own", (), {}))
    with pytest.raises(
        UsageError, match=r"'my-own'.* is refused: its name should be of letters, digits and underscores"
    ):
        registry.register("my-own")(type("Own", (), {}))


@pytest.mark.parametrize(("registry", "base"), [(mixers, "mlp"), (norms, "none"), (residuals, "plain")])
def test_options_are_constants(registry, base):
    class Config(Options):
        sizes: list[int] = Field(default_factory=lambda: [1, 2])

    with pytest.raises(UsageError, match=r"'own'.* is refused: its option sizes is no constant: use a tuple"):
        registry.register("own")(type("Own", (registry[base],), {"Config": Config}))


def test_traits_are_traits():
    with pytest.raises(UsageError, match=r"'own_traits'.* is refused: its traits are \{.*write Traits"):
        zoo.register("own_traits")(type("Own", (mixers["mlp"],), {"traits": {"not_compilable": "why"}}))


def test_law_cases_are_of_the_class():
    with pytest.raises(UsageError, match=r"'own_cases'.* is refused: its law_cases is no classmethod"):

        @zoo.register("own_cases")
        class Own(mixers["mlp"]):
            def law_cases(self):
                return [{}]


def test_what_failed_under_another_value_of_the_variable_is_past(tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "failed", {})
    monkeypatch.setenv("ZOO_IMPORT", str(tmp_path / "none.py"))
    with pytest.warns(UsageWarning, match="none.py"):
        zoo.list_mixers()
    assert len(imports.failed_imports()) == 1
    monkeypatch.delenv("ZOO_IMPORT")
    assert imports.failed_imports() == []


def test_listed_options_are_those_of_an_experiment():
    found = {entry["name"]: entry for entry in listing("options")}
    for section, config in (("train", TrainConfig), ("model", ModelConfig), ("model.recursion", Recursion)):
        for name, field in config.model_fields.items():
            entry = found[f"{section}.{name}"]
            assert entry["about"], name
            assert entry["type"], name
            if not field.is_required():
                default = field.get_default(call_default_factory=True)
                assert entry["default"] == repr(default)
    assert {f"model.{name}" for name in SIZES} <= found.keys()
    assert {"name", "out", "task", "train.target.value"} <= found.keys()
    assert [entry["name"] for entry in listing("options", "train.ema*")] == [
        "train.ema",
        "train.ema_start",
        "train.ema_warmup",
    ]
