"""YAML as recipes and overrides use it: what is a number and what a text, and what strangers may not do."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zoo
from zoo.core import yaml_text
from zoo.training.recipes import parse_value, read_experiment, read_experiments, read_recipe

READ: list[tuple[str, Any]] = [
    ("0100", 100),
    ("1:30", "1:30"),
    ("1:30:00", "1:30:00"),
    ("0o17", 15),
    ("0x1F", 31),
    ("100_000", 100_000),
    ("1__0", "1__0"),
    ("_1", "_1"),
    ("+5", 5),
    ("3e-4", 3e-4),
    ("1E3", 1000.0),
    (".5", 0.5),
    ("1.", 1.0),
    (".inf", math.inf),
    ("no", "no"),
    ("yes", "yes"),
    ("on", "on"),
    ("y", "y"),
    ("True", True),
    ("false", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("2024-02-30", "2024-02-30"),
    ("2024-99-99", "2024-99-99"),
    ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
    ("'5'", "5"),
    ("!!str 5", "5"),
    ("=", "="),
    ("<<", "<<"),
    ("\u0663", "\u0663"),  # a digit of another script
    ("{16: a, null: b, true: c, 1.5: d}", {"16": "a", "null": "b", "true": "c", "1.5": "d"}),
    ("{<<: {a: 1}}", {"<<": {"a": 1}}),
    ("- [a, {b: 1}]\n- - c", [["a", {"b": 1}], ["c"]]),
]


@pytest.mark.parametrize(("text", "value"), READ, ids=ascii)
def test_what_a_text_stands_for(text, value):
    found = yaml_text.load(text, "here")
    assert found == value
    assert type(found) is type(value)


BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))

REFUSED = [
    (BOMB, "aliases such as"),
    ("task: &a {name: mqar, x: *a}", "aliases such as"),
    ("[" * 3000, "nested deeper than 50"),
    ("- " * 3000 + "x", "nested deeper than 50"),
    ("{a: " * 3000, "nested deeper than 50"),
    ("9" * 5000, "5,000 digits"),
    ("0x" + "f" * 5000, "5,002 digits"),
    ("[" + "1, " * 30_000 + "]", "more than 20,000 values"),
    ("x" * 2**21, "characters; at most"),
    ('"a\\0b"', "NUL"),
    ("{a: 1, b: 2, a: 3}", "the key 'a' is given twice"),
    ("? [a]\n: b", "a key is a text"),
    ("? {a: b}\n: c", "a key is a text"),
    ("!!python/object/apply:os.system [true]", "the tag"),
    ("!!timestamp 2024-01-01", "the tag"),
    ("!!binary aGk=", "the tag"),
    ("!!set {a, b}", "the tag"),
    ("!!int x", "the tag"),
    ("!mine 5", "the tag"),
    ("a: b\n---\nc: d", "more than one document"),
]


@pytest.mark.parametrize(("text", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_strangers_may_not_do(tmp_path, text, told):
    started = time.perf_counter()
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    for read in (lambda: parse_value(text), lambda: read_recipe(path)):
        with pytest.raises(zoo.UsageError) as error:
            read()
        assert told in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    assert time.perf_counter() - started < 20


LINE_ENDS = ["\x85", "a\x85", "\u2028", "a\u2029\nb", "\r", "\r\n", "\n", " \n\n "]
texts = st.text(max_size=20) | st.sampled_from([text for text, _ in READ] + LINE_ENDS)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | texts
keys = texts.filter(lambda key: "\0" not in key)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # beside other jobs
@given(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=8))
def test_what_is_written_is_read_back(data):
    def possible(value: Any) -> Any:  # YAML has no NUL
        if isinstance(value, str):
            return value.replace("\0", "")
        if isinstance(value, list):
            return [possible(v) for v in value]
        return {k: possible(v) for k, v in value.items()} if isinstance(value, dict) else value

    data = possible(data)
    text = yaml_text.dump({"data": data})
    assert yaml_text.load(text, "here") == {"data": data}
    assert yaml.safe_load(text) == {"data": data}  # by any other reader too


BASE = {"task": {"name": "mqar", "vocab_size": 64, "seq_len": 16, "n_pairs": 2}, "model": {"pattern": "mha mlp"}}


def test_variants_may_have_numbers_for_names(tmp_path):
    path = tmp_path / "many.yaml"
    text = "task: mqar\nmodel: mha mlp\nvariants: {16: {model.d_model: 16}, 32: {model.d_model: 32}, null: , 0100: {}}"
    path.write_text(text)
    assert list(read_experiments(path)) == ["16", "32", "null", "0100"]
    assert read_experiment(path, variant="16").model["d_model"] == 16
    assert list(read_experiments({**BASE, "variants": {16: {"model.d_model": 16}}})) == ["16"]


HINTS = [
    ({"steps": 5}, "Did you mean 'train.steps'?"),
    ({"d_model": 32}, "Did you mean 'model.d_model'?"),
    ({"n_parameters": 1000}, "Did you mean 'model.n_parameters'?"),
    ({"n_pairs": 5}, "Did you mean 'task.n_pairs'?"),
    ({"label_smoothing": 0.1}, "Did you mean 'objective.label_smoothing'?"),
    ({"vocab_size": 5}, "Did you mean 'model.vocab_size' or 'task.vocab_size'?"),
    ({"train.target": 0.99}, "train: target=0.99 is not allowed: it should be a mapping of the keys metric, value"),
    ({"model.recursion": 3}, "it should be a mapping of the keys cycles, "),
    ({"train.compile": "yes"}, "it should be a boolean: true or false"),
    ({"name": "x" * 300}, "names may have 255 bytes"),
    ({"out": "a\0b"}, "NUL"),
    ({"variants": {"a": "b"}}, "variants.a is not allowed: it should be a mapping of keys to values"),
    ({"variants": {"a": {1: 2}}}, "Unknown option of experiment '1'"),
    ({"variants": [1]}, "variants should be a mapping"),
    ({"train.threads": 100_000}, "less than or equal to 1024"),
    ({"train.batch_size": 2**24}, "is too large: 16,777,216 rows of 16 tokens take"),
    ({"train.seed": 2**63}, "less than or equal to 9223372036854775807"),
]


@pytest.mark.parametrize(("wrong", "told"), HINTS, ids=[told for _, told in HINTS])
def test_the_likely_mistake_is_named(wrong, told):
    base = {**BASE, **wrong} if "variants" in wrong else BASE
    with pytest.raises(zoo.UsageError) as error:
        next(iter(read_experiments(base, {} if base is not BASE else wrong).values())).build()
    assert told in str(error.value)


@pytest.mark.parametrize("wrong", [{"train.optimizer": "lion"}, {"task": "nothere"}])
def test_no_guess_that_is_far_off(wrong):
    with pytest.raises(zoo.UsageError) as error:
        read_experiment(BASE, wrong).build()
    assert "Did you mean" not in str(error.value)


def test_the_recipe_to_start_from_has_no_clock():
    train = read_experiment("start").train
    assert (train.time_budget, train.target) == (None, None)
    assert train.schedule == "cosine"
