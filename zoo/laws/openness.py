"""Law 12: hooks fire, adapters and pruning take effect, and gradient checkpointing changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from zoo.laws.book import F32, law
from zoo.laws.compare import (
    TOLERANCE,
    assert_close,
    assert_close_gradients,
    device_of,
    dtype_of,
    noise,
    parameter_names,
    random_like,
    require,
    spans,
)
from zoo.laws.patterns import is_evaluated
from zoo.protocol import Context, Mixer


class Adapter(nn.Module):
    """A layer of rank 2 beside a linear layer or an embedding, as in LoRA (Hu et al. 2021), with nothing at zero."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        weight = next(base.parameters())
        wide, out = (weight.shape[1], weight.shape[0]) if isinstance(base, nn.Linear) else weight.shape
        self.down = nn.Parameter(0.3 * noise(2, wide, seed=21, device=weight.device).to(weight))
        self.up = nn.Parameter(0.3 * noise(out, 2, seed=22, device=weight.device).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Embedding):
            return self.base(x) + self.down.mT[x] @ self.up.mT
        return self.base(x) + x @ self.down.mT @ self.up.mT

    def delta(self) -> Tensor:
        """What the weight of the layer would have to grow by for the same."""
        both = self.up @ self.down
        return both if isinstance(self.base, nn.Linear) else both.mT


def layers_of(module: nn.Module) -> dict[str, Any]:
    """Its linear layers and embeddings, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}


def adapted(module: nn.Module) -> list[Adapter]:
    """Puts an adapter in the place of every linear layer and embedding."""
    adapters = []
    for name, layer in layers_of(module).items():
        parent = module.get_submodule(name.rpartition(".")[0])
        adapters.append(Adapter(layer))
        setattr(parent, name.rpartition(".")[2], adapters[-1])
    return adapters


def has_no_layer(mixer: Mixer) -> str | None:
    """An exemption: there is nothing to adapt or to prune."""
    return None if layers_of(mixer) else "it has no linear layer"


def _trained(mixer: nn.Module, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
    """Outputs, and a loss to take gradients of."""
    context = Context() if context is None else context
    y, _ = mixer(x, None, context)
    return y, (y * noise(*y.shape, seed=9, device=y.device).to(y)).sum() + sum(context.losses)


@law(12, "hooks")
def hooks(mixer: Mixer) -> None:
    """Forward hooks of every part that owns parameters fire, in a pass over a sequence and in one over a step."""
    n = 12
    x = random_like(mixer, 2, n, mixer.d_model).to(dtype_of(mixer))
    for steps in (n, 1) if mixer.causal else (n,):
        called: list[str] = []
        owners = {name: m for name, m in mixer.named_modules() if list(m.parameters(recurse=False))}
        handles = [
            m.register_forward_hook(lambda *_, name=name, called=called: called.append(name))
            for name, m in owners.items()
        ]
        y, _ = mixer(x[:, :steps], None, Context())
        for handle in handles:
            handle.remove()
        require(set(called) == set(owners), f"hooks do not fire of: {', '.join(sorted(set(owners) - set(called)))}")
        assert_close(y, mixer(x[:, :steps], None, Context())[0], TOLERANCE[dtype_of(mixer)], "with hooks")


@law(12, "adapters", unless=(has_no_layer, is_evaluated))
def adapters(mixer: Mixer) -> None:
    """Adapters around linear layers do what the same change of the weights does, and learn."""
    n, expected = 12, copy.deepcopy(mixer)
    x = random_like(mixer, 2, n, mixer.d_model)
    lengths = torch.tensor([n, n - 3], device=device_of(mixer))
    found = adapted(mixer)
    merged = {name: layer for name, layer in layers_of(expected).items() if type(layer) is nn.Linear}
    y, loss = _trained(mixer, x, Context(lengths=lengths))
    loss.backward()
    for adapter in found:
        require(adapter.up.grad is not None, "an adapter gets no gradient")
        learns = any(p.grad is not None and bool(p.grad.any()) for p in (adapter.up, adapter.down))
        require(learns, "the gradient of an adapter is zero")
    if len(merged) == len(found):  # a layer with a mask of its own has no weight that would do
        with torch.no_grad():
            for layer, adapter in zip(merged.values(), found, strict=True):
                layer.weight += adapter.delta()
        wanted, wanted_loss = _trained(expected, x, Context(lengths=lengths))
        assert_close(y, wanted, 1e-9, "adapted")
        grads = torch.autograd.grad(wanted_loss, [layer.weight for layer in merged.values()])
        for adapter, d_weight in zip(found, grads, strict=True):
            assert_close(adapter.up.grad, d_weight @ adapter.down.mT, 1e-8, "gradient of an adapter", 1e-3)


@law(12, "pruning", cases="first", unless=(has_no_layer, is_evaluated))
def pruning(mixer: Mixer) -> None:
    """Pruned layers have the weights that `weight_orig` and the mask give, also after a step of training."""
    expected, x = copy.deepcopy(mixer), random_like(mixer, 2, 12, mixer.d_model)
    layers, dense = layers_of(mixer), layers_of(expected)
    for i, layer in enumerate(layers.values()):
        mask = (random_like(mixer, *layer.weight.shape, seed=i) > 0).double()
        prune.custom_from_mask(layer, "weight", mask)
    for _ in range(2):
        with torch.no_grad():
            for name, layer in layers.items():
                dense[name].weight.copy_(layer.weight_orig * layer.weight_mask)
        for p in mixer.parameters():
            p.grad = None
        y, loss = _trained(mixer, x)
        wanted, wanted_loss = _trained(expected, x)
        assert_close(y, wanted, 1e-9, "pruned")
        loss.backward()
        grads = torch.autograd.grad(wanted_loss, [layer.weight for layer in dense.values()])
        for layer, d_weight in zip(layers.values(), grads, strict=True):
            assert_close(layer.weight_orig.grad, d_weight * layer.weight_mask, 1e-8, "gradient of weight_orig", 1e-3)
            with torch.no_grad():
                layer.weight_orig.add_(0.1 * random_like(mixer, *d_weight.shape, seed=5))


@law(12, "checkpointing", dtypes=(F32,), settings=({"use_reentrant": False}, {"use_reentrant": True}), cases="first")
def checkpointing(mixer: Mixer, use_reentrant: bool) -> None:
    """Gradients are the same where the pass is run again in the backward pass."""
    n, dtype, device = 24, dtype_of(mixer), device_of(mixer)
    x = random_like(mixer, 2, n, mixer.d_model).to(dtype).requires_grad_()
    timespans = spans(2, n, device=device).to(dtype)

    def gradients_of(mixer: nn.Module, again: bool) -> list[Tensor]:
        def forward(x: Tensor) -> tuple[Tensor, ...]:
            context = Context(timespans=timespans)
            y, state = mixer(x, None, context)
            leaves = [leaf for leaf in tree_leaves(state) if leaf.is_floating_point()]
            return y, *leaves, sum(context.losses, y.new_zeros(()))

        outputs = checkpoint(forward, x, use_reentrant=use_reentrant) if again else forward(x)
        inputs = [x, *mixer.parameters()]
        for p in inputs:
            p.grad = None
        weighed = [(leaf * noise(*leaf.shape, seed=i, device=device).to(leaf)).sum() for i, leaf in enumerate(outputs)]
        torch.stack(weighed).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in inputs]

    expected = gradients_of(copy.deepcopy(mixer), False)
    names = ["x", *parameter_names(mixer)]
    assert_close_gradients(gradients_of(mixer, True), expected, TOLERANCE[dtype], "checkpointed", names)
