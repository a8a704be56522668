"""Every mixer on a device beside float64 on a CPU: outputs, the gradient of its input, a single step and the state."""

from __future__ import annotations

import copy
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from zoo.laws import TOLERANCE, cases_of, error, noise
from zoo.laws.cases import WIDTH
from zoo.ops.choices import fixed_choices
from zoo.protocol import Mixer, mixers

STEPS, FLOOR = 70, 0.05
FEW = 32
"""How many times as far as weights in the nearest numbers of a dtype move the outputs these may be from float64."""


def values(start: Mixer, device: str, dtype: torch.dtype, moved: float = 0.0) -> list[Tensor]:
    """Of a copy on a device, in float64 on the CPU; its weights moved by a relative distance."""
    mixer = copy.deepcopy(start).to(device, dtype)
    with torch.no_grad():
        for i, p in enumerate(mixer.parameters() if moved else ()):
            p.mul_(1 + moved * noise(*p.shape, seed=i, device=device).sign().to(p))
    x = noise(2, STEPS, WIDTH, device=device).to(dtype).requires_grad_()
    y, state = mixer(x)
    weight = noise(*y.shape, device=device).to(y)
    (gradient,) = torch.autograd.grad(y, x, weight)
    found = [y, gradient]
    if mixer.causal:
        stepped, after = mixer.step(x[:, 0].detach(), tree_map(torch.detach, state))
        found += [stepped, *tree_leaves(after)]
    return [t.detach().double().cpu() for t in found]


def compared(name: str, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The largest relative error of a mixer by its name, and how large it may be."""
    start = cases_of(mixers[name])[0].build(dtype)
    with fixed_choices():
        got = values(start, device, dtype)
        with mock.patch.dict("os.environ", ZOO_KERNELS="off"):  # plain PyTorch alone, and nothing is built
            exact = values(start, "cpu", torch.float64)
        pairs = list(zip(got, exact, strict=True))
        errors = [error(a, e, floor=FLOOR) for a, e in pairs]
        tolerance = TOLERANCE[dtype]
        if max(errors) > tolerance:  # so steep that weights in the nearest numbers of the dtype move it, as in the laws
            near = values(start, "cpu", torch.float64, torch.finfo(dtype).eps / 2)
            off = max(error(n, e, floor=FLOOR) for n, (_, e) in zip(near, pairs, strict=True))
            tolerance = max(tolerance, FEW * off)
    return max(errors, key=lambda found: (found != found, found)), tolerance
