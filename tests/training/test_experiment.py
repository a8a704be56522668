"""Recipes, overrides and what is wrong with them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from zoo.core.needs import Need
from zoo.core.run_files import differing
from zoo.interop.hf import weight_maps
from zoo.objectives.base import objectives
from zoo.recipes import list_recipes
from zoo.training.recipes import (
    override,
    parse_overrides,
    read_experiment,
    read_experiments,
    read_recipe,
    read_task,
)
from zoo.training.train_options import TrainConfig

BASE = {"task": {"name": "mqar", "vocab_size": 64, "seq_len": 16}, "model": "short_conv mlp"}


NEEDS_FILES = {"arc-trm": {"task.path": None, "task.n_augmentations": 2}}
"""Recipes on files of the user's own, here without them."""


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_builds(name):
    for experiment in read_experiments(name, NEEDS_FILES.get(name, {})).values():
        parts = experiment.build()
        assert parts.model.vocab_size == parts.objective.vocab_size
        config = experiment.resolved(parts)
        again = read_experiment(yaml.safe_load(yaml.safe_dump(config)))
        assert again.resolved(again.build()) == config


def test_overrides_are_yaml():
    given = [
        "train.lr=3e-4",
        "train.ema=null",
        "model.pattern=2*(mha | short_conv)",
        "task.n_pairs=[2, 4]",
        "x=a: b: c",
    ]
    assert parse_overrides(given) == {
        "train.lr": 3e-4,
        "train.ema": None,
        "model.pattern": "2*(mha | short_conv)",
        "task.n_pairs": [2, 4],
        "x": "a: b: c",
    }


def test_override_replaces_values_and_merges_mappings():
    data = {"task": "mqar", "model": {"pattern": "mha", "d_model": 32}}
    new = override(data, {"task.n_pairs": 2, "model": {"d_model": 64}, "train.target": {"value": 0.9}})
    assert new == {
        "task": {"name": "mqar", "n_pairs": 2},
        "model": {"pattern": "mha", "d_model": 64},
        "train": {"target": {"value": 0.9}},
    }
    assert override(new, {"task": {"name": "maze", "size": 9}})["task"] == {"name": "maze", "size": 9}
    assert override(new, {"task": {"name": "mqar", "seq_len": 8}})["task"] == {
        "name": "mqar",
        "n_pairs": 2,
        "seq_len": 8,
    }
    assert data == {"task": "mqar", "model": {"pattern": "mha", "d_model": 32}}
    for family in ({"model.family": "mamba2-tiny"}, {"model": {"family": "mamba2-tiny"}}):
        assert override(data, family)["model"] == {"family": "mamba2-tiny"}
    assert override(data, {"model.d_model": 48, "model.family": "mamba2-tiny"})["model"] == {
        "d_model": 48,
        "family": "mamba2-tiny",
    }
    assert override(data, {"model": "mamba2-tiny"})["model"] == {"family": "mamba2-tiny"}


def test_lists_in_yaml_are_tuples_to_a_task():
    parts = read_experiment(BASE, {"task.n_pairs": [1, 2]}).build()
    assert parts.task.config.n_pairs == (1, 2)


def test_fills_in_what_task_and_objective_need():
    causal = read_experiment({"task": {"name": "sudoku", "size": 4}, "model": "mha"}, {"model.positions": "learned"})
    parts = causal.build()
    assert parts.model.vocab_size == parts.task.vocab_size + 1  # the separator
    assert parts.model.max_len == 2 * parts.task.seq_len
    in_place = read_experiment(causal, {"model.causal": False}).build()
    assert in_place.model.vocab_size == in_place.task.vocab_size
    assert in_place.model.max_len == in_place.task.seq_len


@pytest.mark.parametrize("name", zoo.list_models("*-tiny"))
def test_a_family_takes_the_vocabulary_of_the_task_and_keeps_its_own_width(name):
    family = zoo.create_model(name).config
    objective = "deep_supervision" if family.recursion else "next_token" if family.causal else "masked_diffusion"
    overrides = {"task.vocab_size": 100, "model.family": name, "objective": objective}
    model = read_experiment("mqar", overrides).build().model
    more = objective != "next_token"  # its blank or mask
    assert (model.vocab_size, model.pattern, model.d_model) == (100 + more, family.pattern, family.d_model)
    assert weight_maps(model)  # it is still the family's


