"""Law 12 over whole models: hooks, adapters, pruning, quantised layers and gradient checkpointing take effect."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.laws import assert_close, assert_close_gradients, noise, off_inits, spelled
from zoo.laws.openness import adapted, layers_of
from zoo.models.create import model_config
from zoo.ops.modules import bare
from zoo.protocol import Context

FAMILIES = zoo.list_models("*-tiny")
HYBRIDS = {
    "tied, with positions": ("gqa swiglu", {"tie_embeddings": True, "positions": "learned", "max_len": 32}),
    "streams": ("gated_deltanet shortcut(moe, swiglu)", {"residual": "hyper_connections"}),
    "manifold": ("mamba2 swiglu", {"residual": "mhc", "time_feature": True}),
    "side by side": ("(mamba | gqa) swiglu", {"norm": "rmsnorm_zero_centred", "embedding_norm": True}),
}


def of_new_words(families: list[str]) -> list[Any]:
    """Families; those whose words are all in ones before are slow, as the laws of the words hold them too."""
    seen: set[str] = set()
    found = []
    for name in families:
        config = model_config(name)
        words = {word for word in zoo.list_mixers() if re.search(rf"\b{word}\b", config.pattern)}
        words |= {"recursion"} if config.recursion is not None else set()
        found.append(pytest.param(name, marks=[pytest.mark.slow] if words <= seen else []))
        seen |= words
    return found


over_new_words = pytest.mark.parametrize("name", [*of_new_words(FAMILIES), *HYBRIDS])


def build(name: str) -> nn.Module:
    return copy.deepcopy(built(name))


@functools.cache
def built(name: str) -> nn.Module:
    """A model of which every test gets a copy."""
    torch.manual_seed(1)
    pattern, options = HYBRIDS.get(name, (name, {}))
    if name in HYBRIDS:
        options = {"d_model": 32, "vocab_size": 40, **options}
    return off_inits(zoo.create_model(pattern, **options)).double()


def tokens(steps: int = 12) -> Tensor:
    return torch.randint(0, 20, (2, steps), generator=torch.Generator().manual_seed(3))


def logits_and_loss(model: nn.Module) -> tuple[Tensor, Tensor]:
    context = Context()
    logits, _ = model(tokens(), None, context)
    return logits, (logits * noise(*logits.shape, seed=9)).mean() + sum(context.losses)


@over_new_words
def test_hooks_fire(name):
    model, called = build(name), []
    owners = {n: m for n, m in model.named_modules() if list(m.parameters(recurse=False)) and m is not model}
    for n, module in owners.items():
        module.register_forward_hook(lambda *_, n=n: called.append(n))
    model(tokens())
    unread = {"halting"} if getattr(model, "halting", None) is not None and not called.count("halting") else set()
    assert set(owners) - set(called) == unread


@over_new_words
def test_adapters(name):
    """An adapter around every linear layer and embedding, those of a tied head too, is a change of its weight."""
    model, expected = build(name), build(name)
    merged = layers_of(expected)
    found = adapted(model)
    logits, loss = logits_and_loss(model)
    with torch.no_grad():
        for layer, adapter in zip(merged.values(), found, strict=True):
            layer.weight += adapter.delta()
    wanted, wanted_loss = logits_and_loss(expected)
    assert_close(logits, wanted, 1e-9, "adapted")
    weights = [layer.weight for layer in merged.values()]
    grads = torch.autograd.grad(wanted_loss, weights, allow_unused=True, materialize_grads=True)
    loss.backward()
    floor = max(g.abs().max().item() for g in grads)
    for n, adapter, d_weight in zip(merged, found, grads, strict=True):
        d_up = d_weight @ adapter.down.mT if isinstance(adapter.base, nn.Linear) else d_weight.mT @ adapter.down.mT
        actual = torch.zeros_like(d_up) if adapter.up.grad is None else adapter.up.grad
        assert_close(actual, d_up, 1e-8, f"gradient of the adapter of {n}", floor)
    if model.causal:
        prompts = [[1, 2, 3], [4, 5]]
        generated = [m.generate(prompts, max_new_tokens=4) for m in (model, expected)]
        assert [g.tolist() for g in generated[0]] == [g.tolist() for g in generated[1]]


@pytest.mark.crossed("name", "use_reentrant")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@over_new_words
def test_checkpointing(name, use_reentrant):
    model = build(name).float()
    x = noise(2, 70, model.config.d_model).float().requires_grad_()

    def gradients(again: bool) -> list[Tensor]:
        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            context = Context()
            y, _ = model.backbone(x, None, context)
            return y, sum(context.losses, y.new_zeros(()))

        y, losses = checkpoint(forward, x, use_reentrant=use_reentrant) if again else forward(x)
        inputs = [x, *model.backbone.parameters()]
        for p in inputs:
            p.grad = None
        ((y * noise(*y.shape, seed=9).to(y)).sum() + losses).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in inputs]

    names = ["x", *(n for n, _ in model.backbone.named_parameters())]
    assert_close_gradients(gradients(True), gradients(False), 2e-5, "checkpointed", names)


@pytest.mark.parametrize("word", zoo.list_mixers(kind="sequence"))
def test_a_recursive_model_recomputes_every_word(word):
    step = word if not zoo.create_mixer(word, 32).causal else f"bidirectional({word})"
    grads = []
    for recompute in (False, True):
        torch.manual_seed(1)
        recursion = {"cycles": 2, "updates": 1}
        options = {"placement": "pre", "causal": False, "max_len": 12, "recursion": recursion}
        model = zoo.create_model(f"{step} swiglu", d_model=32, vocab_size=20, **options)
        model.recompute = recompute
        context = Context()
        logits, _ = model(tokens(), None, context)
        (logits.square().mean() + sum(context.losses)).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        names = [n for n, p in model.named_parameters() if p.grad is not None]
    assert_close_gradients(grads[1], grads[0], 2e-5, word, names)


@pytest.mark.parametrize("name", of_new_words(FAMILIES))
def test_derivatives(name):
    """Second derivatives of a family against differences, and the gradients of every row by torch.func in one go.

    Gradients of recursive models stop before the last cycle, and those of some loops before the last passes: these are
    no function's gradients, and second derivatives are refused.
    """
    model = build(name)
    inputs, rows, step = list(model.parameters()), tokens(), 1e-7

    def gradients(rows: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        loss = model(rows)[0].sin().mean()
        options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
        return torch.autograd.grad(loss, inputs, **options)

    def loss_of(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (row[None],))[0].sin().mean()

    values = {n: p.detach() for n, p in model.named_parameters()}
    by_row = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(values, rows)
    for i in range(len(rows)):
        assert_close_gradients([g[i] for g in by_row.values()], gradients(rows[[i]]), 1e-9, f"row {i}", list(values))
    if model.config.recursion is not None or "gradient=" in model.config.pattern:
        with pytest.raises(zoo.UsageError, match="second derivatives"):
            gradients(rows, create_graph=True)
        with pytest.raises(zoo.UsageError, match="second derivatives"):
            torch.func.jacrev(torch.func.grad(lambda row: loss_of(values | {"head.weight": row}, rows[0])))(
                values["head.weight"]
            )
        return
    directions = [noise(*p.shape, seed=i) for i, p in enumerate(inputs)]
    dot = sum((g * d).sum() for g, d in zip(gradients(rows, create_graph=True), directions, strict=True))
    product = torch.autograd.grad(dot, inputs, allow_unused=True, materialize_grads=True)
    ends = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for p, d in zip(inputs, directions, strict=True):
                p.add_(sign * step * d)
        ends.append(gradients(rows))
    expected = [(a - b) / (2 * step) for a, b in zip(ends[0], ends[1], strict=True)]
    floor = max(e.abs().max().item() for e in expected)
    for n, actual, wanted in zip(values, product, expected, strict=True):
        assert_close(actual, wanted, 1e-5, f"Hessian product of {n}", floor)


@pytest.mark.parametrize("word", zoo.list_mixers())
def test_every_parameter_gets_a_gradient_by_the_outputs_alone(word):
    """As DistributedDataParallel asks for, whose callers may leave `context.losses` out."""
    mixer = spelled(zoo.create_mixer(word, 32))
    mixer(noise(2, 70, 32).float())[0].sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("word", zoo.list_mixers())
def test_quantised_layers_run(word):
    """Dynamically quantised linear layers take the place of the others: 8 bits hold two digits."""
    torch.manual_seed(0)
    mixer = spelled(zoo.create_mixer(word, 32)).eval()
    x = noise(2, 12, 32).float()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(mixer), {nn.Linear}, dtype=torch.qint8)
        y, expected = quantised(x)[0], mixer(x)[0]
    assert y.isfinite().all()
    if word not in ("moe", "dsa", "nsa", "moba"):  # which choose by what is rounded
        assert (y - expected).norm() <= 0.1 * expected.norm()


def test_what_is_attached_is_seen():
    layer = nn.Linear(4, 4)
    assert bare(layer)
    attach = {
        "a hook": lambda m: m.register_forward_hook(lambda *_: None),
        "a hook before": lambda m: m.register_forward_pre_hook(lambda *_: None),
        "a backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
        "pruning": lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5),
        "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m),
        "a forward of its own": lambda m: setattr(m, "forward", lambda x: x),
        "a subclass of its weight": lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.as_subclass(Marked))),
    }
    for what, how in attach.items():
        other = copy.deepcopy(layer)
        how(other)
        assert not bare(other), what
    assert not bare(layer, cls=nn.Bilinear)
    assert not bare(type("Mine", (nn.Linear,), {})(4, 4))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not bare(layer), "a hook on all modules"
    handle.remove()
    assert bare(layer)


class Marked(Tensor):
    """A tensor of another kind, as of a library that quantises or shards."""


def test_hooks_on_all_modules_fire():
    model, called = zoo.create_model("gated_deltanet swiglu cfc swiglu", d_model=32, vocab_size=20), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        model(tokens())
    finally:
        handle.remove()
    owners = [m for m in model.modules() if list(m.parameters(recurse=False)) and m is not model]
    assert all(any(m is c for c in called) for m in owners)
