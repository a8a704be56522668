"""Batches in parts, layers that are computed again, bfloat16 weights, Muon's own options, a later average."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import zoo
from zoo import tasks
from zoo.core.errors import UsageError
from zoo.objectives.base import create_objective, figures, objectives
from zoo.objectives.next_token import NextToken
from zoo.training.fit import fit
from zoo.training.loop import Trainer
from zoo.training.optimizer import Average, Optimizer
from zoo.training.options import as_section
from zoo.training.stopping import Interrupted
from zoo.training.train_options import TrainConfig

SUDOKU = {"name": "sudoku", "size": 4}
MQAR = {"name": "mqar", "seq_len": 16, "n_pairs": 2}
RECURSIVE = {"causal": False, "placement": "post", "recursion": {"cycles": 2, "updates": 2, "max_steps": 3}}
TEACHES = {
    "next_token": (MQAR, "mamba2 gqa swiglu", {}),
    "fill_in": (SUDOKU, "gqa swiglu", {}),
    "masked_diffusion": (SUDOKU, "gqa swiglu", {"causal": False}),
    "deep_supervision": (SUDOKU, "token_mlp(norm_axis='time') swiglu", RECURSIVE),
    "q": (SUDOKU, "gqa swiglu", RECURSIVE),
    "regression": ({"name": "oscillators", "n_steps": 20, "min_steps": 12}, "gru swiglu", {}),
    "classification": ({"name": "digits"}, "lstm swiglu", {}),
}
QUICK = ("masked_diffusion", "deep_supervision", "regression")
"""Those that are trained in the fast tests too."""
OBJECTIVES = {
    "next_token": {"name": "next_token", "label_smoothing": 0.1},
    "fill_in": "next_token",
    "masked_diffusion": {"name": "masked_diffusion", "prompt_dropout": 0.3},
    "deep_supervision": {"name": "deep_supervision", "random_start": True, "exploration": 0.5},
    "q": {"name": "deep_supervision", "halting": "q"},
    "regression": {"name": "regression", "huber": 0.5},
    "classification": "classification",
}
TRAIN = {
    "steps": 6,
    "batch_size": 6,
    "eval_every": 3,
    "eval_rows": 8,
    "test_rows": 8,
    "log_every": 1,
    "warmup_steps": 1,
    "threads": 1,
    "checkpoint_every": 2,
}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def taught(kind: str, parts: int, batches: int = 3):
    """The gradients, losses and figures of some batches, and what was carried, with a step of descent after each."""
    task, pattern, options = TEACHES[kind]
    fitted = fit(task, as_section("objective", OBJECTIVES[kind]), {"pattern": pattern, "d_model": 16, **options})
    task, objective = fitted.task, fitted.objective
    torch.manual_seed(0)
    model = zoo.create_model(fitted.model).train()
    carry, generator, found = {}, torch.Generator().manual_seed(1), []
    for step in range(batches):
        rows = task.sample(7, split="train", seed=0, start=7 * step)
        data = objective.encode(rows)
        if "next_token" in str(OBJECTIVES[kind]):
            kept = torch.rand(len(data.positions), generator=torch.Generator().manual_seed(step)) < 0.7
            data = data._replace(positions=data.positions[kept], targets=data.targets[kept])
        given = {"parts": parts} if parts > 1 else {}
        updates = []
        for update in objective.updates(model, data, carry, generator, **given):
            update.loss.backward()
            updates.append(update.light())
        assert [u.last for u in updates] == [False] * (parts - 1) + [True]
        assert sum(u.share for u in updates) == pytest.approx(1)
        scored = [len(u.targets) for u in updates]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        found.append((sum(u.loss for u in updates), figures(updates), gradients, copy.deepcopy(carry)))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
                p.grad = None
    return found, scored


@pytest.mark.crossed("parts", "kind")
@pytest.mark.parametrize("parts", [3, 2, 7])
@pytest.mark.parametrize("kind", TEACHES)
def test_parts_have_the_gradient_of_the_whole_batch(kind, parts, float64):
    """Parts with unequal numbers of scored positions; what is carried belongs to its row."""
    whole, _ = taught(kind, 1)
    cut, scored = taught(kind, parts)
    if kind in ("next_token", "fill_in", "masked_diffusion", "regression"):
        assert len(set(scored)) > 1 or parts == 2
    for (loss, figure, gradients, carry), (loss_2, figure_2, gradients_2, carry_2) in zip(whole, cut, strict=True):
        assert loss_2.item() == pytest.approx(loss.item(), rel=1e-12)
        assert figure_2 == pytest.approx(figure, rel=1e-6)
        size = torch.cat([g.flatten() for g in gradients]).norm()
        for a, b in zip(gradients, gradients_2, strict=True):
            assert (a - b).norm() <= 1e-12 * size
        assert carry.keys() == carry_2.keys()
        for name, value in carry.items():
            torch.testing.assert_close(carry_2[name], value, rtol=1e-10, atol=1e-12)


def test_a_row_without_scored_positions_may_be_a_part_of_its_own(float64):
    task = tasks.create_task(MQAR)
    objective = create_objective("next_token", task)
    model = zoo.create_model("gqa swiglu", d_model=16, vocab_size=objective.vocab_size)
    data = objective.encode(task.sample(4, split="train", seed=0))
    kept = data.positions >= data.tokens.shape[1]  # none of the first row
    data = data._replace(positions=data.positions[kept], targets=data.targets[kept])
    gradients = []
    for parts in (1, 4):
        for update in objective.updates(model, data, {}, torch.Generator(), parts):
            update.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


def experiment(out: str = "run", kind: str = "next_token", **train):
    task, pattern, options = TEACHES[kind]
    model = {"pattern": pattern, "d_model": 16, **options}
    return {"task": task, "model": model, "objective": OBJECTIVES[kind], "out": out, "train": {**TRAIN, **train}}


def records(run: str) -> list[dict]:
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def weights(run: str, step: int = 6) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(run, f"checkpoints/step_{step}/weights.safetensors"))


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in TEACHES])
def test_a_run_in_parts_is_the_run_of_whole_batches(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.train(experiment("whole", kind), quiet=True)
    zoo.train(experiment("parts", kind, accumulate=4), quiet=True)
    for whole, parts in zip(records("whole"), records("parts"), strict=True):
        assert parts.keys() == whole.keys()
        bound = 1e-4 if whole["step"] == 1 else 2e-2
        assert parts["loss"] == pytest.approx(whole["loss"], rel=bound)
        if whole["step"] == 1:
            assert {k: v for k, v in parts.items() if k != "split"} == pytest.approx(
                {k: v for k, v in whole.items() if k != "split"}, rel=bound
            )


def test_an_objective_that_reads_a_batch_whole_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Whole(NextToken):
        def updates(self, model, data, carry, generator):
            yield from super().updates(model, data, carry, generator)

    with monkeypatch.context() as patch:
        patch.setitem(objectives._classes, "whole", Whole)
        patch.setattr(Whole, "name", "whole")
        whole = {**experiment(accumulate=2), "objective": {"name": "whole"}}
        with pytest.raises(UsageError, match=r"accumulate=2 is not allowed: the objective whole reads a batch whole"):
            zoo.train(whole, quiet=True)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"accumulate": 7}, "every part needs one"),
        ({"accumulate": 0}, "greater than or equal to 1"),
        ({"ema_start": 3}, "belongs to train.ema"),
        ({"ema_start": 6, "ema": 0.9}, "before the average would start"),
        ({"parameters": "bfloat16", "precision": "float32"}, "leave out train.precision"),
        ({"parameters": "bfloat16", "beta2": 0.999}, "beta2=0.999 is too large"),
        ({"parameters": "float16"}, "'float32' or 'bfloat16'"),
        ({"muon_scaling": "orginal"}, "Did you mean 'original'"),
        ({"newton_schulz_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options, told):
    with pytest.raises(UsageError, match=told):
        TrainConfig(**{**TRAIN, **options})


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "pattern",
    [
        "rwkv7 moe(balance='both') mamba2 | gqa swiglu",
        "shortcut(moe, swiglu mla) lstm",
        "loop(2, rwkv7 shortcut(moe(balance='both'), gru swiglu), inject='add', exit=0.5, gradient=1)",
    ],
)
def test_recomputing_gives_the_same_bits(pattern, precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, more in (("plain", {}), ("again", {"recompute": True})):
        run = experiment(out, precision=precision, ema=0.9, steps=4, **more)
        run["model"] = {"pattern": pattern, "d_model": 16, "dropout": 0.2}
        zoo.train(run, quiet=True)
    plain, again = (weights(run, 4) for run in ("plain", "again"))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert records("plain") == records("again")


@pytest.mark.parametrize("word", zoo.list_mixers())
def test_every_word_is_recomputed_to_the_same_bits(word):
    causal = zoo.create_mixer(word, 32).causal
    length = {} if causal else {"max_len": 8}
    if word != "token_mlp":
        length = {}
    torch.manual_seed(0)
    model = zoo.create_model(f"{word} {word}", d_model=32, vocab_size=11, causal=causal, **length).train()
    tokens = torch.randint(11, (2, 8))
    found = []
    for recompute in (False, True):
        other = copy.deepcopy(model)
        other.recompute = recompute
        context = zoo.Context()
        logits, _ = other(tokens, None, context)
        (logits.square().mean() + sum(context.losses)).backward()
        found.append([p.grad for p in other.parameters()] + list(other.buffers()))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_activations_are_not_kept():
    """Bytes that autograd saves of a pass: with `recompute` of one layer's input, not of its insides."""
    sizes = {}
    for recompute in (False, True):
        model = zoo.create_model("8*(mamba2 swiglu)", d_model=32, vocab_size=11).train()
        model.recompute = recompute
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randint(11, (4, 64)))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes[recompute] = sum(size for place, size in kept.items() if place not in own)
    assert sizes[True] * 5 < sizes[False]


