"""What lies in a run folder is verified before it is believed, and written to only where it is the run's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import yaml

import zoo
from zoo.core.errors import RunError
from zoo.core.run_files import read_metrics, read_whole_config
from zoo.training import checkpoint, checkpoints, launch
from zoo.training.loading import load_from
from zoo.training.loop import Trainer
from zoo.training.stopping import Interrupted
from zoo.training.train import train

RUN = Path("runs/small")
SHORT = {"train.steps": 20, "train.eval_every": 5, "train.checkpoint_every": 5}


@pytest.fixture
def stopped(recipe, monkeypatch, made_once):
    """A run stopped at step 13: checkpoints of steps 10 and 13, and the best in one of its own."""

    def stopped(best: int = 5, **overrides) -> Path:
        original, scored = Trainer._step, Trainer._score

        def stepping(self, data):
            if self.at.step == 12:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, data)

        def scoring(self, model, rows):  # the best, whatever the weights
            return {**scored(self, model, rows), "accuracy": float(self.at.step == best)}

        def make():
            with monkeypatch.context() as patch:
                patch.setattr(Trainer, "_step", stepping)
                patch.setattr(Trainer, "_score", scoring)
                with pytest.raises(Interrupted):
                    train(recipe, SHORT | overrides, quiet=True)

        made_once(json.dumps(["stopped", best, overrides]), RUN, make)
        assert checkpoints.steps(RUN / "checkpoints") == sorted({best, 10, 13})
        return RUN

    return stopped


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


# ---- what is read of checkpoints


@pytest.mark.parametrize("damage", [spoil, lambda path: shutil.rmtree(path.parent)], ids=["changed", "gone"])
@pytest.mark.parametrize("when", ["before", "at the end"])
def test_lost_best_weights_are_missed_aloud_and_never_scored(stopped, monkeypatch, capsys, damage, when):
    run = stopped()
    best = run / "checkpoints/step_5" / checkpoint.AVERAGE
    if when == "before":
        damage(best)
    else:
        original = Trainer._test

        def testing(self):
            if best.exists():
                damage(best)
            return original(self)

        monkeypatch.setattr(Trainer, "_test", testing)
        scored = Trainer._score
        monkeypatch.setattr(Trainer, "_score", lambda *a: {**scored(*a), "accuracy": 0.0})  # nothing later is better
    result = train(run)
    told = [line for line in capsys.readouterr().err.splitlines() if "is lost" in line]
    assert len(told) == 1
    assert "step_5" in told[0]
    assert "start over with --fresh" in told[0]
    assert (result.data["lost_best_step"], result.status) == (5, "finished")
    assert result.data["best_step"] > 5
    assert load_from(run)[1].name == f"step_{result.data['best_step']}"


def test_read_weights_are_verified_by_the_read_itself(stopped):
    path = stopped() / "checkpoints/step_13"
    for name, read in (
        (checkpoint.WEIGHTS, lambda: checkpoint.read_weights(path, average=False)),
        (checkpoint.AVERAGE, lambda: checkpoint.read_weights(path)),
        (checkpoint.TRAINING, lambda: checkpoint.read_training(path)),
    ):
        read()
        spoil(path / name)
        with pytest.raises(checkpoint.Damaged, match="changed since"):
            read()


@pytest.mark.parametrize("which", ["best", "last"])
def test_no_older_checkpoint_is_read_in_place_of_the_newest(stopped, which):
    run = stopped()
    spoil(run / "checkpoints/step_13" / checkpoint.WEIGHTS)
    with pytest.raises(zoo.UsageError) as error:
        zoo.load(run, which)
    told = one_line(error)
    assert "step_13 is damaged" in told
    assert "which='step_10'" in told
    assert load_from(run, "step_10")[1] == run / "checkpoints/step_10"
    spoil(run / "checkpoints/step_10" / checkpoint.WEIGHTS)
    with pytest.raises(zoo.UsageError, match=r"step_13 is damaged.*which='step_5'"):
        zoo.load(run, which)


def test_a_damaged_best_names_the_last(stopped):
    run = stopped()
    spoil(run / "checkpoints/step_5" / checkpoint.WEIGHTS)
    with pytest.raises(zoo.UsageError, match=r"step_5 is damaged.*step_13 is whole.*which='step_13'"):
        zoo.load(run)
    assert load_from(run, "last")[1].name == "step_13"


def rewrite(path: Path, training: object = None, **changes: object) -> None:
    """Change a checkpoint, and its manifest with it, as anybody can who knows the format."""
    if training is not None:
        torch.save(training, path / checkpoint.TRAINING)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    data = (path / checkpoint.TRAINING).read_bytes()
    manifest["files"][checkpoint.TRAINING] = {"bytes": len(data), "digest": checkpoint._digest(data)}
    manifest = {k: v for k, v in {**manifest, **changes}.items() if k != "digest"}
    manifest["digest"] = checkpoint._digest_of(manifest)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def foreign(data: dict) -> dict[str, object]:
    """A training state in many ways another one's."""
    position, optimizer = data["position"], data["optimizer"]
    state = optimizer[0]["state"]
    other = [{**optimizer[0], "state": {k: {**v, "exp_avg": torch.zeros(3, 3)} for k, v in state.items()}}]
    named = [{**optimizer[0], "state": {k: {"step": v["step"]} for k, v in state.items()}}]
    places = {
        "step": "7",
        "tokens": None,
        "seconds": [1],
        "best": {"step": 5},
        "to_evaluate": 3,
        "status": "odd",
        "loss_sum": {},
        "metrics_size": -1,
    }
    return {
        **{f"position.{k}": {**data, "position": {**position, k: v}} for k, v in places.items()},
        **{k: {**data, k: "text"} for k in data if k != "random_cuda"},
        **{f"no {k}": {n: v for n, v in data.items() if n != k} for k in data},
        "list": [data],
        "tensor": torch.zeros(3),
        "more": {**data, "more": 1},
        "position of tensors": {**data, "position": {"step": torch.zeros(1)}},
        "optimizer of another": {**data, "optimizer": optimizer * 2},
        "optimizer of other shapes": {**data, "optimizer": other},
        "optimizer of other names": {**data, "optimizer": named},
        "optimizer of other types": {**data, "optimizer": [{"state": {0: 1}, "param_groups": [{}]}]},
        "random of other size": {**data, "random": torch.zeros(7, dtype=torch.uint8)},
        "random of floats": {**data, "random": torch.zeros(5056)},
        "generator of other size": {**data, "generator": torch.zeros(7, dtype=torch.uint8)},
        "carry of another": {**data, "carry": {"x": torch.zeros(2)}},
    }


