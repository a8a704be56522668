"""A prompt that is read in both directions, and what follows it from left to right (prefix-LM)."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.ops import attention
from zoo.protocol import Context

B, T = 4, 21
PREFIX = torch.tensor([0, 1, 9, 21])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def tensors(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("lengths", [None, torch.tensor([21, 3, 5, 17])])
@pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa", "auto"])
def test_the_op_is_the_mask_written_out(backend, lengths, past, window):
    q, k, v = (
        tensors(B, past + T, 4, 6).requires_grad_(),
        tensors(B, past + T, 2, 6, seed=1),
        tensors(B, past + T, 2, 6),
    )
    state = None
    with torch.no_grad():
        if past:
            _, state = attention(*(x[:, :past] for x in (q, k, v)), None, window=window)
    t = torch.arange(past + T)
    seen = t[:, None] >= t
    both = torch.arange(T)[None] < (PREFIX if lengths is None else torch.minimum(PREFIX, lengths))[:, None]
    both = torch.nn.functional.pad(both, (past, 0))
    seen = seen | (both[:, :, None] & both[:, None])
    if window is not None:
        seen = seen & ((t[:, None] - t).abs() < window)
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) * 6**-0.5
    p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bshv->bthv", p, v.repeat_interleave(2, 2))[:, past:]
    o, after = attention(
        *(x[:, past:] for x in (q, k, v)),
        state,
        window=window,
        lengths=lengths,
        prefix=PREFIX,
        chunk_size=8,
        backend=backend,
    )
    valid = torch.ones(B, T, dtype=torch.bool) if lengths is None else torch.arange(T) < lengths[:, None]
    close(o[valid], expected[valid])
    found = torch.autograd.grad(o[valid].sin().sum(), q, retain_graph=True)
    close(found[0][:, past:], torch.autograd.grad(expected[valid].sin().sum(), q)[0][:, past:])
    assert after.length.tolist() == ([past + T] * B if lengths is None else (past + lengths).tolist())


def model_of(pattern: str = "gqa swiglu swa(window=6) loop(2, mha swiglu)"):
    torch.manual_seed(0)
    return zoo.create_model(pattern, d_model=16, vocab_size=11).double()


TOKENS = torch.randint(11, (B, T), generator=torch.Generator().manual_seed(1))


def test_a_pass_is_cut_behind_the_prompts():
    model = model_of()
    whole, _ = model(TOKENS, None, Context(prefix=torch.tensor([0, 1, 9, 12])))
    state, found = model.init_state(B), []
    logits, state = model(TOKENS[:, :12], state, Context(prefix=torch.tensor([0, 1, 9, 12])))
    found = [logits]
    for t in range(12, T):
        logits, state = model.step(TOKENS[:, t], state)
        found.append(logits[:, None])
    close(torch.cat(found, 1), whole)


def test_the_prompt_sees_itself_and_nothing_behind():
    model = model_of()
    before, _ = model(TOKENS, None, Context(prefix=PREFIX))
    changed = TOKENS.clone()
    changed[2, 8] = (changed[2, 8] + 1) % 11  # the last step of a prompt of 9
    after, _ = model(changed, None, Context(prefix=PREFIX))
    moved = (before != after).any(-1)
    assert moved[2, 3:].all()
    assert not moved[[0, 1, 3]].any()
    changed = TOKENS.clone()
    changed[2, 9] = (changed[2, 9] + 1) % 11
    moved = (before != model(changed, None, Context(prefix=PREFIX))[0]).any(-1)
    assert moved[2].tolist() == [False] * 9 + [True] * 12
    rows = [model(TOKENS[i : i + 1], None, Context(prefix=PREFIX[i : i + 1]))[0] for i in range(B)]
    close(torch.cat(rows), before)
    close(before[:2], model(TOKENS)[0][:2])  # a prompt of one step, or of none


@pytest.mark.parametrize("chunk", [None, 3, 10])
@pytest.mark.parametrize("prefix", [True, 0, 4])
def test_a_generation_has_the_logits_of_one_pass_with_that_prefix(prefix, chunk, monkeypatch):
    """Of prompts of several lengths, each beside itself alone; the prompts are longer than a chunk."""
    model, new = model_of(), 6
    prompts = [TOKENS[0, :9], TOKENS[1, :4], TOKENS[2, :11]]
    said, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: said.append(logits(hidden)) or said[-1])
    found = model.generate(prompts, new, prefix=prefix, prefill_chunk=chunk)
    steps = torch.stack([each.reshape(len(prompts), -1) for each in said], 1)
    monkeypatch.undo()
    for row, prompt, own in zip(found, prompts, steps, strict=True):
        n = len(prompt)
        whole, _ = model(row[None, :-1], None, Context(prefix=torch.tensor([n if prefix is True else prefix])))
        close(own, whole[0, n - 1 :])
        assert torch.equal(whole[0, n - 1 :].argmax(-1), row[n:])
    plain = model.generate(prompts, new)
    assert all(map(torch.equal, found, plain)) == (prefix == 0)
    even = torch.stack([p[:4] for p in prompts])
    assert torch.equal(model.generate(even, new, prefix=True), torch.stack(model.generate(list(even), new, prefix=4)))


def test_a_prefix_by_the_command(tmp_path, capsys):
    model, prompt = model_of(), TOKENS[0, :9]
    zoo.save(model, tmp_path / "model")
    written, warm = [], ["--temperature", "1"]
    for words in ([], ["--prefix"]):
        with pytest.raises(SystemExit, match="0"):
            main(["generate", str(tmp_path / "model"), "--tokens", " ".join(map(str, prompt.tolist())), *words, *warm])
        written.append([int(token) for token in capsys.readouterr().out.split()])
    for prefix, said in zip((False, True), written, strict=True):
        seeded = torch.Generator().manual_seed(0)
        assert said == model.generate([prompt], 64, prefix=prefix, temperature=1.0, generator=seeded)[0][9:].tolist()
    assert written[0] != written[1]


@pytest.mark.parametrize(
    ("pattern", "prefix", "message"),
    [
        ("gqa mamba2", True, "prefix=True reads prompts in both directions, and mamba2 reads left to right only"),
        ("gqa", 10, "prefix=10 is not allowed: the shortest prompt has 9 tokens"),
        ("gqa", -1, "prefix=-1 is not allowed: it should be a whole number from 0"),
        ("gqa", 1.5, "prefix=1.5 is not allowed: it should be a whole number"),
    ],
)
def test_a_generation_refuses_a_wrong_prefix(pattern, prefix, message):
    with pytest.raises(zoo.UsageError, match=message) as refusal:
        model_of(pattern).generate([TOKENS[0], TOKENS[1, :9]], 2, prefix=prefix)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("word", [w for w in zoo.list_mixers(kind="sequence") if w not in ("mha", "mqa", "gqa", "swa")])
def test_other_words_refuse_a_prefix(word):
    mixer = zoo.create_mixer(word, d_model=16)
    if not mixer.causal:
        pytest.skip("looks ahead anyway")
    with pytest.raises(zoo.UsageError, match="reads left to right only, and the pass has a prefix") as refusal:
        mixer(
            torch.randn(1, 4, 16), None, Context(prefix=torch.tensor([2]), tokens=torch.zeros(1, 4, dtype=torch.int64))
        )
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("prefix", "more", "message"),
    [
        (torch.tensor([1, 2, 3, 22]), {}, "a prefix of 22 is not allowed: it should be from 0 to the 21 steps given"),
        (torch.tensor([1, 2]), {}, r"prefix is .*expected \(4,\) whole numbers on cpu, the prompt's steps of each row"),
        (PREFIX, {"resets": torch.zeros(B, T, dtype=torch.bool)}, "it does not go with packed documents"),
    ],
)
def test_a_wrong_prefix_is_refused(prefix, more, message):
    with pytest.raises(zoo.UsageError, match=message):
        model_of()(TOKENS, None, Context(prefix=prefix, **more))