def test_recompute_may_change_when_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.train(experiment("whole"), quiet=True)
    stop_at(monkeypatch, 3, experiment("cut"))
    zoo.train(experiment("cut", recompute=True), resume=True, quiet=True)
    assert records("cut") == records("whole")
    assert all(torch.equal(a, b) for a, b in zip(weights("cut").values(), weights("whole").values(), strict=True))


def stop_at(monkeypatch, step: int, run) -> None:
    """Train until Ctrl-C at a step."""
    original = Trainer._step

    def stepping(self, data):
        if self.at.step == step:
            self.stop.number = 2
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stepping)
        with pytest.raises(Interrupted):
            zoo.train(run, quiet=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("next_token", {"optimizer": "muon", "ema": 0.9, "ema_start": 2, "accumulate": 2}),
        ("masked_diffusion", {"optimizer": "adamw"}),
        ("deep_supervision", {"optimizer": "adam_atan2", "ema": 0.9, "accumulate": 3}),
    ],
)
def test_a_run_in_bfloat16_is_resumed_to_the_same_bits(kind, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"parameters": "bfloat16", "checkpoint_every": 1, **options}
    whole = zoo.train(experiment("whole", kind, **more), quiet=True)
    stop_at(monkeypatch, 3, experiment("cut", kind, **more))
    zoo.train(experiment("cut", kind, **more), resume=True, quiet=True)
    assert records("cut") == records("whole")
    ours, theirs = weights("cut"), weights("whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {w.dtype for n, w in theirs.items() if "e_score" not in n} == {torch.bfloat16}
    assert whole.data["precision"] == "bfloat16"
    kept = torch.float32 if "ema" in options else torch.bfloat16
    assert {p.dtype for p in zoo.load("whole").parameters()} == {kept}
    state = torch.load("whole/checkpoints/step_6/training.pt", weights_only=True)["optimizer"]
    moments = [v for part in state for each in part["state"].values() for k, v in each.items() if k != "step"]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    from zoo.training.evaluation import evaluate_run

    score = evaluate_run("whole", split="test")
    assert score["loss"] == pytest.approx(whole.data["test"]["loss"], rel=1e-6)


def matrices(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 32)
    before = model.weight.detach().clone()
    config = TrainConfig(optimizer="muon", warmup_steps=0, schedule="constant", clip=None, lr=0.1, **options)
    optimizer = Optimizer(model, config)
    for _ in range(3):
        model.weight.grad = torch.randn(32, 16, generator=torch.Generator().manual_seed(7))
        optimizer.step(0)
    return before, model.weight.detach(), optimizer


def test_options_of_muon_reach_it():
    _, plain, optimizer = matrices()
    (part,) = [p for p in optimizer.parts if isinstance(p, torch.optim.Muon)]
    group = part.param_groups[0]
    assert (group["weight_decay"], group["momentum"], group["nesterov"], group["ns_steps"]) == (0.1, 0.95, True, 5)
    for options in (
        {"muon_weight_decay": 0.0},
        {"momentum": 0.5},
        {"nesterov": False, "momentum": 0.5},
        {"newton_schulz_steps": 2},
        {"muon_scaling": "original"},
    ):
        assert not torch.equal(matrices(**options)[1], plain), options
    before, after, _ = matrices(muon_weight_decay=0.0, muon_scaling="original")
    _, scaled, _ = matrices(muon_weight_decay=0.0)
    # sqrt(max(1, 32 / 16)) against 0.2 sqrt(32)
    torch.testing.assert_close((after - before) / 2**0.5, (scaled - before) / (0.2 * 32**0.5), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_starts_late(warmup):
    model = torch.nn.Linear(2, 2)
    late = Average(model, 0.9, warmup=warmup, start=3)
    fresh = None
    for step in range(8):
        if step == 3:
            fresh = Average(model, 0.9, warmup=warmup)
        with torch.no_grad():
            model.weight += torch.randn(2, 2)
        late.update(step)
        if fresh is None:
            assert torch.equal(late.module.weight, model.weight)
        else:
            fresh.update(step - 3)
            assert torch.equal(late.module.weight, fresh.module.weight)


def test_the_average_of_bfloat16_weights_is_finer_than_they_are():
    model = torch.nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    average = Average(model, 0.999, warmup=False)
    start = average.module.weight.clone()
    with torch.no_grad():
        model.weight += 1
    average.update(0)
    moved = average.module.weight - start
    assert average.module.weight.dtype is torch.float32
    torch.testing.assert_close(moved, torch.full_like(moved, 0.001), rtol=0.05, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["next_token", "q"])
def test_compiled_layers_are_recomputed_and_batches_cut(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.train(experiment("plain", kind, steps=2, precision="float32"), quiet=True)
    more = {"steps": 2, "precision": "float32", "compile": True, "recompute": True, "accumulate": 2}
    zoo.train(experiment("compiled", kind, **more), quiet=True)
    for plain, compiled in zip(records("plain"), records("compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
