"""A sweep from its start to its store: in Python and by the command, stopped, failed, refused, gone on with."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import yaml

import zoo
from zoo.cli import main
from zoo.core.errors import RunError, UsageError
from zoo.report import gather
from zoo.sweeps import trial as trial_module
from zoo.sweeps.cluster import _why
from zoo.sweeps.config import read_sweep_config
from zoo.sweeps.store import Store, read_sweep
from zoo.training.loop import Trainer
from zoo.training.stopping import Interrupted

RATES = {"train.lr": [1e-3, 1e-2]}


def sweep(small, space=RATES, **options):
    return zoo.sweep(small, space, ray=False, quiet=True, **{"out": "s", **options})


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *arguments])
    return int(ended.value.code or 0)


def alike(store: Store):
    """All that two equal sweeps have in common."""
    drop = [
        "started",
        "ended",
        "seconds",
        "processor_seconds",
        "load",
        "peak_memory",
        "tokens_per_second",
        "config.out",
    ]
    trials = store.trials()
    return [
        trials.drop([c for c in trials.columns if c in drop]).to_dicts(),
        store.curves().drop("seconds", "tokens_per_second").to_dicts(),
        store.problems().to_dicts(),
    ]


def test_every_trial_is_a_run_and_a_row(small):
    done = sweep(small, seeds=[0, 1])
    assert done.counts == {"finished": 4}
    trials = done.trials()
    assert trials["set.train.lr"].to_list() == [1e-3, 1e-3, 1e-2, 1e-2]
    assert trials["seed"].to_list() == trials["set.train.seed"].to_list() == [0, 1, 0, 1]
    assert set(trials["stage"]) == {"grid"}
    for row in trials.rows(named=True):
        run = json.loads(Path("s", "trials", row["id"], "result.json").read_text())
        assert row["test.accuracy"] == run["test"]["accuracy"]
        assert row["validation.loss"] == run["validation"]["loss"]
        assert (row["parameters"], row["steps"]) == (run["n_parameters"], 6)
        assert row["config.train.lr"] == run["train"]["lr"]
        assert row["config.words.mixer"] == "mlp"
        assert row["machine.threads"] == 1
        problems = done.problems().filter(trial=row["trial"])
        assert problems["accuracy"].mean() == pytest.approx(row["test.accuracy"])
        assert problems["problem"].n_unique() == run["test"]["n_problems"]
    assert set(done.curves()["split"]) == {"train", "validation"}
    assert read_sweep(done.path)["space"] == RATES
    alone = zoo.train(
        {**small, "words": None, "model": {"pattern": "short_conv mlp", "d_model": 16}}, {"train.lr": 1e-2}
    )
    assert alone.data["test"]["loss"] == trials["test.loss"][2]  # the same bits as outside a sweep


def test_the_choice_is_made_on_validation_with_seeds_of_its_own(small):
    done = sweep(
        small, {"words.mixer": ["mlp", "mha"], **RATES}, seeds=[0, 1], choose={"key": "train.lr", "seeds": [5]}
    )
    trials = done.trials()
    assert trials["stage"].to_list() == ["choose"] * 4 + ["final"] * 4
    for mixer in ("mlp", "mha"):
        first, last = (trials.filter(**{"stage": stage, "set.words.mixer": mixer}) for stage in ("choose", "final"))
        best = first.sort("validation.accuracy", descending=True, maintain_order=True)["set.train.lr"][0]
        assert last["set.train.lr"].to_list() == [best, best]
        assert first["test.accuracy"].null_count() == 2  # not read
        assert last["test.accuracy"].null_count() == 0
    assert set(done.problems()["trial"]) == {4, 5, 6, 7}


def test_the_command(small, capsys):
    Path("study.yaml").write_text(yaml.safe_dump({"experiment": small, "space": RATES}))
    assert command("study.yaml", "--dry-run", "--seeds", "0,1") == 0
    assert "00003  train.lr=0.01 train.seed=1\nruns/study: 4 trials\n" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir()] == ["study.yaml"]
    assert command("study.yaml", "--no-ray", "train.lr=[0.001]", "words.mixer=[mlp,mha]") == 0
    said = capsys.readouterr()
    assert "runs/study: 2 trials: 2 finished" in said.out
    assert said.err.count("finished") == 2
    assert "\x1b" not in said.err
    assert command("runs/study", "--no-ray", "--quiet") == 0  # nothing left to do
    assert capsys.readouterr().err == ""
    assert command("study.yaml", "--no-ray", "--out", "runs/study") == 2
    told = "runs/study holds a sweep with another space.train.lr ([0.001] there, [0.001, 0.01] now), space.words.mixer"
    assert told in capsys.readouterr().err


def test_a_sweep_of_a_recipe_by_name(small, capsys):
    Path("small.yaml").write_text(yaml.safe_dump(small))
    assert command("small.yaml", "train.lr=[1e-3,1e-2]", "train.steps=3", "--no-ray", "--quiet") == 0
    assert set(Store("runs/small-sweep").trials()["steps"]) == {3}


def stop_at(monkeypatch, trial: str, step: int) -> None:
    original = Trainer._step

    def stepping(self, data):
        if self.folder.path.name == trial and self.at.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, data)

    monkeypatch.setattr(Trainer, "_step", stepping)


def test_an_interrupted_sweep_goes_on_to_the_same_bits(small, monkeypatch):
    whole = sweep(small, out="whole")
    with monkeypatch.context() as patch:
        stop_at(patch, "00001", 4)
        with pytest.raises(Interrupted, match=r"2 trials: 1 finished, 1 interrupted.*zoo sweep s") as error:
            sweep(small)
        assert error.value.exit_status == 130
    assert Store("s").trials()["status"].to_list() == ["finished", "interrupted"]
    assert list(Path("s/trials/00001/checkpoints").iterdir())
    assert sweep(small).counts == {"finished": 2}
    assert alike(Store("s")) == alike(Store(whole.path))


def test_what_a_killed_process_had_not_stored_is_read_from_its_run(small, monkeypatch):
    whole = sweep(small, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(trial_module, "_figures", lambda folder: os.kill(os.getpid(), signal.SIGINT) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep(small)
    assert Store("s").trials()["status"].to_list() == ["running"]
    sweep(small)
    assert alike(Store("s")) == alike(Store(whole.path))


def test_a_failed_trial_is_recorded_retried_and_counted(small, monkeypatch, capsys):
    original = Trainer.run
    calls = []

    def failing(self):
        if self.config.lr == 1e-2:
            calls.append(self.config.lr)
            if len(calls) < 4:
                raise RunError("The disk is full.\nVery full.")
        return original(self)

    monkeypatch.setattr(Trainer, "run", failing)
    Path("study.yaml").write_text(yaml.safe_dump({"experiment": small, "space": RATES}))
    assert command("study.yaml", "--no-ray", "--retries", "1") == 1
    said = capsys.readouterr()
    assert "runs/study: 2 trials: 1 finished, 1 failed" in said.out
    assert "One trial failed, such as 00001: The disk is full. Very full." in said.out
    row = Store("runs/study").trials().rows(named=True)[1]
    assert (row["status"], row["attempts"], row["reason"]) == ("failed", 2, "The disk is full. Very full.")
    assert len(calls) == 2
    assert command("runs/study", "--no-ray", "--quiet") == 1  # as asked: not once more
    assert len(calls) == 2
    assert command("runs/study", "--no-ray", "--quiet", "--retries", "3") == 0
    assert Store("runs/study").trials()["attempts"].to_list() == [1, 4]


def test_a_sweep_that_was_edited_by_hand_is_not_continued(small):
    sweep(small, seeds=[0])
    text = Path("s/sweep.yaml").read_text()
    assert "steps: 6" in text
    Path("s/sweep.yaml").write_text(text.replace("steps: 6", "steps: 5"))
    with pytest.raises(UsageError, match=r"^The trial 00000 has another train.steps \(6 in the store, 5 now\)"):
        zoo.sweep("s", ray=False, quiet=True)
    Path("s/sweep.yaml").write_text(text)
    assert zoo.sweep("s", ray=False, quiet=True).counts == {"finished": 2}


def test_a_trial_that_diverged_says_so(small):
    small["train"]["clip"] = None
    done = sweep(small, {"train.lr": [1e-3, 1e30]})
    assert done.counts == {"finished": 1, "failed": 1}
    assert done.trials()["diverged"].to_list() == [False, True]


def test_a_combination_whose_choice_failed_is_not_dropped(small, monkeypatch):
    def failing(self):
        raise RunError("no")

    monkeypatch.setattr(Trainer, "run", failing)
    done = sweep(small, seeds=[0], choose={"key": "train.lr", "seeds": [1]})
    assert done.counts == {"failed": 3}
    row = done.trials().rows(named=True)[2]
    assert (row["stage"], row["reason"]) == ("final", "no train.lr could be chosen: all of its trials failed")


def test_a_slice_ends_cleanly_and_a_clone_with_the_store_alone_does_the_rest(small, monkeypatch, capsys):
    study = {"experiment": small, "space": {"words.mixer": ["mlp", "mha"], **RATES}, "seeds": [0, 1]}
    Path("study.yaml").write_text(
        yaml.safe_dump({**study, "choose": {"key": "train.lr", "seeds": [5]}}, sort_keys=False)
    )
    with monkeypatch.context() as patch:
        clock = iter(range(100))
        patch.setattr("zoo.sweeps.driver.time", SimpleNamespace(monotonic=lambda: next(clock)))
        assert command("study.yaml", "--no-ray", "--slice-seconds", "5") == 0
    said = capsys.readouterr()
    assert "runs/study: 8 trials: 4 finished, 4 not started\nThe same command continues" in said.out
    first = Store("runs/study").trials()
    assert first["id"].to_list() == ["00000", "00001", "00004", "00005"]  # one mixer, with its chosen rate
    assert first["processor_seconds"].min() > 0
    clone = Path("clone/results/study")
    (clone / "store").mkdir(parents=True)
    for file in ["sweep.yaml", *(f"store/{path.name}" for path in Path("runs/study/store").iterdir())]:
        (clone / file).write_bytes(Path("runs/study", file).read_bytes())
        assert str(Path.cwd()).encode() not in (clone / file).read_bytes()
    assert command("study.yaml", "--no-ray", "--out", str(clone)) == 0
    assert capsys.readouterr().err.count("finished") == 4
    assert sorted(path.name for path in (clone / "trials").iterdir()) == ["00002", "00003", "00006", "00007"]
    assert command("study.yaml", "--no-ray", "--out", "whole") == 0
    assert alike(Store(clone)) == alike(Store("whole"))
    kept = Store(clone).trials().filter(trial=0)
    assert kept.to_dicts() == [
        row | {k: None for k in kept.columns if k not in row} for row in first.head(1).to_dicts()
    ]


def test_a_store_of_earlier_code_has_the_defaults_of_later_options(small):
    sweep(small, budget={"trials": 1})
    later = ["config.train.cuda_graphs", "config.task.n_passes", "config.model.causal"]
    path = Path("s/store/trials.parquet")
    given = Store("s").trials().select(later).rows()
    pl.read_parquet(path).drop(later).write_parquet(path)
    assert Store("s").trials().select(later).rows() == given
    assert sweep(small, budget={"trials": 2}).counts == {"finished": 2}
    assert pl.read_parquet(path).select(later).rows() == [(None, None, None), *given]
    assert sweep(small).counts == {"finished": 2}
    assert gather([Path("s")], print).ask(f'select distinct "{later[0]}" from trials').rows == [(False,)]
    text = Path("s/sweep.yaml").read_text()
    Path("s/sweep.yaml").write_text(text.replace("n_pairs: 2", "n_pairs: 2\n    n_passes: 2"))
    with pytest.raises(UsageError, match=r"^The trial 00000 has another task.n_passes \(1 in the store, 2 now\)"):
        zoo.sweep("s", ray=False, quiet=True)


def test_a_spent_budget_starts_no_more(small):
    assert sweep(small, seeds=range(3), budget={"trials": 2}).counts == {"finished": 2, "not started": 4}
    assert sweep(small, seeds=range(3), budget={"seconds": 1e-9}).counts == {"finished": 2, "not started": 4}
    assert sweep(small, seeds=range(3)).counts == {"finished": 6}


def test_random_states_and_threads_are_the_caller_s(small):
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    sweep(small)
    assert torch.equal(before, torch.get_rng_state())


def test_folders_that_are_something_else_are_refused(small):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("task: {name: mqar}\n")
    Path("notes").mkdir()
    with pytest.raises(UsageError, match=r"^notes is neither a sweep \(with sweep.yaml\) nor a run folder"):
        read_sweep_config("notes")
    Path("mqar").mkdir()
    assert read_sweep_config("mqar").name == "mqar-sweep"  # a recipe, whatever else has its name
    Path("notes/todo.txt").write_text("")
    Path("file").write_text("")
    for out, why in (
        ("run", "is a run folder"),
        ("notes", r"is not empty and holds no sweep\.yaml"),
        ("file", "is a file"),
    ):
        with pytest.raises(UsageError, match=why):
            sweep(small, out=out)


@pytest.mark.parametrize("text", ["", "experiment: [1]\n", "experiment: {task: mqar", "- 1\n"])
def test_a_damaged_sweep_yaml_is_refused_in_one_line(small, text):
    sweep(small, {"train.lr": [1e-3]})
    Path("s/sweep.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"s/sweep\.yaml is") as error:
        sweep(small, {"train.lr": [1e-3]})
    assert "\n" not in str(error.value)


def test_asha_ends_trials_early_and_keeps_them_out_of_the_results(small):
    small["train"] |= {"steps": 16, "eval_every": 4, "metric": "loss"}
    pytest.importorskip("ray")
    rates = {"train.lr": [1e-2, 1e-9, 1e-8]}
    done = sweep(small, rates, search="asha(grace=4, reduction=2)", seeds=[0])
    trials = done.trials()
    assert "pruned" in done.counts
    assert trials["status"][0] == "finished"
    for row in trials.filter(status="pruned").rows(named=True):
        assert row["steps"] in (4, 8)
        assert row["test.accuracy"] is None
    assert set(done.problems()["trial"]) == set(trials.filter(status="finished")["trial"])
    assert sweep(small, rates, search="asha(grace=4, reduction=2)", seeds=[0]).counts == done.counts


def test_without_ray_installed(small, monkeypatch):
    for module in ("zoo.sweeps.sweep", "zoo.sweeps.asha"):
        monkeypatch.setattr(f"{module}.has_ray", lambda: False)
    assert zoo.sweep(small, RATES, quiet=True, out="s").counts == {"finished": 2}
    wrong = {"ray": {"ray": True}, "address": {"address": "127.0.0.1:1"}, "asha": {"search": "asha(grace=3)"}}
    for name, options in wrong.items():
        with pytest.raises(UsageError, match=r"pip install sequence-zoo\[sweep\]"):
            zoo.sweep(small, RATES, quiet=True, out=name, **options)
        assert not Path(name).exists()


@pytest.mark.parametrize(
    ("address", "why"),
    [("127.0.0.1:9", "There is no Ray cluster at '127.0.0.1:9'"), ("here", "HOST:PORT")],
)
def test_no_cluster_is_one_line(small, address, why):
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match=why) as error:
        zoo.sweep(small, RATES, address=address, quiet=True)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_drivers_and_a_kill(small, start_zoo):
    small["train"] |= {"steps": 400, "eval_every": 50, "log_every": 50}
    Path("study.yaml").write_text(yaml.safe_dump({"experiment": small, "space": RATES}))
    whole = zoo.sweep("study.yaml", out="whole", ray=False, quiet=True)
    first = start_zoo("sweep", "study.yaml", "--no-ray")
    wait_for(lambda: Path("runs/study/trials/00001/checkpoints/step_50").exists())
    with pytest.raises(UsageError, match="The sweep runs/study is run by another process"):
        zoo.sweep("study.yaml", ray=False, quiet=True)
    first.kill()
    first.wait()
    assert Store("runs/study").trials()["status"].to_list() == ["finished", "running"]
    last = start_zoo("sweep", "study.yaml", "--no-ray")
    assert last.wait(timeout=120) == 0
    assert alike(Store("runs/study")) == alike(Store(whole.path))


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_reason_of_a_worker_that_did_not_start_is_the_exception_s():
    text = "The actor died \x1b[36mray::Worker\x1b[39m (pid=1)\n import nothing\nModuleNotFoundError: No 'nothing'"
    assert _why(Exception(text)) == " (ModuleNotFoundError: No 'nothing')"
    assert _why(Exception("The worker died.\nOf a signal")) == " (The worker died. Of a signal)"