def test_a_foreign_training_state_is_one_line(stopped):
    run = stopped()
    for step in (5, 10):
        shutil.rmtree(run / f"checkpoints/step_{step}")
    path = run / "checkpoints/step_13"
    good = checkpoint.read_training(path)
    for name, data in foreign(good).items():
        rewrite(path, data)
        with pytest.raises(zoo.UsageError) as error:
            train(run, quiet=True)
        assert "step_13" in one_line(error), name
        assert "--fresh" in str(error.value), name


def test_a_packed_training_state_is_not_unpacked(stopped):
    import zipfile

    path = stopped() / "checkpoints/step_13"
    with zipfile.ZipFile(path / checkpoint.TRAINING, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    rewrite(path)
    with pytest.raises(checkpoint.Damaged, match=r"unpacks to 10,000,000 bytes"):
        checkpoint.read_training(path)


MANIFESTS = [[1], 3, "text", None, {}, {"format": 1}]


@pytest.mark.parametrize("content", MANIFESTS, ids=str)
def test_an_odd_manifest_is_damage_and_stops_no_training(recipe, monkeypatch, content):
    original = Trainer._save

    def saving(self):
        original(self)
        for path in self.folder.checkpoints.glob("step_10"):
            (path / checkpoint.MANIFEST).write_text(json.dumps(content))

    monkeypatch.setattr(Trainer, "_save", saving)
    train(recipe, {**SHORT, "train.keep": 3}, quiet=True)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.read_manifest(RUN / "checkpoints/step_10")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "13"},
        {"best": [1]},
        {"files": {"../../config.yaml": {"bytes": 1, "digest": ""}}},
        {"files": []},
        {"files": {}},
        {"config": 3},
    ],
    ids=str,
)
def test_a_manifest_of_other_types_is_refused(stopped, changes):
    path = stopped() / "checkpoints/step_13"
    rewrite(path, **changes)
    with pytest.raises(checkpoint.Damaged, match="no checkpoint of this package"):
        checkpoint.verify(path)


# ---- records


def damage_lost(path: Path) -> None:
    path.unlink()


def damage_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damage_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"step": 5', b'"st\xffp": 5'))


