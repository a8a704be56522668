"""The layer pattern: parsing and printing are exact inverses, and what is wrong is said in one line."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types as at
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zoo
from zoo.pattern import (
    Loop,
    LoopOptions,
    NormText,
    Parallel,
    Pattern,
    Repeat,
    Shared,
    SharedOptions,
    Shortcut,
    StepOptions,
    Word,
    from_data,
    make_loop,
    make_word,
    parse,
    swap,
    to_data,
    to_text,
)
from zoo.pattern.grammar import MAX_STEPS
from zoo.protocol import mixers, norms

settings.register_profile("zoo", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("zoo")

NAMES = mixers.names()
PLAIN = zoo.list_mixers()

# ---- random trees


def bounds(metadata: list[Any]) -> dict[str, Any]:
    """Limits that a pydantic field declares, as keyword arguments of hypothesis' number strategies."""
    limits: dict[str, Any] = {}
    for item in metadata:
        for part in item if isinstance(item, at.GroupedMetadata) else [item]:
            match part:
                case at.Ge(low):
                    limits["min_value"] = low
                case at.Gt(low):
                    limits |= {"min_value": low, "exclude_min": True}
                case at.Le(high):
                    limits["max_value"] = high
                case at.Lt(high):
                    limits |= {"max_value": high, "exclude_max": True}
    return limits