def test_puzzles_are_counted_where_something_is_learned_of_each():
    recursive = {
        "task": {"name": "arc", "n_made": 5, "n_augmentations": 3},
        "model": {"pattern": "swiglu", "causal": False, "recursion": {"prefix": 2, "updates": 4}},
        "objective": "deep_supervision",
    }
    recursion = read_experiment(recursive).build().model.recursion
    assert (recursion.n_puzzles, recursion.prefix, recursion.updates) == (31, 2, 4)
    assert read_experiment(recursive, {"model.recursion.n_puzzles": 40}).build().model.recursion.n_puzzles == 40
    assert read_experiment(recursive, {"model.recursion.prefix": 0}).build().model.recursion.n_puzzles == 1
    assert read_experiment(recursive, {"task": "sudoku"}).build().model.recursion.n_puzzles == 1
    with pytest.raises(zoo.UsageError, match=r"n_puzzles=30 is too small: arc numbers 31, which is filled in"):
        read_experiment(recursive, {"model.recursion.n_puzzles": 30}).build()
    assert read_experiment(recursive, {"train.puzzle_lr": 0.01}).build()
    with pytest.raises(zoo.UsageError, match=r"train.puzzle_lr is for what is learned of each puzzle: set model.recu"):
        read_experiment(recursive, {"train.puzzle_lr": 0.01, "model.recursion.prefix": 0}).build()


def test_parts_say_what_they_need_and_clashes_are_told():
    @objectives.register("needy")
    class Needy(objectives["next_token"]):
        def needs(self, draft):
            needs = super().needs(draft)
            return needs._replace(length=Need(99, "needy reads 99 tokens"), decoder=Need(True, "needy wants a decoder"))

    try:
        learned = read_experiment(BASE, {"objective": "needy", "model.positions": "learned"})
        with pytest.raises(zoo.UsageError, match=r"do not go together: mqar has no .*; needy wants a decoder"):
            learned.build()
        both = read_experiment(learned, {"task": {"name": "compression"}})
        assert (both.build().model.decoder, both.build().model.max_len) == (True, 99)
        with pytest.raises(zoo.UsageError, match=r"^model.max_len=98 is too small: needy reads 99 tokens.$"):
            read_experiment(both, {"model.max_len": 98}).build()
    finally:
        del objectives._classes["needy"]


