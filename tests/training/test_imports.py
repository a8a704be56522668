"""A run says which files of the user's own it needs, wherever it is read, and no folder has its code imported."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import warnings

import pytest

import zoo
from zoo.core import imports as sources
from zoo.core.errors import UsageError, UsageWarning
from zoo.objectives.base import objectives
from zoo.protocol import mixers, norms
from zoo.residual import residuals
from zoo.tasks.protocol import registry as tasks
from zoo.training.evaluation import evaluate_run
from zoo.training.imports import IMPORTED, MODEL_KINDS
from zoo.training.train import train

FILES = {
    "own_mixer.py": """
import zoo
from zoo.channel_mixers.mlp import MLP
@zoo.register("own_mlp")
class OwnMLP(MLP):
    'An MLP.'
""",
    "own_task.py": """
from zoo.tasks.mqar import MQAR
from zoo.tasks.protocol import register
@register("own_recall")
class OwnRecall(MQAR):
    'Recall.'
""",
    "own_objective.py": """
from zoo.objectives.base import register
from zoo.objectives.next_token import NextToken
@register("own_teaching")
class OwnTeaching(NextToken):
    'The next token.'
""",
    "own_norm.py": """
import torch
from torch import nn
import zoo.norms
from zoo.core.options import Options
from zoo.protocol import Norm
@zoo.norms.register("own_tanh")
class OwnTanh(Norm):
    'tanh(alpha x).'
    class Config(Options):
        alpha: float = 0.5
    def __init__(self, d_model, config, *, eps, axis="channels"):
        super().__init__(d_model, config, eps=eps, axis=axis)
        self.alpha = nn.Parameter(torch.full((d_model,), config.alpha))
    def forward(self, x):
        return torch.tanh(self.alpha * x)
""",
    "own_residual.py": """
import torch
from torch import nn
import zoo.residual
from zoo.core.options import Options
@zoo.residual.register("own_gate")
class OwnGate(zoo.residual.Connection):
    'x + share y.'
    class Config(Options):
        share: float = 1.0
    def __init__(self, d_model, config, *, index, eps):
        super().__init__(d_model, config, index=index, eps=eps)
        self.share = nn.Parameter(torch.full((d_model,), config.share))
    def forward(self, stream):
        return stream, stream, None
    def write(self, stream, y, weights):
        return stream + self.share * y
    def flops_per_token(self):
        return 0
