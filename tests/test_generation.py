"""Generation: the same tokens whatever the batch, the chunks and the stops; samples that follow their distribution."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import zoo
from zoo.models.sampling import DRAWS, Choice
from zoo.protocol import mixers

VOCAB = 23
MODELS = {
    "attention": ("2*(gqa swiglu)", {}),
    "window": ("2*(swa(window=4) geglu)", {}),
    "latent": ("mla swiglu mla", {}),
    "recurrent": ("mamba2 lstm min_gru", {}),
    "delta": ("gated_deltanet rwkv7 rwkv_channel_mix", {}),
    "hybrid": ("mamba2 swa(window=3) (mha | short_conv) swiglu", {}),
    "experts": ("gqa moe(n_experts=4, top_k=2)", {}),
    "shortcut": ("gqa shortcut(swiglu, mlstm swiglu)", {}),
    "learned": ("mha swiglu", {"positions": "learned", "max_len": 40}),
    "sinusoidal": ("mha swiglu", {"positions": "sinusoidal", "tie_embeddings": True}),
}
over_models = pytest.mark.parametrize("name", MODELS)
SAMPLED = {"temperature": 1.5, "top_k": 9, "top_p": 0.9}


def model_of(name: str) -> zoo.models.Ends:
    """In float64, in which no rounding decides what is the most probable token, with logits that differ."""
    torch.manual_seed(0)
    pattern, options = MODELS[name]
    model = zoo.create_model(pattern, **{"d_model": 16, "vocab_size": VOCAB, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        (model.embedding.weight if model.head is None else model.head.weight).mul_(6)
    return model


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def by_hand(model: zoo.models.Ends, prompt: torch.Tensor, n: int) -> list[int]:
    """Greedy, each time from the whole text."""
    said = prompt.tolist()
    for _ in range(n):
        said.append(int(model(torch.tensor([said]))[0][0, -1].argmax()))
    return said


# ---- the same tokens


@over_models
def test_rows_are_what_each_prompt_gives_alone(name):
    model, prompts = model_of(name), prompts_of(1, 13, 5, 8)
    greedy = model.generate(prompts, 10)
    assert [row.tolist() for row in greedy] == [by_hand(model, p, 10) for p in prompts]
    sampled = model.generate(prompts, 10, generator=generators(4), **SAMPLED)
    for i, prompt in enumerate(prompts):
        alone = model.generate([prompt], 10, generator=generators(4)[i], **SAMPLED)
        assert torch.equal(sampled[i], alone[0])
    assert any(a.tolist() != b.tolist() for a, b in zip(greedy, sampled, strict=True))


@over_models
@pytest.mark.parametrize("chunks", [(1, 3, 7, 12), pytest.param((2, 4, 5, 6, 8, 9, 10, 11), marks=pytest.mark.slow)])
def test_prompts_are_read_in_chunks_of_any_size(name, chunks):
    model, prompts = model_of(name), prompts_of(7, 11, 2)
    expected = model.generate(prompts, 6, prefill_chunk=None)
    assert [row.tolist() for row in expected] == [by_hand(model, p, 6) for p in prompts]
    for chunk in chunks:
        for got, row in zip(model.generate(prompts, 6, prefill_chunk=chunk), expected, strict=True):
            assert torch.equal(got, row), chunk
    even = torch.stack(prompts_of(9)).expand(2, 9)
    assert torch.equal(model.generate(even, 4, prefill_chunk=4), model.generate(even, 4))


@over_models
def test_rows_that_end_early_leave_the_others_as_they_were(name):
    model, prompts = model_of(name), prompts_of(3, 9, 1, 6, 4)
    for options in ({}, {"generator": generators(5), **SAMPLED}):
        whole = model.generate(prompts, 12, **options)
        new = [row[len(p) :].tolist() for row, p in zip(whole, prompts, strict=True)]
        stops = [new[0][4], new[2][0], new[3][11]]
        if "generator" in options:
            options["generator"] = generators(5)
        ended = model.generate(prompts, 12, stop=stops, **options)
        expected = [row[: next((i + 1 for i, t in enumerate(row) if t in stops), 12)] for row in new]
        assert [row[len(p) :].tolist() for row, p in zip(ended, prompts, strict=True)] == expected
        assert len(expected[2]) == 1
        assert len(set(map(len, expected))) > 1


GENERATING = [n for n in zoo.list_mixers() if mixers[n].causal and not mixers[n].traits.couples_rows]


@pytest.mark.parametrize("name", GENERATING)
def test_every_mixer_can_be_generated_with(name):
    """Rows of unequal length, read in chunks, that leave the batch one after the other, against each alone by hand."""
    torch.manual_seed(1)
    prompts, n = prompts_of(4, 1, 7), 5
    model = zoo.create_model(f"short_conv {name}", d_model=16, vocab_size=VOCAB).double()
    with torch.no_grad():
        model.head.weight.mul_(6)
    whole = [by_hand(model.eval(), p, n) for p in prompts]
    stops = [whole[0][4 + 2], whole[1][1 + 4]]
    expected = []
    for row, p in zip(whole, prompts, strict=True):
        end = next((i + 1 for i in range(len(p), len(row)) if row[i] in stops), None)
        expected.append(row[:end])
    assert [row.tolist() for row in model.generate(prompts, n, stop=stops, prefill_chunk=3)] == expected


def test_a_row_that_has_ended_is_not_computed(monkeypatch):
    model, prompts = model_of("hybrid"), prompts_of(3, 9, 1, 6)
    new = [by_hand(model, p, 8)[len(p) :] for p in prompts]
    stops = [new[0][2]]
    lengths = [next((i + 1 for i, t in enumerate(row) if t in stops), 8) for row in new]
    sizes, step = [], model.step
    monkeypatch.setattr(model, "step", lambda tokens, state: sizes.append(len(tokens)) or step(tokens, state))
    model.generate(prompts, 8, stop=stops)
    assert sizes == [n for t in range(1, 8) if (n := sum(length > t for length in lengths))]
    assert sizes[-1] < 4


def test_all_rows_may_end_before_the_last_token(monkeypatch):
    model, (prompt,) = model_of("recurrent"), prompts_of(5)
    first = by_hand(model, prompt, 1)[-1]
    monkeypatch.setattr(model, "step", None)  # would be called for a second token
    assert model.generate([prompt], 10**9, stop=first)[0].tolist() == [*prompt.tolist(), first]
    assert model.generate(prompt[None], 10**9, stop=[first, first])[0].tolist() == [*prompt.tolist(), first]


def test_caches_grow_past_the_room_that_stop_tokens_leave(monkeypatch):
    monkeypatch.setattr("zoo.models.generation.ROOM", 2)
    model, prompts = model_of("attention"), prompts_of(3, 5)
    never = next(t for t in range(VOCAB) if all(t not in by_hand(model, p, 20)[len(p) :] for p in prompts))
    got = model.generate(prompts, 20, stop=never)
    assert [row.tolist() for row in got] == [by_hand(model, p, 20) for p in prompts]


# ---- streams


@pytest.mark.parametrize("options", [{}, {"generator": 3, **SAMPLED}])
def test_a_stream_gives_the_tokens_of_generate_one_step_at_a_time(options):
    model, prompts = model_of("hybrid"), prompts_of(4, 1, 8)

    def asked() -> dict:
        return {k: torch.Generator().manual_seed(v) if k == "generator" else v for k, v in options.items()}

    whole = model.generate(prompts, 9, **asked())
    stop = int(whole[1][3])
    expected = [row.tolist() for row in model.generate(prompts, 9, stop=stop, **asked())]
    got, before = [p.tolist() for p in prompts], [0, 1, 2]
    for rows, tokens in model.stream(prompts, 9, stop=stop, **asked()):
        assert set(rows.tolist()) <= set(before)
        before = rows.tolist()
        for row, token in zip(before, tokens.tolist(), strict=True):
            got[row].append(token)
    assert got == expected
    assert len(got[1]) < 10


def test_a_stream_computes_only_what_is_taken(monkeypatch):
    model, prompts = model_of("recurrent"), prompts_of(4)
    calls, step = [], model.step
    monkeypatch.setattr(model, "step", lambda *given: calls.append(1) or step(*given))
    stream = model.train().stream(prompts, 50)
    assert model.training, "nothing has been asked for yet"
    taken = [next(stream).tokens.item() for _ in range(3)]
    assert taken == by_hand(model.eval(), prompts[0], 3)[4:]
    assert len(calls) == 2
    stream.close()
    assert model.training, "as it was before the first token"


def test_tokens_and_the_model_are_fit_for_training():
    """What inference leaves behind can be differentiated through."""
    model = model_of("hybrid").train()
    (rows, tokens), *_ = model.stream(prompts_of(3, 4), 2)
    whole = model.generate(torch.stack(prompts_of(5)), 3)
    assert torch.is_grad_enabled()
    for given in (tokens[None], whole, model.generate(prompts_of(2), 1)[0][None]):
        model(given)[0].sum().backward()
        assert not given.is_inference()
    assert rows.tolist() == [0, 1]
    assert model.embedding.weight.grad is not None


# ---- samples


def frequencies(logits: torch.Tensor, n: int, **options) -> torch.Tensor:
    """Of n samples from one distribution."""
    choice = Choice(**{"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, **options})
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.bincount(choice.take(logits.expand(n, -1), uniform), minlength=logits.shape[-1]) / n


def expected_distribution(logits: torch.Tensor, temperature=1.0, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """The definition, one token at a time from the most probable on."""
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    held = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if top_p is not None and mass >= top_p:
            break
        mass += p[i] / held
        if min_p is None or p[i] >= min_p * p[order[0]]:
            kept.append(i)
    total = sum(p[i] for i in kept)
    return torch.tensor([p[i] / total if i in kept else 0.0 for i in range(len(p))])


OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 99},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.7, "temperature": 2.0},
    {"top_k": 6, "top_p": 0.95, "min_p": 0.1, "temperature": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_distribution(options):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    expected, n = expected_distribution(logits, **options), 20_000
    found = frequencies(logits, n, **options)
    assert (found[expected == 0] == 0).all()
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() <= 4 * spread).all()
    others = [expected_distribution(logits, **o) for o in OPTIONS]
    told_apart = [o for o in others if ((found - o).abs() > 4 * (o * (1 - o) / n).sqrt()).any()]
    same = [o for o in others if torch.allclose(o, expected)]
    assert len(told_apart) + len(same) == len(OPTIONS), "the bounds would let another distribution pass"


def test_no_uniform_number_draws_a_token_that_is_left_out():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    taken = [Choice(1.0, None, None, None).take(logits, u[None]).item() for u in uniform]
    assert taken == [1, 2]
    assert Choice(1e-12, None, None, None).take(torch.tensor([[1e30, 2e30]]), uniform[:1]).tolist() == [1]


def test_generated_tokens_follow_the_models_distribution():
    model, (prompt,) = model_of("recurrent"), prompts_of(3)
    n = 4000
    options = {"temperature": 2.0, "top_p": 0.8}
    got = model.generate(prompt.expand(n, 3), 1, generator=torch.Generator().manual_seed(0), **options)[:, -1]
    expected = expected_distribution(model(prompt[None])[0][0, -1].detach(), **options)
    found = torch.bincount(got, minlength=VOCAB) / n
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_a_row_does_not_depend_on_the_others():
    model, prompts = model_of("hybrid"), prompts_of(5, 2, 7, 3)
    n = DRAWS + 6  # more than are drawn at a time

    def sample(asked: list[torch.Tensor], seed: int = 0, **more) -> list[list[int]]:
        rows = model.generate(asked, n, temperature=2.0, generator=torch.Generator().manual_seed(seed), **more)
        return [row[len(p) :].tolist() for row, p in zip(rows, asked, strict=True)]

    whole = sample(prompts)
    assert sample(prompts) == whole
    assert sample(prompts[:2]) == whole[:2]
    assert sample([prompts_of(9)[0], *prompts[1:]])[1:] == whole[1:]
    assert [row[0] for row in sample(prompts, stop=whole[1][0])] == [row[0] for row in whole]
    assert sample(prompts, seed=1) != whole
    same = model.generate(prompts[0].expand(4, 5), n, temperature=2.0, generator=torch.Generator().manual_seed(0))
    assert len(set(map(tuple, same.tolist()))) == 4, "rows have streams of their own"


def test_without_a_generator_the_global_one_is_the_source():
    model, prompts = model_of("recurrent"), prompts_of(5)

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(prompts, 9, temperature=2.0)[0].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


# ---- memory


MEMORY = """
import sys, torch, zoo
from zoo.states import tree_bytes
from zoo.training.machine import peak_memory
torch.set_num_threads(1)
model = zoo.create_model(sys.argv[1], d_model=16, vocab_size=50)
n, chunk = int(sys.argv[2]), int(sys.argv[3])
model.generate(torch.zeros(1, 2000, dtype=torch.int64), 3, prefill_chunk=1000)  # loads all that is ever loaded
prompt = torch.randint(50, (1, n))
before = peak_memory(prompt.device)
result = model.generate(prompt, 3, prefill_chunk=chunk)
print(peak_memory(prompt.device) - before, result.nbytes + tree_bytes(model.init_state(1, capacity=n + 3)))
"""


def memory(pattern: str, n: int, chunk: int) -> tuple[int, int]:
    """What the peak of a process grows by to read n tokens, and what their state and the result hold, in bytes."""
    command = [sys.executable, "-c", MEMORY, pattern, str(n), str(chunk)]
    grown, held = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return grown, held


@pytest.mark.parametrize("n", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_tokens_need_the_memory_of_the_state(n):
    pattern, slack = "min_gru mamba2(d_state=8)", 4 << 20
    grown, held = memory(pattern, n, chunk=1000)
    assert grown < held + slack
    grown, held = memory(pattern, 50_000, chunk=50_000)
    assert grown > held + slack, "the bound would not see what 50,000 tokens take at once"


# ---- refusals


def test_several_ways_to_write_prompts():
    model = model_of("attention")
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = model.generate(torch.tensor(rows), 4)
    assert expected.shape == (2, 7)
    for prompts in (rows, [torch.tensor(row, dtype=torch.int32) for row in rows]):
        assert [row.tolist() for row in model.generate(prompts, 4)] == expected.tolist()
    assert model.generate(rows, 0) is not rows
    assert [row.tolist() for row in model.generate(rows, 0)] == rows
    assert list(model.stream(rows, 0)) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (torch.tensor([1, 2]), {}, "Prompts are (B, T), or a list of 1-D prompts; these have shape (2,)"),
        ([1, 2], {}, "a single one is written [prompt]"),
        ([[1.5]], {}, "Prompts are token ids, whole numbers, not float32"),
        ("hello", {}, "Prompts are token ids, whole numbers, not 'hello'."),
        (["hello", "you"], {}, "Prompts are token ids, whole numbers, not ['hello', 'you']."),
        (None, {}, "Prompts are token ids, whole numbers, not None."),
        ([[]], {}, "at least one prompt, each of at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "at least one prompt, each of at least one token"),
        ([[1]], {"stop": VOCAB}, f"Token {VOCAB} is not one of the vocab_size={VOCAB} ids"),
        ([[1]], {"stop": [3, -1]}, "Token -1 is not one of"),
        ([[1]], {"stop": "12"}, "stop='12' is not allowed: it should be a token id, or a list of them."),
        ([[1]], {"stop": None}, "stop=None is not allowed: it should be a token id, or a list of them."),
        ([[1]], {"temperature": None}, "temperature=None is not allowed: it should be a number."),
        ([[1]], {"top_p": "half", "temperature": 1.0}, "top_p='half' is not allowed: it should be a number."),
        ([[1]], {"temperature": float("nan")}, "temperature=nan is not allowed"),
        ([[1]], {"temperature": float("inf")}, "temperature=inf is not allowed"),
        ([[1]], {"top_k": 0, "temperature": 1.0}, "top_k=0 is not allowed: it should be a whole number from 1."),
        ([[1]], {"top_p": 0.0, "temperature": 1.0}, "top_p=0.0 is not allowed: it should be above 0 and at most 1."),
        ([[1]], {"top_p": 1.1, "temperature": 1.0}, "top_p=1.1 is not allowed"),
        ([[1]], {"min_p": -0.1, "temperature": 1.0}, "min_p=-0.1 is not allowed: it should be from 0 to 1."),
        ([[1]], {"top_k": 3}, "top_k=3 chooses among samples: give a temperature above 0 with it."),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not allowed: it should be a whole number from 0."),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk=0 is not allowed: it should be a whole number from 1."),
        ([[1], [2]], {"generator": generators(3), "temperature": 1.0}, "3 generators for 2 prompts"),
        ([[1, 2]], {"timespans": [[1.0]]}, "timespans should be one for every token"),
        ([[1, 2]], {"max_new_tokens": 40}, "2 prompt tokens and 40 new ones are more than max_len=40"),
    ],
)
def test_refused(prompts, options, message):
    model = model_of("learned")
    for method in (model.generate, model.stream):
        with pytest.raises(zoo.UsageError) as refusal:
            list(method(prompts, **{"max_new_tokens": 3, **options}))
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_stream_refuses_before_it_is_read():
    with pytest.raises(zoo.UsageError, match="top_k=0"):
        model_of("learned").stream([[1]], 3, temperature=1.0, top_k=0)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(options, bad):
    """Of which prompt and which new token is said; what was chosen before stays chosen."""
    model = model_of("attention")
    plain = model.logits
    calls = []

    def logits(hidden):
        calls.append(1)
        out = plain(hidden).clone()
        if len(calls) == 3:
            out[1, ..., 4] = bad
        return out

    model.logits = logits
    told = r"^The model's logits for new token 2 of prompt 1 are not finite: there is nothing to choose from\.$"
    stream, taken = model.stream(prompts_of(3, 5, 4), 6, **options), []
    with pytest.raises(zoo.UsageError, match=told):
        taken.extend(stream)
    assert [len(step.tokens) for step in taken] == [3, 3]
    calls.clear()
    with pytest.raises(zoo.UsageError, match=told):
        model.generate(prompts_of(3, 5, 4), 6, **options)
    assert model.training, "as it was before"


def test_minus_infinity_is_a_choice_left_out():
    model = model_of("attention")
    plain = model.logits
    model.logits = lambda hidden: plain(hidden).index_fill(-1, torch.tensor([1, 2]), -torch.inf)
    for options in ({}, {"temperature": 5.0}):
        assert not torch.isin(model.generate([[1]], 20, **options)[0][1:], torch.tensor([1, 2])).any()


WHOLE = [np.int64, np.int32, np.uint8, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int16)]


@pytest.mark.parametrize("whole", WHOLE)
def test_whole_numbers_of_any_type(whole):
    model, prompts = model_of("attention"), prompts_of(3, 5)
    for options in ({"max_new_tokens": 4}, {"max_new_tokens": 9, "stop": 3}, {"max_new_tokens": 9, "stop": [3, 5]}):
        same = {k: [whole(n) for n in v] if isinstance(v, list) else whole(v) for k, v in options.items()}
        for a, b in zip(model.generate(prompts, **same), model.generate(prompts, **options), strict=True):
            assert torch.equal(a, b)
    sampled = [
        model.generate(prompts, 4, temperature=1.0, top_k=n, prefill_chunk=n, generator=generators(2))
        for n in (2, whole(2))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*sampled, strict=True))


@pytest.mark.parametrize("name", ["max_new_tokens", "stop", "top_k", "prefill_chunk", "temperature", "top_p", "min_p"])
@pytest.mark.parametrize("truth", [True, np.bool_(True), torch.tensor(True), [True]])
def test_truth_is_no_number(name, truth):
    with pytest.raises(zoo.UsageError, match=rf"^{name}=.* is not allowed: it should be a .*\.$"):
        model_of("attention").generate([[1]], **{"max_new_tokens": 2, "temperature": 1.0, name: truth})