def test_variants(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = BASE | {"train": {"steps": 5}, "variants": {"a": {"model.d_model": 32}, "b": {"train": {"lr": 0.1}}}}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    found = read_experiments("mine.yaml", {"train.steps": 7})
    assert {k: (str(e.folder), e.train.steps, e.train.lr) for k, e in found.items()} == {
        "a": ("runs/mine/a", 7, 3e-3),
        "b": ("runs/mine/b", 7, 0.1),
    }
    assert str(read_experiment("mine.yaml", {"out": "x"}, "b").folder) == "x/b"
    with pytest.raises(zoo.UsageError, match=r"name one of: a, b"):
        read_experiment("mine.yaml")
    with pytest.raises(zoo.UsageError, match=r"Unknown variant 'c'. Available: a, b"):
        read_experiment("mine.yaml", variant="c")


@pytest.mark.parametrize(
    "overrides",
    [{"model.pattern": "gru"}, {"model.family": "mamba2-tiny"}, {"model": {"pattern": "gru"}}, {"model": "gru"}],
)
def test_one_model_for_variants_that_differ_in_theirs(overrides):
    variants = {"a": {"model.pattern": "mha"}, "b": {"model": {"pattern": "lstm"}}, "c": {"model": "mlstm"}}
    recipe = BASE | {"variants": variants}
    with pytest.raises(zoo.UsageError, match=r"makes all 3 variants the same model: name one by --variant\.$"):
        read_experiments(recipe, overrides)
    with pytest.raises(zoo.UsageError, match=r"all 2 variants .*: override words.mixer, or name one by --variant\.$"):
        read_experiments(recipe | {"words": {"mixer": "lstm"}}, overrides, ["a", "c"])
    same = read_experiments(BASE | {"variants": {**variants, "d": {"train.lr": 0.1}}}, overrides)
    assert [read_experiment(recipe, overrides, name).model for name in "abc"] == [same[name].model for name in "abc"]
    assert set(same) == set("abcd")


def test_one_of_the_two_sizes_takes_the_place_of_the_other():
    narrow = read_experiment(BASE, {"model.d_model": 32})
    solved = read_experiment(narrow, {"model.n_parameters": 20_000}).build().model
    with torch.device("meta"):
        assert 18_000 < zoo.create_model(solved).n_parameters() <= 20_000
        wider = solved.model_copy(update={"d_model": solved.d_model + 2})
        assert zoo.create_model(wider).n_parameters() > 20_000
    budget = read_experiment(BASE, {"model": {"n_parameters": 20_000}})
    assert budget.build().model == solved
    assert read_experiment(budget, {"model.d_model": 32}).build().model.d_model == 32
    assert read_experiment(budget, {"model": {"d_model": 32}}).build().model.d_model == 32
    assert read_experiment(budget, {"model.n_parameters": 40_000}).build().model.d_model > solved.d_model
    assert read_experiment(budget, {"model.dropout": 0.1}).build().model.d_model == solved.d_model
    recipe = BASE | {"variants": {"a": {"model.d_model": 32}, "b": {}}}
    found = read_experiments(recipe, {"model.n_parameters": 20_000})
    assert {e.build().model for e in map(found.get, "ab")} == {solved}


def test_a_run_has_the_width_that_was_solved():
    experiment = read_experiment(BASE, {"model.n_parameters": 20_000})
    config = experiment.resolved(experiment.build())
    assert config["model"]["d_model"] == experiment.build().model.d_model
    assert "n_parameters" not in config["model"]


def test_what_is_filled_in_counts():
    task = {"task": {"name": "event_xor"}, "model": "lstm"}
    for overrides in ({}, {"model.positions": "learned"}):
        config = read_experiment(task, {"model.n_parameters": 30_000, **overrides}).build().model
        assert config.time_feature
        with torch.device("meta"):
            assert 27_000 < zoo.create_model(config).n_parameters() <= 30_000


def test_words_of_a_recipe():
    recipe = {
        "task": BASE["task"],
        "words": {"mixer": "short_conv", "other": "mlp"},
        "model": {"pattern": "2*({mixer} {other})"},
    }
    pattern = "2*(short_conv mlp)"
    assert read_experiment(recipe).model["pattern"] == pattern
    assert read_experiment(recipe, {"words.mixer": "mha(n_heads=2)"}).model["pattern"] == "2*(mha(n_heads=2) mlp)"
    assert read_experiment(recipe, {"words": {"mixer": "lstm"}}).model["pattern"] == "2*(lstm mlp)"
    assert read_experiment(recipe, {"model.pattern": "mha"}).model["pattern"] == "mha"
    assert read_experiment(recipe, {"model.pattern": "{other} mha"}).model["pattern"] == "mlp mha"
    variants = {"a": {"model.pattern": "{other}"}, "b": {"words.other": "swiglu"}, "c": {"words.mixer": "gru"}}
    found = read_experiments(recipe | {"variants": variants}, {"words.mixer": "lstm"})
    assert [found[k].model["pattern"] for k in "abc"] == ["mlp", "2*(lstm swiglu)", "2*(lstm mlp)"]
    assert recipe["model"] == {"pattern": "2*({mixer} {other})"}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"words.mixr": "lstm"}, "Unknown word of this recipe 'mixr'. Did you mean 'mixer'? Available: mixer."),
        ({"words.mixer": 3}, "words.mixer=3 is not allowed: it should be a mixer"),
        ({"words": 3}, "words should be a mapping of names to mixers, not 3."),
        ({"words.mixer": "lstmm"}, "Unknown mixer 'lstmm'. Did you mean 'lstm'?"),
        ({"model.pattern": "{mix}"}, "Unknown word of this recipe 'mix'. Did you mean 'mixer'? Available: mixer."),
    ],
)
def test_wrong_words(overrides, told):
    recipe = {"task": BASE["task"], "words": {"mixer": "lstm"}, "model": {"pattern": "{mixer}"}}
    with pytest.raises(zoo.UsageError) as error:
        read_experiment(recipe, overrides).build()
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_without_words_has_none():
    with pytest.raises(zoo.UsageError, match=r"Unknown word of this recipe 'mixer'. Available: none."):
        read_experiment("mqar", {"words.mixer": "lstm"})


