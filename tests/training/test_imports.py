"""A run says which files of the user's own it needs, wherever it is read, and no folder has its code imported."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import warnings

import pytest

import zoo
from zoo.core import imports as sources
from zoo.core.errors import UsageError, UsageWarning
from zoo.objectives.base import objectives
from zoo.protocol import mixers
from zoo.tasks.protocol import registry as tasks
from zoo.training.evaluation import evaluate_run
from zoo.training.imports import IMPORTED
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
}
OVERRIDES = {
    "own_mixer.py": {"model.pattern": "short_conv own_mlp"},
    "own_task.py": {"task.name": "own_recall"},
    "own_objective.py": {"objective": "own_teaching"},
}
WORDS = {
    "own_mixer.py": ("mixer", "own_mlp"),
    "own_task.py": ("task", "own_recall"),
    "own_objective.py": ("objective", "own_teaching"),
}


@pytest.fixture
def forgetting(monkeypatch):
    """Forgets what files have registered, as a new process would."""

    def forget():
        for registered in (mixers, tasks, objectives):
            for name in ("own_mlp", "own_recall", "own_teaching"):
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
    uses = [use for use in USES if use != "load" or kind == "mixer"]
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