def values(annotation: Any, limits: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that an option of this type may take."""
    if get_origin(annotation) in (Union, types.UnionType):
        return st.one_of([values(a, limits) for a in get_args(annotation)])
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        return st.lists(values(get_args(annotation)[0], limits), min_size=1, max_size=3).map(tuple)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(limits.get("min_value", -9), limits.get("max_value", 999)).map(int)
    if annotation is float:
        return st.floats(**{"allow_nan": False, "allow_infinity": False, **limits})
    if annotation is str:
        return st.text()
    if annotation is Word:
        return st.sampled_from(PLAIN).map(lambda name: make_word(name, {}))
    raise AssertionError(f"no values known for {annotation}")


def options_of(model: type) -> st.SearchStrategy[dict[str, Any]]:
    fields = {
        name: st.sampled_from(norms.names())
        if f.annotation == NormText | None
        else values(f.annotation, {} if f.annotation is bool else bounds(f.metadata))
        for name, f in model.model_fields.items()
        if name not in getattr(model, "positional", ())
    }
    return st.just({}) | st.fixed_dictionaries({}, optional=fields)


@st.composite
def words(draw: st.DrawFn, names: list[str] = NAMES) -> Word:
    """A registered word with options its Config allows; one of its law cases where the draw does not fit together."""
    cls = mixers[draw(st.sampled_from(names))]
    step = draw(options_of(StepOptions))
    wrapped = {name: draw(words(PLAIN_STEPLESS)) for name in getattr(cls.Config, "positional", ())}
    try:
        return make_word(cls.name, {**wrapped, **draw(options_of(cls.Config)), **step})
    except zoo.UsageError:
        return make_word(cls.name, {**draw(st.sampled_from(cls.law_cases())), **step})


@st.composite
def loops(draw: st.DrawFn, body: st.SearchStrategy[Pattern]) -> Loop:
    """A loop with options that fit together; without any where the draw does not."""
    count, inside, options = draw(st.integers(1, 9)), draw(body), draw(options_of(LoopOptions))
    try:
        return make_loop(count, inside, options)
    except zoo.UsageError:
        return Loop(count, inside)


@st.composite
def blocks(draw: st.DrawFn, body: st.SearchStrategy[Pattern]) -> Shared:
    """A shared block whose name no other block has, since the steps and the options are part of it."""
    inside = draw(body)
    try:
        options = SharedOptions(**draw(options_of(SharedOptions)))
    except zoo.UsageError:
        options = SharedOptions()
    return Shared(f"{draw(st.text(max_size=3))} {inside} {options.given()}", inside, options)


PLAIN_STEPLESS = [name for name in PLAIN if mixers[name].kind == "sequence"]


def nodes(body: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Any]:
    return st.one_of(
        words(),
        st.lists(words(), min_size=2, max_size=3).map(lambda w: Parallel(tuple(w))),
        st.builds(Repeat, st.integers(1, 9), body),
        st.builds(Shortcut, words(), body),
        loops(body),
        blocks(body),
    )


def patterns_of(node: st.SearchStrategy[Any]) -> st.SearchStrategy[Pattern]:
    return st.lists(node, min_size=1, max_size=3).map(lambda found: Pattern(tuple(found)))


def with_uses(pattern: Pattern) -> Pattern:
    """The pattern, and one more use of each of its shared blocks by the name alone."""
    found = [step for step in pattern.unrolled() if isinstance(step, Shared)]
    return Pattern((*pattern.nodes, *(replace(block, short=True) for block in found)))


whole = st.recursive(patterns_of(words()), lambda body: patterns_of(nodes(body)), max_leaves=4)
patterns = whole | whole.map(with_uses)


@given(patterns)
@settings(max_examples=60)
def test_printing_and_parsing_are_inverses(pattern):
    text = to_text(pattern)
    assert parse(text) == pattern
    assert to_text(parse(text)) == text
    assert str(pattern) == text


@given(patterns)
@settings(max_examples=40)
def test_data_and_yaml_are_inverses(pattern):
    data = to_data(pattern)
    assert from_data(data) == pattern
    assert from_data(yaml.safe_load(yaml.safe_dump(data))) == pattern
    assert from_data(str(pattern)) == from_data(pattern) == pattern


TOKENS = [
    *NAMES[:4],
    "swiglu",
    "shortcut",
    "shared",
    "(",
    ")",
    "*",
    "|",
    ",",
    "=",
    "[",
    "]",
    "2",
    "-1",
    "0.5",
    "True",
    "None",
    '"a"',
    "window",
    "norm",
    "?",
]


texts = st.lists(st.sampled_from(TOKENS), max_size=12).map(" ".join) | st.text(max_size=12)


@given(texts)
@settings(max_examples=100)
def test_any_text_parses_or_is_refused_in_one_line(text):
    try:
        pattern = parse(text)
    except zoo.UsageError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017
    else:
        assert parse(to_text(pattern)) == pattern


def many(check, drawn, n):
    @given(drawn)
    @settings(max_examples=n)
    def checked(value):
        check(value)

    checked()


@pytest.mark.slow
def test_many_more_patterns_and_texts():
    for test, drawn, n in (
        (test_printing_and_parsing_are_inverses, patterns, 1000),
        (test_data_and_yaml_are_inverses, patterns, 300),
        (test_any_text_parses_or_is_refused_in_one_line, texts, 1000),
    ):
        many(test.hypothesis.inner_test, drawn, n)


# ---- what a text stands for

SWIGLU = make_word("swiglu", {})


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("swiglu", "swiglu"),
        ("  swiglu\n swiglu ", "swiglu swiglu"),
        ("(swiglu)", "swiglu"),
        ("(swiglu swiglu) swiglu", "swiglu swiglu swiglu"),
        ("2*swiglu", "2*(swiglu)"),
        ("2 * ( swiglu )", "2*(swiglu)"),
        ("swiglu | swiglu", "(swiglu | swiglu)"),
        ("2*(swiglu|swiglu)", "2*((swiglu | swiglu))"),
        ("2*(3*(swiglu) swiglu)", "2*(3*(swiglu) swiglu)"),
        ("swiglu (swiglu | swiglu)", "swiglu (swiglu | swiglu)"),
        ("swiglu (swiglu swiglu(bias = True))", "swiglu swiglu swiglu(bias=True)"),
        ("swiglu | swiglu (swiglu)", "(swiglu | swiglu) swiglu"),
        ("swiglu()", "swiglu"),
        ("swiglu(bias=False)", "swiglu(bias=False)"),
        ("swiglu(bias=True, d_hidden=40,)", "swiglu(d_hidden=40, bias=True)"),
        ("swiglu(d_hidden=None)", "swiglu(d_hidden=None)"),
        ("swiglu(in_scale=2)", "swiglu(in_scale=2.0)"),
        ("swiglu(in_scale=1e-3)", "swiglu(in_scale=0.001)"),
        ("swiglu(norm='layernorm')", 'swiglu(norm="layernorm")'),
        ("shortcut(swiglu, swiglu 2*swiglu)", "shortcut(swiglu, swiglu 2*(swiglu))"),
        ("shortcut(swiglu, shortcut(swiglu, swiglu))", "shortcut(swiglu, shortcut(swiglu, swiglu))"),
        ("2*shortcut(swiglu, swiglu)", "2*(shortcut(swiglu, swiglu))"),
        ("loop( 4,swiglu  swiglu )", "loop(4, swiglu swiglu)"),
        ("3*loop(2, loop(3, swiglu, gate=True))", "3*(loop(2, loop(3, swiglu, gate=True)))"),
        ("shared( 'a',swiglu  swiglu ) shared('a')", 'shared("a", swiglu swiglu) shared("a")'),
        ("2*shared('a b', swiglu, enters='next')", '2*(shared("a b", swiglu, enters="next"))'),
        ("loop(2, (swiglu | swiglu), exit=0.5, inject='add')", 'loop(2, (swiglu | swiglu), inject="add", exit=0.5)'),
    ],
)
def test_canonical_text(text, canonical):
    assert to_text(parse(text)) == canonical
    assert parse(canonical) == parse(text)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("swiglu", ["swiglu"]),
        ("swiglu(d_hidden=40)", [{"name": "swiglu", "d_hidden": 40}]),
        ("2*(swiglu swiglu)", [{"repeat": 2, "body": ["swiglu", "swiglu"]}]),
        ("(swiglu | swiglu(bias=True))", [{"parallel": ["swiglu", {"name": "swiglu", "bias": True}]}]),
        ("shortcut(swiglu, swiglu swiglu)", [{"shortcut": "swiglu", "body": ["swiglu", "swiglu"]}]),
        ("loop(4, swiglu, gate=True)", [{"loop": 4, "body": ["swiglu"], "gate": True}]),
        (
            'shared("a", swiglu, inject="add") shared("a")',
            [{"shared": "a", "body": ["swiglu"], "inject": "add"}, {"shared": "a"}],
        ),
    ],
)
def test_data(text, data):
    assert to_data(parse(text)) == data
    assert to_text(from_data(data)) == text


def test_data_takes_texts_and_single_steps():
    assert from_data(["2*swiglu", "swiglu | swiglu"]) == parse("2*(swiglu) (swiglu | swiglu)")
    assert from_data({"repeat": 2, "body": "swiglu swiglu"}) == parse("2*(swiglu swiglu)")
    assert from_data({"name": "swiglu", "bias": True}) == parse("swiglu(bias=True)")
    assert from_data({"parallel": ["swiglu"]}) == parse("swiglu")


DESIGN = {
    "4*(mamba2 swiglu)": "mamba2 swiglu " * 4,
    "3*(3*(gated_deltanet swiglu) gqa(n_kv_heads=2) moe(n_experts=8, top_k=2))": (
        "gated_deltanet swiglu gated_deltanet swiglu gated_deltanet swiglu gqa moe " * 3
    ),
    "6*(5*(swa(window=64) geglu) gqa geglu)": ("swa geglu " * 5 + "gqa geglu ") * 6,
    "8*((mamba2 | gqa) swiglu)": "mamba2 gqa swiglu " * 8,
    "4*(mla shortcut(moe, swiglu mla swiglu))": "mla moe swiglu mla swiglu " * 4,
    "mamba3 loop(4, gqa swiglu) mamba3": "mamba3 gqa swiglu mamba3",
    "3*(mamba2 swiglu) gqa swiglu": "mamba2 swiglu " * 3 + "gqa swiglu",
    "bidirectional(mamba2)": "bidirectional",
    "gqa(n_kv_heads=2)": "gqa",
}


@pytest.mark.parametrize(("text", "expected"), DESIGN.items(), ids=DESIGN)
def test_examples_of_the_design(text, expected):
    if missing := set(expected.split()) - set(NAMES):
        pytest.skip(f"not in the zoo yet: {', '.join(sorted(missing))}")
    pattern = parse(text)
    assert [word.name for word in pattern.words()] == expected.split()
    assert to_text(pattern) == text
    assert from_data(to_data(pattern)) == pattern


def test_steps_and_words_unroll():
    pattern = parse("2*(swiglu 2*swiglu(bias=True)) (swiglu | swiglu) shortcut(swiglu, 2*swiglu)")
    assert len(list(pattern.steps())) == 8
    assert len(list(pattern.words())) == 11
    assert [word.config.bias for word in pattern.words()][:6] == [False, True, True] * 2


def test_step_options_stand_beside_the_words_own():
    (word,) = parse('swiglu(d_hidden=40, placement="post", norm="none", norm_axis="channels", out_scale=0.5)').nodes
    assert word.config.changed() == {"d_hidden": 40}
    assert word.step.changed() == {"placement": "post", "norm": "none", "norm_axis": "channels", "out_scale": 0.5}


# ---- what is refused

LIST = ", ".join(NAMES)
SWIGLU_OPTIONS = (
    "d_hidden, bias, gate_scale, canon_d, adapter_rank, inner_norm, placement, norm, norm_axis, in_scale, out_scale"
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["mixer's name is missing", "at its end"]),
        ("   ", ["mixer's name is missing"]),
        ("swiglo", ["Unknown mixer 'swiglo'. Did you mean 'swiglu'?", f"Available: {LIST}."]),
        ("2*(swiglu swigul)", ["Unknown mixer 'swigul'. Did you mean 'swiglu'?", LIST]),
        ("zzzzzzzz", ["Unknown mixer 'zzzzzzzz'. Available:", LIST]),
        ("swiglu(d_hiden=4)", ["Unknown option of swiglu 'd_hiden'. Did you mean 'd_hidden'?", SWIGLU_OPTIONS]),
        ("swiglu(d_hidden=4.0)", ["swiglu: d_hidden=4.0 is not allowed", "integer"]),
        ("swiglu(d_hidden=True)", ["swiglu: d_hidden=True is not allowed", "integer"]),
        ("swiglu(d_hidden=0)", ["swiglu: d_hidden=0 is not allowed", "greater than or equal to 1"]),
        ('swiglu(bias="yes")', ["swiglu: bias='yes' is not allowed", "boolean"]),
        (
            'swiglu(placement="pst")',
            ["placement='pst' is not allowed", "'pre', 'post', 'sandwich' or 'output'", "Did you mean 'post'?"],
        ),
        ("swiglu(placement=post)", ["'post' is not a value", 'text is quoted: "post"']),
        ("swiglu(in_scale=[1])", ["in_scale=(1,) is not allowed"]),
        ("swiglu(bias=True, bias=True)", ["option 'bias' of swiglu is given twice"]),
        ("swiglu (bias=True)", ["options follow their word without a space", "'bias'"]),
        ("swiglu(40)", ["the name of an option of swiglu is missing", "'40'"]),
        ("swiglu(swiglu)", ["swiglu takes options as name=value only"]),
        ("swiglu(bias)", ["swiglu takes options as name=value only"]),
        ("swiglu(bias=)", ["a value is missing", "character 13"]),
        ("swiglu(bias=True", ["')' is missing to close swiglu(", "at its end"]),
        ("swiglu(d_hidden=[1", ["']' is missing to close ["]),
        ("(swiglu", ["')' is missing to close ("]),
        ("2*(swiglu", ["')' is missing to close 2*("]),
        ("swiglu)", ["nothing is open", "')'", "character 7"]),
        ("2 swiglu", ["'*' is missing after the count 2"]),
        ("0*(swiglu)", ["whole number of times from 1, not 0"]),
        ("-2*(swiglu)", ["whole number of times from 1, not -2"]),
        ("1.5*(swiglu)", ["whole number of times from 1, not 1.5"]),
        ("2*()", ["mixer's name is missing"]),
        ("*swiglu", ["mixer's name is missing", "'*'"]),
        ("swiglu |", ["mixer's name is missing"]),
        ("(swiglu swiglu) | swiglu", ["'|' joins single words, not groups"]),
        ("swiglu, swiglu", ["nothing is open", "','"]),
        ("swiglu ; swiglu", ["';' is not part of a pattern"]),
        ('swiglu(norm="layernorm)', ["is not part of a pattern"]),
        ("shortcut", ["'(' is missing after shortcut"]),
        ("shortcut(swiglu)", ["',' is missing between the branch and the body"]),
        ("shortcut(swiglu, )", ["mixer's name is missing"]),
        ("shortcut(swiglu, swiglu", ["')' is missing to close shortcut("]),
        (f"{MAX_STEPS + 1}*(swiglu)", [f"has {MAX_STEPS + 1:,} steps; at most {MAX_STEPS:,}"]),
        ("1000*(1000*(swiglu))", ["has 1,000,000 steps"]),
        (f"shortcut(swiglu, {MAX_STEPS}*(swiglu))", [f"at most {MAX_STEPS:,}"]),
        (  # 2^60 steps, which are counted block by block
            'shared("0", mlp)' + "".join(f' shared("{i}", shared("{i - 1}") shared("{i - 1}"))' for i in range(1, 61)),
            [f"steps; at most {MAX_STEPS:,}"],
        ),
        ("loop", ["'(' is missing after loop"]),
        ("loop(gqa, swiglu)", ["number of passes is missing: loop(n, body), at 'gqa'"]),
        ("loop(4)", ["',' is missing between the number of passes and the body"]),
        ("loop(4, )", ["mixer's name is missing"]),
        ("loop(4, swiglu", ["')' is missing to close loop("]),
        ("loop(4, swiglu, swiglu)", ["'=' is missing after the option swiglu"]),
        ("loop(4, swiglu, gate=True, gate=True)", ["option 'gate' of loop is given twice"]),
        ("loop(4, swiglu, gates=True)", ["Unknown option of loop 'gates'. Did you mean 'gate'?"]),
        ("loop(0, swiglu)", ["loop runs a whole number of times from 1", "not 0"]),
        ("loop(1.5, swiglu)", ["loop runs a whole number of times from 1", "not 1.5"]),
        (f"loop({MAX_STEPS}, 2*swiglu)", [f"at most {MAX_STEPS:,}"]),
        ("loop(4, swiglu) | swiglu", ["'|' joins single words, not nodes"]),
        ("swiglu | loop(4, swiglu)", ["loop(...) is a step of its own"]),
        ("bidirectional(loop(2, gru))", ["loop(...) is a step of its own"]),
        ('loop(4, swiglu, start="zeros")', ["without an inject never reads its input: set inject"]),
        ('loop(4, swiglu, start="carried")', ['start="carried" without an inject never reads its input']),
        ('loop(4, swiglu, inject="add", gradient=[2, 5])', ["gradient=[2, 5] is more than its passes, which are 4"]),
        ('loop(4, swiglu, inject="add", gradient=[0, 4])', ["gradient=[0, 4] lets no gradient through in a pass of"]),
        ('loop(4, swiglu, inject="add", gradient=0)', ["gradient=0 is not allowed", "greater than or equal to 1"]),
        ('loop(4, swiglu, inject="add", gradient=[-1, 4])', ["gradient=[-1, 4] is not allowed", "equal to 0"]),
        ('loop(4, swiglu, inject="add", gradient=[])', ["gradient=[] has no number"]),
        ("loop(4, swiglu, gradient=2)", ["lets no gradient through to the layers before the loop: set inject"]),
        ('loop(4, swiglu, inject="add", gradient=5)', ["gradient=5 is more than its passes, which are 4"]),
        ('loop(4, swiglu, inject="add", inject_rank=8)', ['inject_rank=8 belongs to inject="gated"']),
        ("loop(4, swiglu, depth_loss=0.1)", ["depth_loss=0.1 belongs to a halting head: set exit"]),
        ("loop(4, swiglu, exit=1.5)", ["exit=1.5 is not allowed", "less than or equal to 1"]),
        ("loop(1, swiglu, exit=0.5)", ["exit=0.5 needs at least 2 passes"]),
        ('loop(1, swiglu, inject="add")', ["inject='add' needs at least 2 passes"]),
        ("shared", ["'(' is missing after shared"]),
        ("shared(a, swiglu)", ["the name of the block is missing: shared(\"a\", body), at 'a'"]),
        ('shared(" ", swiglu)', ["takes a name and steps", "not ' '"]),
        ('shared("a", )', ["mixer's name is missing"]),
        ('shared("a", swiglu', ["')' is missing to close shared("]),
        ('shared("a", swiglu, swiglu)', ["'=' is missing after the option swiglu"]),
        ('shared("a", swiglu, enter="next")', ["Unknown option of shared 'enter'. Did you mean 'enters'?"]),
        ('shared("a")', ["shared('a') comes before its steps: write them at its first use."]),
        ('shared("b", mlp) shared("a")', ["shared('a') comes before its steps", "There are: 'b'."]),
        ('shared("a", swiglu shared("a"))', ["shared('a') comes before its steps"]),
        (
            'shared("a", swiglu) shared("a", mlp)',
            ['and shared("a", mlp) are two blocks of one name'],
        ),
        ('shared("a", swiglu shared("a", swiglu))', ["shared('a') stands within itself: a loop"]),
        ('shared("a", gqa, inject="wide")', ['inject="wide" gives no stream of its own', 'set enters="next"']),
        ('shared("a", gqa, out_proj=True)', ['out_proj=True belongs to enters="next"']),
        ('shared("a", swiglu) | swiglu', ["'|' joins single words, not nodes"]),
        ('bidirectional(shared("a", gru))', ["shared(...) is a step of its own"]),
        (f'shared("a", {MAX_STEPS}*swiglu)', [f"at most {MAX_STEPS:,}"]),
        ("(" * 3000 + "swiglu" + ")" * 3000, ["deep"]),
    ],
)
def test_refused_texts(text, parts):
    with pytest.raises(zoo.UsageError) as refusal:
        parse(text)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (None, ["A pattern is a text or a list of steps, not None"]),
        (3, ["A pattern is a text or a list of steps, not 3"]),
        ([], ["A pattern is a text or a list of steps, not []"]),
        ([3], ["A step is a word or a mapping, not 3"]),
        ([["swiglu"]], ["A step is a word or a mapping"]),
        ([{}], ["not one with the keys none"]),
        ([{"repeats": 2, "body": "swiglu"}], ["{repeat, body}", "repeats, body"]),
        ([{"repeat": 0, "body": "swiglu"}], ["repeat=0 is not allowed"]),
        ([{"repeat": True, "body": "swiglu"}], ["repeat=True is not allowed"]),
        ([{"repeat": 2, "body": []}], ["A pattern is a text or a list of steps"]),
        ([{"repeat": MAX_STEPS + 1, "body": "swiglu"}], [f"at most {MAX_STEPS:,}"]),
        ([{"parallel": []}], ["parallel", "[]"]),
        ([{"parallel": 3}], ["parallel", "3"]),
        ([{"parallel": "swiglu"}], ["parallel", "swiglu"]),
        ([{"parallel": ["swiglu", 3]}], ["A word is a text or a mapping with the key 'name', not 3"]),
        ([{"parallel": ["swiglu", "swiglu swiglu"]}], ["'swiglu swiglu' is a pattern of several steps"]),
        ([{"name": "swiglo"}], ["Did you mean 'swiglu'?"]),
        ([{"name": "swiglu", "d_hiden": 3}], ["Did you mean 'd_hidden'?", SWIGLU_OPTIONS]),
        ([{"name": "swiglu", "d_hidden": "40"}], ["d_hidden='40' is not allowed"]),
        ([{"shared": "a"}], ["shared('a') comes before its steps"]),
        ([{"shared": 3, "body": "swiglu"}], ["takes a name and steps", "not 3"]),
        (['shared("a", swiglu)', {"shared": "a", "inject": "add"}], ["without steps takes no options"]),
    ],
)
def test_refused_data(data, parts):
    with pytest.raises(zoo.UsageError) as refusal:
        from_data(data)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---- swap


def test_swap_keeps_the_rest_and_the_step_options():
    pattern = parse('2*(swiglu(out_scale=0.5, d_hidden=40)) shortcut(swiglu, (swiglu | swiglu(norm="none")))')
    swapped = swap(pattern, {"swiglu": 'swiglu(bias=True, norm="layernorm")'})
    assert to_text(swapped) == (
        '2*(swiglu(bias=True, norm="layernorm", out_scale=0.5)) '
        'shortcut(swiglu(bias=True, norm="layernorm"), '
        '(swiglu(bias=True, norm="layernorm") | swiglu(bias=True, norm="layernorm")))'
    )


def test_swap_changes_a_shared_block_at_all_its_uses():
    text = 'gqa shared("a", gqa swiglu) 2*(gru shared("a")) gqa'
    assert zoo.swap(text, {"gqa": "mha"}) == 'mha shared("a", mha swiglu) 2*(gru shared("a")) mha'
    assert zoo.swap(text, {"gqa": "mha"}, layers=[1]) == 'gqa shared("a", mha swiglu) 2*(gru shared("a")) gqa'
    assert zoo.swap(text, {"gqa": "mha"}, layers=[-1]) == 'gqa shared("a", gqa swiglu) 2*(gru shared("a")) mha'
    with pytest.raises(zoo.UsageError, match="layer 3 has no 'gqa'"):
        zoo.swap(text, {"gqa": "mha"}, layers=[3])
    again = '2*(gru shared("a", gqa))'
    assert zoo.swap(again, {"gru": "lstm"}, layers=[0]) == 'lstm shared("a", gqa) gru shared("a", gqa)'


def test_the_words_of_a_shared_block_are_read_once():
    pattern = parse('2*(gru shared("a", gqa 2*swiglu)) shared("a") loop(2, shared("b", mlp) shared("a"))')
    assert [word.name for word in pattern.words()] == ["gru", "gqa", "swiglu", "swiglu", "gru", "mlp"]
    assert pattern.depth() == 2 + 3 + 2


def test_texts_in_data_know_the_blocks_before_them():
    given = ['shared("a", gqa)', {"shared": "a"}, {"repeat": 2, "body": 'shared("a")'}]
    assert str(from_data(given)) == 'shared("a", gqa) shared("a") 2*(shared("a"))'


def test_swap_reaches_what_a_word_wraps():
    text = '2*(bidirectional(mamba2(d_state=8), combine="mean", norm="layernorm") swiglu)'
    expected = '2*(bidirectional(gla, combine="mean", norm="layernorm") swiglu)'
    assert zoo.swap(text, {"mamba2": "gla"}) == expected
    assert zoo.swap(text, {"bidirectional": "mha"}) == '2*(mha(norm="layernorm") swiglu)'


@pytest.mark.skipif(not {"gqa", "mha"} <= set(NAMES), reason="not in the zoo yet")
def test_swap_works_on_text_pattern_and_config():
    assert zoo.swap("2*(gqa swiglu)", {"gqa": "mha"}) == "2*(mha swiglu)"
    assert zoo.swap(parse("2*(gqa swiglu)"), {"gqa": "mha"}) == parse("2*(mha swiglu)")
    config = zoo.ModelConfig(pattern="2*(gqa swiglu)", vocab_size=7)
    assert zoo.swap(config, {"gqa": "mha"}) == zoo.ModelConfig(pattern="2*(mha swiglu)", vocab_size=7)
    options = {"pattern": ["gqa", "swiglu"], "vocab_size": 7}
    assert zoo.swap(options, {"gqa": "mha"}) == zoo.ModelConfig(pattern="mha swiglu", vocab_size=7)
    assert zoo.swap({"family": "llama3-tiny"}, {"gqa": "mha"}) == zoo.swap("llama3-tiny", {"gqa": "mha"})
    assert zoo.swap({"repeat": 2, "body": ["gqa"]}, {"gqa": "mha"}) == "2*(mha)"
    assert zoo.swap("gqa mha", {"gqa": "mha", "mha": "gqa"}) == "mha gqa"


def test_swap_keeps_a_budget_of_parameters():
    options = {"pattern": "gqa swiglu", "vocab_size": 7, "n_parameters": 50_000}
    swapped = zoo.swap(options, {"swiglu": "swiglu(d_hidden=16)"})
    assert swapped == zoo.create_model("gqa swiglu(d_hidden=16)", vocab_size=7, n_parameters=50_000).config
    assert swapped.d_model > zoo.create_model(options).config.d_model
    with pytest.raises(zoo.UsageError, match="d_model=64 and n_parameters=50000 are both given"):
        zoo.swap({**options, "d_model": 64}, {"gqa": "mha"})


def test_swap_refuses():
    with pytest.raises(
        zoo.UsageError, match=r"Unknown word of the pattern 'swigl'. Did you mean 'swiglu'\? Available: swiglu"
    ):
        zoo.swap("swiglu", {"swigl": "swiglu"})
    with pytest.raises(zoo.UsageError, match="several steps where one mixer is asked for"):
        zoo.swap("swiglu", {"swiglu": "swiglu swiglu"})
    with pytest.raises(zoo.UsageError, match="Unknown mixer 'swiglo'"):
        zoo.swap("swiglu", {"swiglu": "swiglo"})
    for words in (["swiglu"], None, {"swiglu": 5}):
        with pytest.raises(zoo.UsageError, match="swap takes a mapping of names to words"):
            zoo.swap("swiglu", words)