COMPARISONS = [name for name in list_recipes() if "words" in read_recipe(name)]


def test_comparisons_at_equal_parameters():
    assert set(COMPARISONS) >= {"depth-width", "experts", "heads", "hybrid-ratio"}
    for name in COMPARISONS:
        budget = read_recipe(name)["model"]["n_parameters"]
        for variant, experiment in read_experiments(name).items():
            with torch.device("meta"):
                found = zoo.create_model(experiment.build().model).n_parameters()
            assert 0.93 * budget < found <= budget, (name, variant)


@pytest.mark.parametrize("name", COMPARISONS)
def test_any_mixer_in_a_comparison(name):
    width = {"model.n_parameters": None, "model.d_model": 32}
    for experiment in read_experiments(name, {"words.mixer": "gla", **width}).values():
        asked = "{mixer}" in read_recipe(name)["variants"][experiment.name]["model.pattern"]
        assert ("gla" in experiment.build().model.pattern) == asked


LONGER = [*COMPARISONS, "cwm-tiny", "sudoku-4x4-objectives"]
SMALL = {"train.steps": 2, "train.batch_size": 2, "train.eval_rows": 4, "train.test_rows": 4, "train.threads": 1}


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        *((name, None) for name in ("mqar", "text")),
        *((name, 1) for name in LONGER),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in LONGER),
    ],
)
def test_recipes_run(name, variants, tmp_path):
    """All variants, or the first ones."""
    for experiment in list(read_experiments(name, {**SMALL, "out": str(tmp_path)}).values())[:variants]:
        result = zoo.train(experiment, quiet=True)
        assert (result.status, result.data["steps"]) == ("finished", 2)
        assert result.data["model"] == experiment.resolved(experiment.build())["model"]
        if "n_parameters" in experiment.model:
            assert result.data["n_parameters"] <= experiment.model["n_parameters"]


def test_a_width_for_the_state_of_the_task_s_rows():
    experiment = read_experiments("mqar", {"model.state_bytes": 30_000})[""]
    parts = experiment.build()
    model = zoo.create_model(parts.model)
    assert 25_000 < model.state_bytes(1, parts.objective.length) <= 30_000
    assert "d_model" not in experiment.model