""",
}
OVERRIDES = {
    "own_mixer.py": {"model.pattern": "short_conv own_mlp"},
    "own_task.py": {"task.name": "own_recall"},
    "own_objective.py": {"objective": "own_teaching"},
    "own_norm.py": {"model.pattern": 'short_conv mlp(norm="own_tanh(alpha=0.25)")', "model.norm": "own_tanh"},
    "own_residual.py": {"model.residual": "own_gate", "model.residual_share": 0.5},
}
WORDS = {
    "own_mixer.py": ("mixer", "own_mlp"),
    "own_task.py": ("task", "own_recall"),
    "own_objective.py": ("objective", "own_teaching"),
    "own_norm.py": ("norm", "own_tanh"),
    "own_residual.py": ("residual kind", "own_gate"),
}


@pytest.fixture
def forgetting(monkeypatch):
    """Forgets what files have registered, as a new process would."""

    def forget():
        for registered in (mixers, tasks, objectives, norms, residuals):
            for _, name in WORDS.values():
                registered._classes.pop(name, None)
                registered._refused.pop(name, None)
            registered._imported = None
        for name in [n for n in sources.origins if n.startswith("own_")]:
            sys.modules.pop(name, None)
        sources.failed.clear()
        monkeypatch.delenv("ZOO_IMPORT", raising=False)

    yield forget
    forget()


@pytest.fixture
def trained(recipe, tmp_path, monkeypatch, forgetting):
    """Trains with the word of a file: the run folder, in which the file is no more imported."""

    def run(file, **also):
        (tmp_path / file).write_text(FILES[file])
        monkeypatch.setenv("ZOO_IMPORT", file)
        small = {"train.steps": 10, "out": "runs/own", **OVERRIDES[file], **also}
        folder = train(recipe, small, quiet=True).path
        forgetting()
        return folder

    return run


USES = {
    "load": lambda folder: zoo.load(folder),
    "evaluate": lambda folder: evaluate_run(folder),
    "resume": lambda folder: train(folder, {"train.steps": 10}, quiet=True),
}


@pytest.mark.parametrize("file", FILES)
def test_a_run_names_the_files_that_it_needs(trained, monkeypatch, file, tmp_path):
    folder = trained(file)
    kind, name = WORDS[file]
    digest = hashlib.sha256(FILES[file].encode()).hexdigest()
    assert json.loads((folder / IMPORTED).read_text()) == [{"kind": kind, "name": name, "path": file, "sha256": digest}]
    shutil.copy(tmp_path / file, folder / file)  # which nobody imports
    told = re.escape(f"{folder} needs the {kind} {name!r} of {file}: set ZOO_IMPORT={file}.")
    uses = [use for use in USES if use != "load" or kind in MODEL_KINDS]
    for use in uses:
        with pytest.raises(UsageError, match=told) as refusal:
            USES[use](folder)
        assert "\n" not in str(refusal.value)
    monkeypatch.setenv("ZOO_IMPORT", file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UsageWarning)
        for use in uses:
            USES[use](folder)


def test_a_run_that_needs_no_file_notes_none(recipe, forgetting):
    assert not (train(recipe, {"train.steps": 10}, quiet=True).path / IMPORTED).exists()


def test_a_file_that_has_changed_is_told(trained, monkeypatch, tmp_path):
    folder = trained("own_mixer.py")
    (tmp_path / "own_mixer.py").write_text(FILES["own_mixer.py"] + "# more\n")
    monkeypatch.setenv("ZOO_IMPORT", "own_mixer.py")
    with pytest.warns(
        UsageWarning, match=r"needs the mixer 'own_mlp' of own_mixer.py, and own_mixer.py is not the file"
    ):
        zoo.load(folder)


def test_a_file_that_fails_now_is_told(trained, monkeypatch, tmp_path):
    folder = trained("own_mixer.py")
    (tmp_path / "own_mixer.py").write_text("1 / 0")
    monkeypatch.setenv("ZOO_IMPORT", "own_mixer.py")
    told = r"ZOO_IMPORT=own_mixer.py. ZOO_IMPORT 'own_mixer.py' failed: ZeroDivisionError"
    with pytest.raises(UsageError, match=told), pytest.warns(UsageWarning):
        zoo.load(folder)


def test_code_that_lies_in_a_run_folder_is_not_advised(trained, tmp_path):
    folder = trained("own_mixer.py")
    shutil.move(tmp_path / "own_mixer.py", folder / "own_mixer.py")
    entry = {"kind": "mixer", "name": "own_mlp", "path": str(folder / "own_mixer.py"), "sha256": None}
    (folder / IMPORTED).write_text(json.dumps([entry]))
    with pytest.raises(UsageError, match="code in a run folder is never imported: copy it elsewhere if you trust it"):
        zoo.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"{}",
        b"[1]",
        b'[{"kind": "mixer"}]',
        b"\xff\xfe",
        b"[" * 100_000,
        b'[{"kind": 1, "name": [], "path": 2}]',
    ],
)
def test_what_cannot_be_read_of_it_is_told_and_no_more(trained, content):
    folder = trained("own_task.py")
    (folder / IMPORTED).write_bytes(content)
    with pytest.warns(UsageWarning) as said:
        zoo.load(folder)
    assert all("\n" not in str(warning.message) for warning in said)


def test_a_norm_and_a_residual_kind_of_a_file_have_options(monkeypatch, tmp_path, forgetting):
    files = ("own_norm.py", "own_residual.py")
    for file in files:
        (tmp_path / file).write_text(FILES[file])
    monkeypatch.setenv("ZOO_IMPORT", os.pathsep.join(str(tmp_path / file) for file in files))
    pattern = 'mlp(norm="own_tanh(alpha=0.25)") glu'
    forms = ({"residual": "own_gate(share=0.5)"}, {"residual": "own_gate", "residual_share": 0.5})
    models = [zoo.create_model(pattern, d_model=16, vocab_size=5, norm="own_tanh", **form) for form in forms]
    assert models[0].config == models[1].config
    first, second = models[0].backbone.steps
    assert (first.norm_in.alpha == 0.25).all()
    assert (second.norm_in.alpha == 0.5).all()
    assert (second.connection.share == 0.5).all()
    with pytest.raises(UsageError, match=r"Unknown option of own_tanh 'alfa'. Did you mean 'alpha'\?"):
        zoo.create_model('mlp(norm="own_tanh(alfa=0.25)")', d_model=16, vocab_size=5)
    with pytest.raises(UsageError, match='residual_share needs residual="own_gate"; "plain" has no such option'):
        zoo.create_model("mlp", d_model=16, vocab_size=5, residual_share=0.5)


def test_the_digest_of_a_file_has_the_sources_of_its_kernels_in_it(tmp_path):
    digests = []
    for folder, source in (("first", "// one"), ("same", "// one"), ("other", "// two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.cpp").write_text(source)
        own = tmp_path / folder / "own_kernel.py"
        own.write_text("from pathlib import Path\nfrom zoo.ops.kernel import Kernel\n"
                       "KERNEL = Kernel(Path(__file__).with_name('own.cpp'))\n")  # fmt: skip
        sources.import_source(str(own), "here")
        digests.append(next(o.sha256 for o in sources.origins.values() if o.path == str(own)))
    assert digests[0] == digests[1]
    assert digests[1] != digests[2]