def damage_nul(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(b"\0" * len(data))


def damage_types(path: Path) -> None:
    path.write_bytes(b'[1]\n3\n"x"\n{}\n' + path.read_bytes()[14:])


@pytest.mark.parametrize("damage", [damage_lost, damage_short, damage_byte, damage_nul, damage_types])
def test_damaged_records_are_missed_and_the_run_goes_on(stopped, capsys, damage, outcome_of, uncut):
    run = stopped()
    damage(run / "metrics.jsonl")
    train(run)
    assert "is not as the checkpoint left it" in capsys.readouterr().err
    assert outcome_of(run)["weights"] == uncut(SHORT)["outcome"]["weights"]
    assert b"\0" not in (run / "metrics.jsonl").read_bytes()
    assert read_metrics(run)[-1]["split"] == "test"


def test_a_size_that_nobody_wrote_is_not_written_now(stopped, capsys):
    run = stopped()
    path = run / "checkpoints/step_13"
    data = checkpoint.read_training(path)
    rewrite(path, {**data, "position": {**data["position"], "metrics_size": 10**9}})
    train(run)
    assert "of 1,000,000,000 bytes are there" in capsys.readouterr().err
    assert (run / "metrics.jsonl").stat().st_size < 10**5


@pytest.mark.parametrize("content", ["{}", "[]", '"x"', "3", "null", "{", "\0", '{"status": "finished"}'])
def test_a_result_that_is_none_is_written_anew(stopped, content):
    run = stopped()
    (run / "result.json").write_text(content)
    assert train(run, quiet=True).status == "finished"
    (run / "result.json").write_text(content)
    assert train(run, quiet=True).status == "finished"
    assert json.loads((run / "result.json").read_text())["steps"] == 20


@pytest.mark.parametrize("hard", [False, True], ids=["link", "second name"])
def test_nothing_is_written_through_links(stopped, hard):
    run = stopped()
    names = ("metrics.jsonl", "events.out.tfevents.zoo", "result.json", "solving.json", "config.yaml", ".lock")
    kept = {}
    for name in names:
        outside = Path(f"outside-{name}")
        content = (run / name).read_bytes() if (run / name).exists() else b"precious"
        outside.write_bytes(content)
        kept[outside] = outside.read_bytes()
        (run / name).unlink(missing_ok=True)
        (run / name).hardlink_to(outside) if hard else (run / name).symlink_to(outside.absolute())
    train(run, quiet=True)
    assert {outside: outside.read_bytes() for outside in kept} == kept
    assert read_metrics(run)[-1]["split"] == "test"


# ---- the config


EDITS = {
    "train.lr": 0.01,
    "train.seed": 7,
    "train.optimizer": "muon",
    "train.batch_size": 8,
    "train.ema": None,
    "task.n_pairs": 3,
    "model.dropout": 0.2,
}


def edit(run: Path, key: str, value: object) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    section, name = key.split(".")
    config[section][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_an_edited_config_is_refused_by_name(stopped, outcome_of, uncut):
    run = stopped()
    before = (run / "config.yaml").read_text()
    for key, value in EDITS.items():
        edit(run, key, value)
        with pytest.raises(zoo.UsageError) as error:
            train(run, quiet=True)
        told = one_line(error)
        assert "config.yaml was edited after its run had begun" in told
        assert f"{key} (" in told
        assert f"{value!r} now" in told
        assert "--fresh" in told
        assert "change it back" in told
        (run / "config.yaml").write_text(before)
    edit(run, "train.lr", 0.01)
    train(run, {"train.lr": 3e-3}, quiet=True)  # one way of changing it back
    assert outcome_of(run)["weights"] == uncut(SHORT)["outcome"]["weights"]
    assert read_whole_config(run)["train"]["lr"] == 3e-3


def test_an_edited_model_is_not_loaded(stopped):
    run = stopped()
    edit(run, "model.norm_eps", 0.5)
    with pytest.raises(zoo.UsageError, match=r"edited.*model.norm_eps \(1e-05 when it was trained, 0.5 now\)"):
        zoo.load(run)


def test_runs_of_before_the_config_was_kept_still_resume(stopped, outcome_of, uncut):
    run = stopped()
    for path in (run / "checkpoints").glob("step_*"):
        manifest = {k: v for k, v in json.loads((path / checkpoint.MANIFEST).read_text()).items() if k != "digest"}
        del manifest["config"]
        data = checkpoint.read_training(path)
        data["position"] = {k: v for k, v in data["position"].items() if k != "lost_best"}
        torch.save(data, path / checkpoint.TRAINING)
        (path / checkpoint.MANIFEST).write_text(
            json.dumps({**manifest, "digest": checkpoint._digest_of(manifest)}, indent=1)
        )
        rewrite(path)
    assert zoo.load(run)
    with pytest.raises(zoo.UsageError, match=r"different train.lr"):
        train(run, {"train.lr": 0.5}, quiet=True)
    train(run, quiet=True)
    assert outcome_of(run)["weights"] == uncut(SHORT)["outcome"]["weights"]


def test_a_lost_config_comes_back_with_the_recipe(stopped):
    run = stopped()
    before = read_whole_config(run)
    (run / "config.yaml").unlink()
    (run / "result.json").unlink()
    with pytest.raises(zoo.UsageError, match=r"different train.lr"):
        train("small.yaml", {**SHORT, "train.lr": 0.5}, quiet=True)
    train("small.yaml", SHORT, quiet=True)
    assert read_whole_config(run) == before


# ---- starting over, leftovers, folders that go


def test_fresh_through_a_link(stopped, outcome_of):
    train("small.yaml", {**SHORT, "out": "whole", "train.lr": 0.5}, quiet=True)
    run = stopped()
    shutil.move(run / "checkpoints", "scratch")
    Path("scratch/notes.txt").write_text("precious")
    (run / "checkpoints").symlink_to(Path("scratch").absolute())
    train(run, {"train.lr": 0.5}, fresh=True, quiet=True)
    assert outcome_of(run)["weights"] == outcome_of("whole")["weights"]
    assert (run / "checkpoints").is_symlink()
    assert Path("scratch/notes.txt").read_text() == "precious"


@pytest.mark.parametrize("stuck", ["step_5", "metrics.jsonl"])
def test_fresh_deletes_all_or_nothing(stopped, monkeypatch, stuck):
    run = stopped()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    original = Path.rename

    def rename(self, target):
        if self.name == stuck and "deleted" not in str(self) and ".tmp" not in str(self.parent):
            raise PermissionError(13, "Permission denied")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(RunError, match=f"Cannot delete .*{stuck}: Permission denied; nothing was deleted"):
            train(run, fresh=True, quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_leftovers_of_killed_processes_go(stopped):
    run = stopped()
    left = [run / f".{name}.0123abcd.tmp" for name in ("config.yaml", "result.json", "metrics.jsonl", "solving.json")]
    for path in left:
        path.write_text("half")
    trash = run / ".deleted.0123abcd.tmp"
    trash.mkdir()
    (trash / "config.yaml").write_text("old")
    mine = run / ".notes.tmp"
    mine.write_text("precious")
    train(run, quiet=True)
    assert not any(path.exists() for path in [*left, trash])
    assert mine.exists()


@pytest.mark.parametrize("gone", ["renamed", "deleted", "another in its place"])
def test_a_folder_that_goes_is_not_made_anew(recipe, monkeypatch, gone, outcome_of, uncut):
    original = Trainer._step

    def stepping(self, data):
        if self.at.step == 12:
            RUN.rename("moved") if gone != "deleted" else shutil.rmtree(RUN)
            if gone == "another in its place":
                RUN.mkdir()
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stepping)
        with pytest.raises(RunError, match="runs/small is gone: it was renamed or deleted") as error:
            train(recipe, SHORT, quiet=True)
    assert "zoo train" in one_line(error)
    assert list(RUN.iterdir()) == [] if RUN.exists() else True
    if gone != "deleted":
        train("moved", quiet=True)
        assert outcome_of("moved")["weights"] == uncut(SHORT)["outcome"]["weights"]


# ---- processes


@pytest.mark.skipif(os.name == "nt", reason="pipes are not handed down there")
def test_a_child_does_not_outlive_its_parent(recipe):
    """The parent of a recipe's variants is killed; its training child stops, with a checkpoint."""
    text = Path(recipe).read_text() + "variants:\n  1: {}\n  2: {}\n"
    Path("many.yaml").write_text(text)
    root = str(Path(launch.__file__).resolve().parents[2])
    command = [sys.executable, "-c", "from zoo.cli import main; main()", "train", "many.yaml", "train.steps=100000"]
    command += ["train.eval_every=100000", "train.checkpoint_every=50", "train.log_every=10000", "--quiet"]
    parent = forked.start(command, env=os.environ | {"PYTHONPATH": root})
    folder = Path("runs/many/1/checkpoints")
    while not checkpoints.steps(folder):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    result = Path("runs/many/1/result.json")
    for _ in range(3000):
        if result.exists():
            break
        time.sleep(0.01)
    assert json.loads(result.read_text())["status"] == "interrupted"


# ---- what is said


def test_a_budget_that_cuts_the_steps_short_is_named(recipe, capsys):
    from zoo.cli import main

    with pytest.raises(SystemExit):
        main(["train", recipe, "train.steps=100000", "train.time_budget=0.2", "--quiet"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "time_budget at step" in last
    assert "train.time_budget=0.2 ended it before train.steps=100000" in last


def test_folders_of_variants_name_their_runs(recipe, capsys):
    from zoo.cli import main

    for name in ("b", "a"):
        train(recipe, {**SHORT, "train.steps": 1, "out": f"runs/both/{name}"}, quiet=True)
    commands = (["train", "runs/both"], ["generate", "runs/both", "--example", "0"], ["eval", "runs/both"])
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(command)
        err = capsys.readouterr().err
        assert ended.value.code == 2
        assert "runs/both/a, runs/both/b" in err, command
