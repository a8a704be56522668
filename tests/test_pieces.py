"""Models whose sequences are cut over processes, which threads play: outputs, losses and gradients of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.benchmarks.studies.sequence_pieces import counted, predicted
from zoo.core.errors import UsageError
from zoo.objectives.base import create_objective, figures, joined
from zoo.pieces import Pieces, in_threads, piece_sizes
from zoo.protocol import Context

MODELS: dict[str, dict[str, Any]] = {
    "hybrid": {"pattern": "2*(gated_deltanet swiglu) gqa(n_kv_heads=2) swiglu"},
    "side by side": {"pattern": "(mamba2(d_state=8) | swa(window=7)) swiglu lstm"},
    "shortcut": {"pattern": "shortcut(mlp, mla swiglu) rwkv7 rwkv_channel_mix"},
    "learned positions": {"pattern": "mha mlp", "positions": "learned", "max_len": 64},
    "looped": {"pattern": "loop(2, gated_deltanet swiglu) loop(2, gqa mlp)"},
    "looking ahead": {"pattern": "gqa swiglu bidirectional(gla)", "causal": False},
    "windows looking ahead": {"pattern": "swa(window=4) swiglu", "causal": False},
}


def gradients(model: Any, tokens: torch.Tensor, resets: torch.Tensor | None, pieces: Pieces | None) -> list[Any]:
    """Logits, the loss, and the gradients of all parameters."""
    cut = slice(None) if pieces is None else pieces.steps
    context = Context(resets=None if resets is None else resets[:, cut], pieces=pieces)
    logits, _ = model(tokens[:, cut], None, context)
    following = tokens.roll(-1, 1)[:, cut]
    loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum") / tokens.numel()
    loss.backward()
    return [logits.detach(), loss.detach(), [p.grad for p in model.parameters()]]


DIFFUSION: dict[str, tuple[Any, dict[str, Any]]] = {
    "masked": ({"name": "masked_diffusion", "prompt_dropout": 0.5}, {}),
    "the step before": ("masked_diffusion", {"shifted_logits": True}),
    "uniform": ("uniform_diffusion", {}),
    "uniform from soft inputs": ({"name": "uniform_diffusion", "curriculum": {"batches": 9, "start": 0.1}}, {}),
    "uniform without times": ({"name": "uniform_diffusion", "time_bins": 0}, {}),
}


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("n", [2, 3])
def test_pieces_of_noisy_rows_have_the_loss_and_gradients_of_one_process(name, n):
    chosen, options = DIFFUSION[name]
    task = zoo.tasks.create_task("sudoku", size=4)
    objective = create_objective(chosen, task, causal=False)
    torch.manual_seed(0)
    model = zoo.create_model(
        "gqa swiglu", d_model=16, vocab_size=objective.vocab_size, causal=False, **options
    ).double()  # fmt: skip
    data = objective.encode(task.sample(6, split="train", seed=0))

    def learned(pieces: Pieces | None) -> list[Any]:
        own = copy.deepcopy(model)
        more = {} if pieces is None else {"pieces": pieces}
        found = list(objective.updates(own, data, {}, torch.Generator().manual_seed(3), parts=2, **more))
        torch.stack([update.loss for update in found]).sum().backward()
        return [found, [p.grad for p in own.parameters()]]

    alone, expected = learned(None)
    each = in_threads(n, objective.length, learned)
    for i, update in enumerate(alone):
        whole = joined([updates[i] for updates, _ in each])
        assert whole.loss.item() == pytest.approx(update.loss.item(), rel=1e-12)
        assert whole.share == pytest.approx(update.share)
        assert figures([whole]) == pytest.approx(figures([update]))
        assert len(whole.targets) == len(update.targets) > 0
    for i, gradient in enumerate(expected):
        total = torch.stack([gradients[i] for _, gradients in each if gradients[i] is not None]).sum(0)
        torch.testing.assert_close(total, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_over_pieces_agrees_with_one_process(name, recompute):
    torch.manual_seed(0)
    model = zoo.create_model({**MODELS[name]}, d_model=16, vocab_size=11).double()
    tokens = torch.randint(11, (2, 23))
    resets = torch.zeros(2, 23, dtype=torch.bool)
    resets[0, [0, 3, 12]] = resets[1, 17] = True
    expected = gradients(copy.deepcopy(model), tokens, resets, None)
    model.recompute = recompute
    parts = in_threads(3, 23, lambda pieces: gradients(copy.deepcopy(model), tokens, resets, pieces))
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), expected[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sum(part[1] for part in parts), expected[1], rtol=1e-9, atol=1e-10)
    for i, whole in enumerate(expected[2]):
        found = sum(part[2][i] for part in parts)
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-10)


def bytes_sent(pattern: str, length: int, n: int = 4, **options: Any) -> list[int]:
    model = zoo.create_model(pattern, d_model=32, vocab_size=11, **options)
    tokens = torch.zeros(1, length, dtype=torch.int64)

    def sent(pieces: Pieces) -> int:
        gradients(copy.deepcopy(model), tokens, None, pieces)
        return pieces.sent

    return in_threads(n, length, sent)


@pytest.mark.parametrize("word", ["gated_deltanet", "mamba2", "gla", "mamba", "mlstm", "rg_lru", "rwkv7", "short_conv"])
def test_bytes_of_a_recurrence_do_not_grow_with_the_length(word):
    assert bytes_sent(word, 64) == bytes_sent(word, 256) != [0, 0, 0, 0]


@pytest.mark.parametrize("word", ["gqa", "mla", "swa(window=9)", "mamba2", "gated_deltanet", "gla", "short_conv"])
def test_the_model_of_costs_predicts_the_bytes_that_are_counted(word):
    mixer = zoo.create_mixer(word, d_model=32)
    assert max(counted(word, 63, n=3, width=32)) == predicted(mixer, 63, 3)
    assert max(counted(word, 64, n=4, width=32)) == predicted(mixer, 64, 4)


def test_bytes_of_attention_grow_with_the_length_unless_a_window_ends_them():
    assert bytes_sent("gqa", 256) == [4 * x for x in bytes_sent("gqa", 64)]
    assert bytes_sent("swa(window=9)", 256) == bytes_sent("swa(window=9)", 64)
    # keys and values of 8 rows, 32 wide each, to the next process, again in the backward pass, and their gradients back
    assert bytes_sent("swa(window=9)", 64) == [2 * 8 * 64 * 4, 3 * 8 * 64 * 4, 3 * 8 * 64 * 4, 8 * 64 * 4]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pattern": "token_mlp swiglu", "causal": False, "max_len": 12}, "token_mlp: a sequence cannot be cut"),
        (
            {"pattern": "gqa swiglu(norm_axis='time')", "causal": False},
            'norm_axis="time" norms whole rows',
        ),
        (
            {"pattern": "gqa swiglu", "causal": False, "recursion": {}, "placement": "post"},
            "A recursive model reads whole",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(options, told):
    model = zoo.create_model(options, d_model=16, vocab_size=11)
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(zoo.UsageError, match=told):
        in_threads(2, 12, lambda pieces: model(tokens[:, pieces.steps], None, Context(pieces=pieces)))


def test_wrong_pieces_are_refused():
    model = zoo.create_model("gqa swiglu", d_model=16, vocab_size=11)
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(zoo.UsageError, match="3 steps cannot be cut into 4 pieces: every piece needs a step"):
        piece_sizes(3, 4)
    assert piece_sizes(11, 4) == (3, 3, 3, 2)
    for given, told in [
        ({"lengths": torch.tensor([6])}, "takes no lengths"),
        ({}, "12 steps, and piece 0 has 6 of the 12 steps that are cut into 2 pieces"),
    ]:
        with pytest.raises(zoo.UsageError, match=told):
            in_threads(2, 12, lambda pieces, given=given: model(tokens, None, Context(pieces=pieces, **given)))
    cut = lambda pieces: model(tokens[:, pieces.steps], model.init_state(1), Context(pieces=pieces))  # noqa: E731
    with pytest.raises(zoo.UsageError, match="starts from rest: give no state"):
        in_threads(2, 12, cut)


@pytest.mark.parametrize("pattern", ["gqa", "gated_deltanet", "lstm"])
def test_second_derivatives_over_pieces_are_refused(pattern):
    model = zoo.create_model(pattern, d_model=16, vocab_size=11)
    tokens = torch.zeros(1, 12, dtype=torch.int64)

    def twice(pieces: Pieces) -> None:
        own = copy.deepcopy(model)
        logits, _ = own(tokens[:, pieces.steps], None, Context(pieces=pieces))
        torch.autograd.grad(logits.square().sum(), list(own.parameters()), create_graph=True, allow_unused=True)

    with pytest.raises(UsageError, match="no second derivatives"):
        in_threads(2, 12, twice)