WRONG = [
    ({"model.state_bytes": 9_000, "model.flops_per_token": 9}, "state_bytes=9000 and flops_per_token=9 are both given"),
    ({"model.n_parameters": 100}, "n_parameters=100 is too few: at d_model=16, the least, this model has "),
    ({"model.n_parameters": 9e4}, "model: n_parameters=90000.0 is not allowed"),
    ({"model.n_parameters": 90_000, "model.d_model": 64}, "d_model=64 and n_parameters=90000 are both given"),
    ({"trian.lr": 1}, "Unknown option of experiment 'trian'. Did you mean 'train'?"),
    ({"train.lrr": 1}, "Unknown option of train 'lrr'. Did you mean 'lr'?"),
    ({"train.lr": "fast"}, "train: lr='fast' is not allowed: it should be a valid number."),
    ({"train.steps": 1.5}, "train: steps=1.5 is not allowed"),
    ({"train.steps": True}, "train: steps=True is not allowed"),
    ({"train.optimizer": "adam"}, "'adam' is not allowed: it should be 'adamw', 'adam_atan2' or 'muon'. Did you mean"),
    ({"train.target": {"value": 1, "valeu": 1}}, "Unknown option of train.target 'valeu'. Did you mean 'value'?"),
    ({"train.target.metric": "accuracy"}, "train.target needs 'value'"),
    ({"train": 3}, "train=3 is not allowed"),
    ({"task.n_pair": 2}, "Unknown option of mqar 'n_pair'. Did you mean 'n_pairs'?"),
    ({"task": "mqarr"}, "Unknown task 'mqarr'. Did you mean 'mqar'?"),
    ({"task": 3}, "task=3 is not allowed"),
    ({"task.n_pairs": 40}, "n_pairs"),
    ({"task.seq_len": 17}, "seq_len"),
    ({"model.patern": "mha"}, "Unknown option of model 'patern'. Did you mean 'pattern'?"),
    ({"model.pattern": "mhaa"}, "Unknown mixer 'mhaa'. Did you mean 'mha'?"),
    ({"model.pattern": "mha(n_head=2)"}, "Unknown option of mha 'n_head'. Did you mean 'n_heads'?"),
    ({"model.pattern": "mha(n_heads=5)"}, "5"),
    ({"model.d_model": 15}, "d_model=15 is not allowed"),
    ({"model.vocab_size": 8}, "model.vocab_size=8 is too small: mqar needs 64"),
    ({"model.positions": "learned", "model.max_len": 8}, "model.max_len=8 is too small"),
    ({"model.causal": False}, "causal"),
    ({"model.causal": False, "model.pattern": "mha"}, "set model.causal=true"),
    ({"model.pattern": "100*(swiglu(d_hidden=16000000))"}, "parameters take 2,"),
    ({"model.pattern": "swiglu(d_hidden=100000000000000000000)"}, "it should be at most 16,777,216"),
    ({"model.pattern": "retention(expand_v=1e30)"}, "a size is beyond what any tensor can hold"),
    ({"model.pattern": "retention(expand_v=1e308)"}, "a size is beyond what any tensor can hold"),
    ({"model.family": "mamba2-tony"}, "Unknown model 'mamba2-tony'. Did you mean 'mamba2-tiny'?"),
    ({"objective": "next_tokne"}, "Unknown objective 'next_tokne'. Did you mean 'next_token'?"),
    ({"objective.smoothing": 1}, "Unknown option of next_token 'smoothing'. Did you mean 'label_smoothing'?"),
    ({"name": "a/b"}, "name='a/b' is not allowed"),
]


@pytest.mark.parametrize(("overrides", "told"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_options_are_told_in_one_line(overrides, told):
    with pytest.raises(zoo.UsageError) as error:
        read_experiment(BASE, overrides).build()
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [", "is not valid YAML"),
        ("- mqar", "should hold a mapping"),
        ("", "should hold a mapping"),
        ("model: mha", "experiment needs 'task'"),
        ("task: mqar\nmodel: mha\nvariants: 3", "variants should be a mapping"),
        ("task: mqar\nmodel: mha\nwords: 3", "words should be a mapping of names to mixers, not 3."),
        ("task: mqar\nmodel: {d_model: 32}", "model needs 'pattern'"),
        ("task: {seq_len: 64}\nmodel: mha", "with the key 'name'"),
        ("\x00", "this is no UTF-8 text"),
    ],
)
def test_wrong_recipe_files(tmp_path, text, told):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(zoo.UsageError) as error:
        read_experiment(path).build()
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_recipe():
    with pytest.raises(zoo.UsageError, match=r"Unknown recipe 'mqar-dmo'. Did you mean 'mqar-demo'\?"):
        read_experiment("mqar-dmo")
    with pytest.raises(zoo.UsageError, match=r"neither a recipe file nor a run folder"):
        read_experiment("missing/mine.yaml")


def test_read_task():
    assert read_task("mqar", {"vocab_size": 100}).vocab_size == 100
    assert read_task("mqar-demo", {"task.vocab_size": 100}).vocab_size == 100
    with pytest.raises(zoo.UsageError, match=r"Unknown task 'mqra'. Did you mean 'mqar'"):
        read_task("mqra")


def test_differing_names_nested_keys():
    assert differing({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 0}) == ["a.c", "d"]


def test_train_options_are_all_explained():
    """Every option of TrainConfig stands in its docstring."""
    for field in TrainConfig.model_fields:
        assert f"\n    {field}: " in inspect.getdoc(TrainConfig), field
