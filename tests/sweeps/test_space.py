"""What is swept: lists, lists of lists, distributions, words, budgets; and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from zoo.core.errors import UsageError
from zoo.models.create import create_model
from zoo.recipes import list_sweeps
from zoo.sweeps.asha import judged
from zoo.sweeps.config import read_sweep_config
from zoo.sweeps.plan import Plan
from zoo.sweeps.search import Search
from zoo.sweeps.space import read_space
from zoo.training.recipes import read_experiments


def plan(experiment, space=None, **options) -> Plan:
    made = Plan(read_sweep_config(experiment, space, **options))
    judged(made)
    return made


def points(made: Plan) -> list[tuple]:
    return [(*trial.point.values(), trial.seed) for trial in made.trials]


def test_a_grid_is_every_combination_with_the_seeds_innermost(small):
    made = plan(small, {"train.lr": [1e-3, 1e-2], "train.seed": range(2), "words.mixer": ("mlp", "mha")})
    assert points(made) == [(lr, w, s) for lr in (1e-3, 1e-2) for w in ("mlp", "mha") for s in (0, 1)]
    assert [trial.config["train"]["lr"] for trial in made.trials[::4]] == [1e-3, 1e-2]
    assert [trial.config["model"]["pattern"] for trial in made.trials[:4:2]] == ["short_conv mlp", "short_conv mha"]
    assert [trial.words for trial in made.trials[:4:2]] == [{"mixer": "mlp"}, {"mixer": "mha"}]
    assert [trial.id for trial in made.trials] == [f"{i:05d}" for i in range(8)]


def test_a_list_is_one_value_where_the_option_takes_one(small):
    space = read_space({"task.n_pairs": [1, 2], "train.lr": [1, 2]}, small)
    assert (space.fixed, space.axes) == ({"task.n_pairs": [1, 2]}, {"train.lr": [1, 2]})
    assert points(plan(small, {"task.n_pairs": [[1, 2], 2]})) == [([1, 2], 0), (2, 0)]


def test_arrays_and_patterns_of_python(small):
    assert points(plan(small, {"train.lr": np.array([1e-3, 1e-2])})) == [(1e-3, 0), (1e-2, 0)]
    patterns = ["2*(short_conv mlp)", "mha mlp"]
    made = plan(small, {"model.pattern": patterns})
    assert [trial.config["model"]["pattern"] for trial in made.trials] == patterns


@pytest.mark.parametrize("option", ["n_parameters", "state_bytes", "flops_per_token"])
def test_a_budget_sets_the_width_of_each_word(small, option):
    made = plan(small, {"words.mixer": ["mha", "mamba2"], f"model.{option}": [80_000, 160_000]})
    widths = [trial.config["model"]["d_model"] for trial in made.trials]
    assert len(set(widths)) == 4
    for trial, width in zip(made.trials, widths, strict=True):
        model = create_model({**trial.config["model"], "d_model": width})
        length = trial.config["task"]["seq_len"]
        costs = {"n_parameters": model.n_parameters(), "state_bytes": model.state_bytes(1, length)}
        amount = {**costs, "flops_per_token": model.flops_per_token(length)}[option]
        assert 0.5 * trial.point[f"model.{option}"] < amount <= trial.point[f"model.{option}"]


def test_draws_are_the_same_whatever_else_is_swept(small):
    rate = {"train.lr": {"log_uniform": [1e-4, 1e-2]}, "train.warmup_steps": {"int": [0, 9]}}
    alone = plan(small, rate, search="random(5)")
    beside = plan(small, {"words.mixer": ["mlp", "mha"], **rate}, search="random(n=5)", seeds=[0, 1])
    drawn = [tuple(trial.point.values()) for trial in alone.trials]
    assert len(set(drawn)) == 5
    assert [tuple(trial.point.values())[1:] for trial in beside.trials[::2]] == drawn * 2
    assert all(1e-4 <= lr <= 1e-2 and 0 <= steps <= 9 for lr, steps in drawn)
    assert [tuple(t.point.values()) for t in plan(small, rate, search="random(5, seed=1)").trials] != drawn
    assert len(plan(small, {"train.optimizer": {"choice": ["adamw", "muon"]}}, samples=1).trials) == 1


def test_variants_are_an_axis(small):
    small["variants"] = {"a": {"train.lr": 1e-3}, "b": {"words.mixer": "mha"}}
    made = plan(small, {"train.weight_decay": [0.0, 0.1]})
    assert points(made) == [(v, w, 0) for v in "ab" for w in (0.0, 0.1)]
    assert [trial.words["mixer"] for trial in made.trials[::2]] == ["mlp", "mha"]
    assert points(plan(small, variants=["b"])) == [("b", 0)]


def test_a_choice_has_a_stage_of_its_own(small):
    space = {"words.mixer": ["mlp", "mha"], "train.lr": [1e-3, 1e-2]}
    made = plan(small, space, seeds=[0, 1, 2], choose={"key": "train.lr", "seeds": [7, 8]})
    assert (len(made.trials), made.finals, len(made)) == (8, 6, 14)
    assert {(trial.stage, trial.seed) for trial in made.trials} == {("choose", 7), ("choose", 8)}
    last = made.final(1, 1e-2)
    assert [(t.number, t.stage, t.seed, t.point) for t in last] == [
        (11 + i, "final", i, {"words.mixer": "mha", "train.lr": 1e-2}) for i in range(3)
    ]


def test_one_thread_for_each_trial_where_nothing_is_said(small):
    assert plan(small).trials[0].config["train"]["threads"] == 1
    assert plan(small, {"train.threads": 2}).trials[0].config["train"]["threads"] == 2
    assert plan(small, {"train.threads": None}).trials[0].config["train"]["threads"] is None


def test_a_file_of_a_sweep(small):
    Path("study.yaml").write_text(
        yaml.safe_dump({"experiment": small, "space": {"train.lr": [0.1, 0.2]}, "seeds": [5]})
    )
    config = read_sweep_config("study.yaml", {"train.lr": [0.3]}, retries=2)
    assert (config.name, config.folder, config.retries) == ("study", Path("runs/study"), 2)
    assert points(Plan(config)) == [(0.3, 5)]
    assert read_sweep_config("mqar", {"train.lr": [1e-3]}).folder == Path("runs/mqar-sweep")


def test_what_is_no_sweep_and_what_is_no_recipe(small):
    with pytest.raises(UsageError, match=r"Unknown sweep or recipe 'mqar-swep'. Did you mean 'mqar-sweep'?"):
        read_sweep_config("mqar-swep")
    with pytest.raises(UsageError, match=r"no\.yaml is neither a recipe file nor a run folder"):
        read_sweep_config("no.yaml")
    Path("study.yaml").write_text(yaml.safe_dump({"experiment": small}))
    with pytest.raises(UsageError, match=r"study\.yaml is a sweep and no recipe: run it with zoo sweep study\.yaml"):
        read_experiments("study.yaml")


@pytest.mark.parametrize("name", list_sweeps())
def test_shipped_sweeps_can_be_run(name):
    assert len(plan(name)) > 1


def test_searches_as_text():
    assert Search.of("asha(n=9, grace=50, reduction=3, by=[words.mixer])") == Search(
        name="asha", n=9, grace=50, reduction=3.0, by=("words.mixer",)
    )
    assert Search.of("random(20)") == Search.of({"name": "random", "n": 20})


RATES = {"train.lr": [1e-3, 1e-2]}
DRAWN = {"train.lr": {"log_uniform": [1e-4, 1e-2]}}
WRONG = [
    ({"train.lrr": [1, 2]}, {}, "Unknown option of train 'lrr'. Did you mean 'lr'?"),
    ({"train.lr": [1e-3, "fast"]}, {}, r"lr='fast' is not allowed.*\(in the trial train.lr=fast train.seed=0\)"),
    ({"words.mixr": ["mha"]}, {}, "Unknown word of this recipe 'mixr'. Did you mean 'mixer'?"),
    ({"words.mixer": ["mha", "mambo"]}, {}, "'mambo'"),
    ({"model.d_model": [16, 17]}, {}, "d_model=17 is not allowed"),
    ({"model.pattern": ["mha(n_heads=3)"]}, {}, "in the trial"),
    ({"model.n_parameters": [9]}, {}, "n_parameters=9 is too few"),
    ({"model.n_parameters": [9000], "model.state_bytes": 900}, {}, "n_parameters=9000 and state_bytes=900 are both"),
    ({"train.metric": ["accuracy", "acuracy"]}, {}, "Unknown metric 'acuracy'. Did you mean 'accuracy'?"),
    ({"train.lr": []}, {}, r"train.lr=\[\] is not allowed"),
    ({"train.lr": [1, 1]}, {}, "train.lr: 1 is given twice"),
    ({"train.lr": [1, 1.0]}, {}, "Two trials are the same experiment"),
    ({"name": ["a", "b"]}, {}, "name=.* is not allowed in a sweep"),
    ({"variant": ["a"]}, {}, "Unknown variant 'a'"),
    (DRAWN, {}, "train.lr is given as a distribution: a grid draws nothing"),
    (RATES, {"search": "random(3)"}, "n=3 is a number of draws"),
    (DRAWN, {"search": "random"}, "random needs the number of draws"),
    (DRAWN, {"search": "anneal(3)"}, "name='anneal' is not allowed"),
    (DRAWN, {"search": "asha"}, "give the number of draws"),
    (RATES, {"search": "asha(grace=6)"}, "grace=6 is no less than train.steps=6"),
    (RATES, {"search": "asha(by=[words.mixer], grace=2)"}, "by='words.mixer' is no swept key"),
    ({"train.lr": {"log_uniform": [0, 1]}}, {"samples": 2}, "the lowest number of log_uniform is above 0"),
    ({"train.lr": {"uniform": [2, 1]}}, {"samples": 2}, "uniform takes the lowest and the highest number"),
    ({"train.steps": {"int": [1, 2.5]}}, {"samples": 2}, "int takes the lowest and the highest whole number"),
    (
        {"train.seed": [0]},
        {"seeds": [0], "choose": {"key": "train.lr", "seeds": [1]}},
        "'train.lr' is no key with a li",
    ),
    (RATES, {"seeds": [0, 1], "choose": {"key": "train.lr", "seeds": [1]}}, "no seed in common: seed 1 is one of each"),
    (RATES, {"seeds": [-1]}, "seeds=-1 is not allowed"),
    (RATES, {"seeds": [1, 1]}, "holds a seed twice"),
    (RATES, {"workers": 0}, "workers=0 is not allowed"),
    (RATES, {"budget": {"hours": 1}}, "Unknown option of sweep.budget 'hours'"),
    ({"train.seed": range(200_000)}, {}, "more than 100,000 values"),
    ({"train.seed": range(1000), "train.batch_size": range(1, 1000)}, {}, "999,000 trials; at most 100,000"),
]


@pytest.mark.parametrize(("space", "options", "message"), WRONG)
def test_refused_before_anything_runs(small, space, options, message):
    with pytest.raises(UsageError, match=message) as error:
        plan(small, space, **options)
    assert "\n" not in str(error.value)
    assert not list(Path().iterdir())
