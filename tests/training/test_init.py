"""Trainings that start from other weights: `init=...` and model objects, by the command and from Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from zoo.cli import main
from zoo.core.run_files import read_whole_config
from zoo.training import checkpoint
from zoo.training.train import train

SMALL = {
    "task": {"name": "mqar", "vocab_size": 64, "seq_len": 16, "n_pairs": 2},
    "train": {
        "steps": 4,
        "batch_size": 4,
        "eval_every": 2,
        "log_every": 2,
        "eval_rows": 8,
        "test_rows": 8,
        "threads": 1,
        "ema": 0.9,
        "keep": 99,
    },
}
MODEL = {"pattern": "2*(gqa swiglu)", "d_model": 16}


@pytest.fixture
def base(tmp_path, monkeypatch, made_once):
    """A trained run `x`, a recipe `small.yaml` of another model, and a published folder `hf`."""
    monkeypatch.chdir(tmp_path)
    made_once("base", Path("x"), lambda: train({**SMALL, "model": MODEL, "out": "x"}, quiet=True))
    Path("small.yaml").write_text(yaml.safe_dump({**SMALL, "model": {"pattern": "lstm", "d_model": 32}}))
    return Path("x")


def _command(*words, capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", *words])
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


def _first_weights(folder):
    return checkpoint.read_weights(Path(folder) / "checkpoints" / "step_0", average=False)


def _lists(folder):
    return json.loads((Path(folder) / "init.json").read_text())


def _kept(folder, source):
    """The names of the first weights of a run that are those of a source, to the bit."""
    weights = source.state_dict()
    first = _first_weights(folder)
    return {n for n, t in first.items() if n in weights and torch.equal(t, weights[n])}


def test_a_recipe_starts_from_a_run_with_its_model(base, capsys):
    status, _, err = _command("small.yaml", "init=x", "out=y", "task.n_pairs=3", capsys=capsys)
    assert status == 0
    best = zoo.load("x")
    assert f"y starts from x/checkpoints/step_{_best(base)}: 17 weights kept." in err
    assert _kept("y", best) == set(best.state_dict()) == set(_lists("y")["kept"])
    config = read_whole_config(Path("y"))
    assert config["model"]["pattern"] == MODEL["pattern"]
    assert (config["init"]["source"], len(config["init"]["digest"])) == ("x", 32)
    assert json.loads(Path("y/result.json").read_text())["init"] == config["init"]


def _best(run):
    return json.loads((run / "result.json").read_text())["best_step"]


def test_python_and_yaml_say_the_same(base):
    given = {**SMALL, "init": {"source": "x", "which": "last"}, "model": {"dropout": 0.1}, "out": "y"}
    result = train(given, quiet=True)
    assert result.data["model"] | {"dropout": 0.0} == read_whole_config(base)["model"]
    Path("y.yaml").write_text(yaml.safe_dump({**given, "out": "z"}))
    again = train("y.yaml", quiet=True)
    assert again.data["init"] == result.data["init"]
    assert _first_weights("y").keys() == _first_weights("z").keys()
    assert _kept("z", zoo.load("x", "last")) == set(_first_weights("z"))


def test_what_looks_like_fine_tuning_says_which_weights_it_means(base, capsys):
    status, _, err = _command("x", "task.n_pairs=3", "out=y", capsys=capsys)
    assert (status, err) == (2, "zoo: x is a trained run: init=x starts y from its weights, init=null from new ones.\n")
    assert not Path("y").exists()
    assert _command("x", "task.n_pairs=3", "out=y", "init=x", capsys=capsys)[0] == 0
    assert _kept("y", zoo.load("x"))
    assert _command("x", "train.seed=3", "out=new", "init=null", capsys=capsys)[0] == 0
    assert not Path("new/init.json").exists()
    assert _command("x", "train.seed=3", "out=new", "init=null", capsys=capsys)[0] == 0  # nothing to do
    status, _, err = _command("x", "train.lr=0.5", capsys=capsys)
    assert status == 2
    assert "train in another folder with out=... init=x, or start over with --fresh" in err


def test_a_run_goes_on_without_its_source(base, capsys, outcome_of):
    train("small.yaml", {"init": "x", "out": "whole", "train.schedule": "constant", "train.steps": 6}, quiet=True)
    train("small.yaml", {"init": "x", "out": "y", "train.schedule": "constant"}, quiet=True)
    shutil.rmtree(base)
    status, _, err = _command("y", "train.steps=6", capsys=capsys)
    assert (status, "Going on from y" in err) == (0, True)
    assert outcome_of("y") == outcome_of("whole")
    same = ["small.yaml", "init=x", "out=y", "train.schedule=constant", "train.steps=6"]
    assert "nothing to do" in _command(*same, capsys=capsys)[2]
    status, _, err = _command("small.yaml", "init=x", "out=z", capsys=capsys)
    assert (status, err) == (2, "zoo: There is no folder 'x'.\n")


def test_a_source_that_was_trained_on_changes_no_run_that_has_begun(base, capsys):
    train("small.yaml", {"init": "x", "out": "y"}, quiet=True)
    train("x", {"train.steps": 6}, quiet=True)
    assert train("small.yaml", {"init": "x", "out": "y", "train.steps": 5}, quiet=True).data["steps"] == 5
    digest = read_whole_config(Path("y"))["init"]["digest"]
    status, _, err = _command(
        "small.yaml", f"init={{source: x, which: last, digest: {digest}}}", "out=z", capsys=capsys
    )
    assert (status, "are not those that were recorded (init.digest)" in err) == (2, True)


def test_some_weights_by_patterns(base, capsys):
    _command("small.yaml", "init=x", "init.only=[backbone.*, norm.*]", "init.skip=*.norm_in.*", "out=y", capsys=capsys)
    lists, source = _lists("y"), zoo.load("x")
    names = set(source.state_dict())
    kept = {n for n in names if n.startswith(("backbone.", "norm.")) and "norm_in" not in n}
    assert set(lists["kept"]) == kept
    assert set(lists["fresh"]) == set(lists["left"]) == names - kept
    assert kept <= _kept("y", source)
    assert not torch.equal(_first_weights("y")["embedding.weight"], source.state_dict()["embedding.weight"])


def test_the_vocabulary_grows_on_request_only(base, capsys):
    words = ["small.yaml", "init=x", "out=y", "task.vocab_size=96"]
    status, _, err = _command(*words, capsys=capsys)
    assert status == 2
    assert "model.vocab_size=64 is too small" in err
    assert "init.resize_vocab=true adds the rest" in err
    assert _command(*words, "init.resize_vocab=true", capsys=capsys)[0] == 0
    assert _lists("y")["resized"] == ["embedding.weight", "head.weight"]
    first, source = _first_weights("y"), zoo.load("x").state_dict()
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(first[name][:64], source[name])
        assert len(first[name]) == 96
        assert first[name][64:].std() > 0
    smaller = train("small.yaml", {"init": {"source": "y", "resize_vocab": True}, "out": "z"}, quiet=True)
    assert smaller.data["model"]["vocab_size"] == 96  # no token is taken away


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["init=nothere"], "There is no folder 'nothere'"),
        (["init=."], "is no run folder, but holds some: x"),
        (["init=small.yaml"], "There is no folder 'small.yaml'"),
        (["init=x", "init.which=first"], "should be 'best' or 'last'"),
        (["init=x", "init.only=[layers.*]"], "init.only='layers.*' matches no weight. There are: embedding.weight"),
        (["init=x", "init.skip=['*']"], "no weight of it would be kept; init=null"),
        (["init=x", "init.on_mismatch=ignore"], "should be 'refuse' or 'fresh'"),
        (["init=x", "init.ony=[a]"], "Did you mean 'only'"),
        (
            ["init=x", "model.pattern=2*(mla swiglu)"],
            "backbone.steps.0.mixers.0.*, backbone.steps.2.mixers.0.* are of gqa",
        ),
        (["init=x", "model.d_model=32"], "embedding.weight, head.weight are (64, 16) there and (64, 32) here; "),
        (["init=x", "model.pattern=gqa swiglu"], "are not in the model; init.on_mismatch=fresh"),
        (["init=x", "model.pattern=3*(gqa swiglu)"], "are not there; init.on_mismatch=fresh"),
        (["init=x", "model=lstm"], "does not fit the model"),
        (["resize_vocab=true"], "Did you mean 'init.resize_vocab'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(base, capsys, overrides, told):
    status, _, err = _command("small.yaml", "out=y", *overrides, capsys=capsys)
    assert status == 2
    assert err.count("\n") == 1
    assert told in err.replace('"', "'")
    assert not Path("y").exists()


def test_a_dry_run_says_what_would_be_kept(base, capsys):
    status, out, _ = _command("small.yaml", "init=x", "out=y", "--dry-run", capsys=capsys)
    assert (status, f"x/checkpoints/step_{_best(base)}: 17 weights kept" in out) == (0, True)
    status, _, err = _command("small.yaml", "init=x", "out=y", "model=lstm", "--dry-run", capsys=capsys)
    assert (status, "does not fit the model" in err) == (2, True)
    assert not Path("y").exists()


def test_other_layers_start_fresh_on_request(base, capsys):
    words = ["small.yaml", "init=x", "out=y", "model.pattern=gqa swiglu mla swiglu", "init.on_mismatch=fresh"]
    status, _, err = _command(*words, capsys=capsys)
    assert (status, "4 new (backbone.steps.2.mixers.0.*)" in err) == (0, True)
    lists = _lists("y")
    assert all(n.startswith("backbone.steps.2.mixers.0.") for n in (*lists["fresh"], *lists["left"]))
    assert set(lists["kept"]) <= _kept("y", zoo.load("x"))


def test_published_and_saved_folders(base, capsys):
    """Load a published checkpoint, swap a layer, train, grow the vocabulary, write text: nothing by hand."""
    torch.manual_seed(7)
    zoo.to_hf(zoo.create_model("llama3-tiny"), "hf")
    swapped = zoo.swap(zoo.from_hf("hf"), {"gqa": "mla"}, layers=[1])
    zoo.save(swapped, "saved")
    assert _command("small.yaml", "init=hf", "out=a", capsys=capsys)[0] == 0
    assert _kept("a", zoo.from_hf("hf")) == set(_first_weights("a"))
    words = ["small.yaml", "init=saved", "out=b", "task.vocab_size=257", "init.resize_vocab=true"]
    status, _, err = _command(*words, capsys=capsys)
    assert (status, "b starts from saved: 17 weights kept, 1 resized (embedding.weight)." in err) == (0, True)
    assert zoo.load("b").config.pattern == swapped.config.pattern
    with pytest.raises(SystemExit):
        main(["generate", "b", "--bytes", "--prompt", "a", "-n", "2"])
    assert capsys.readouterr().out.endswith("\n")
    status, _, err = _command("small.yaml", "init=hf", "init.which=last", "out=c", capsys=capsys)
    assert (status, "chooses from a run" in err) == (2, True)


# ---- objects


def test_a_model_object_is_trained_and_stays_as_it_is(base):
    torch.manual_seed(7)  # not the seed of the training, which would make the same weights
    model = zoo.create_model("gqa swiglu", d_model=16, vocab_size=64).bfloat16()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result = zoo.train({**SMALL, "model": model, "out": "y"}, quiet=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(t.bfloat16(), before[n]) for n, t in _first_weights("y").items())
    assert result.data["init"]["source"] is None
    assert _lists("y")["source"] == "a TokenModel object"
    assert result.load().config == model.config
    assert zoo.train({**SMALL, "model": model, "out": "y"}, quiet=True).data == result.data  # the same run
    assert zoo.train("y", {"train.steps": 6}, quiet=True).data["steps"] == 6  # without the object
    other = zoo.create_model("gqa swiglu", d_model=16, vocab_size=64)
    with pytest.raises(zoo.UsageError, match=r"different init.digest"):
        zoo.train({**SMALL, "model": other, "out": "y", "train": {**SMALL["train"], "steps": 6}}, quiet=True)


def test_the_model_of_a_recipe_gives_way_to_an_object(base):
    swapped = zoo.swap(zoo.load("x"), {"gqa": "mla"}, layers=[1])
    result = zoo.train("small.yaml", {"out": "y", "model.dropout": 0.1}, model=swapped, quiet=True)
    assert result.data["model"]["pattern"] == "gqa swiglu mla swiglu"
    assert result.data["model"]["dropout"] == 0.1
    options = {"out": "z", "task.vocab_size": 80, "init": {"skip": ["norm.*"], "resize_vocab": True}}
    zoo.train("small.yaml", options, model=swapped, quiet=True)
    assert (_lists("z")["fresh"], len(_lists("z")["resized"])) == (["norm.weight"], 2)


@pytest.mark.parametrize("spec", ["config", "swapped"])
def test_a_config_object_starts_from_new_weights(base, spec):
    config = zoo.ModelConfig(pattern="gqa", d_model=16, vocab_size=64)
    config = config if spec == "config" else zoo.swap(config, {"gqa": "lstm"})
    result = zoo.train({**SMALL, "model": config, "out": "y"}, quiet=True)
    assert result.load().config == config
    assert "init" not in result.data


def _frozen():
    model = zoo.create_model("gqa", d_model=16, vocab_size=64)
    model.embedding.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.nn.Linear(2, 2), "a Linear cannot be trained; zoo.train takes a model of create_model"),
        (_frozen, "1 weights are frozen"),
        (lambda: zoo.create_backbone("gqa", d_model=16), "a Backbone cannot be trained"),
    ],
)
def test_objects_that_cannot_be_trained_are_refused(base, make, told):
    with pytest.raises(zoo.UsageError, match=told) as error:
        zoo.train({**SMALL, "model": make(), "out": "y"}, quiet=True)
    assert "\n" not in str(error.value)
    assert not Path("y").exists()


def test_one_start_only(base):
    model = zoo.load("x")
    for experiment, options in (
        ({**SMALL, "init": "x", "model": model}, {}),
        ({**SMALL, "model": model}, {"init": "x"}),
    ):
        with pytest.raises(zoo.UsageError, match="starts from one of them"):
            zoo.train({**experiment, "out": "y"}, options, quiet=True)
    with pytest.raises(zoo.UsageError, match="Two models are given"):
        zoo.train({**SMALL, "model": model, "out": "y"}, model=model, quiet=True)


def test_a_chain_of_starts_forgets_the_start_before(base, capsys):
    """A run that started from weights itself is a source as any other: its own `init` says nothing of the next run."""
    train({**SMALL, "init": {"source": "x", "skip": ["head.*"]}, "out": "y"}, quiet=True)
    status, _, err = _command("y", "init=y", "out=z", capsys=capsys)
    assert status == 0, err
    assert (_lists("z")["fresh"], read_whole_config(Path("z"))["init"]["skip"]) == ([], [])
    train("y", {"init.source": "y", "out": "dotted"}, quiet=True)
    assert _lists("dotted")["fresh"] == []
    train("y", {"out": "object"}, model=zoo.load("x"), quiet=True)
    assert _lists("object")["fresh"] == []
    status, _, err = _command("y", "init=x", "out=again", capsys=capsys)
    assert (status, _lists("again")["fresh"]) == (0, ["head.weight"]), err
