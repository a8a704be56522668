"""Law 15: a sequence that is cut over processes gives the outputs and gradients of one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from zoo.laws.book import couples_rows, law
from zoo.laws.compare import (
    TOLERANCE,
    assert_close,
    assert_close_gradients,
    device_of,
    dtype_of,
    noise,
    parameter_names,
    spans,
)
from zoo.pieces import Pieces, in_threads
from zoo.protocol import Context, Mixer, not_cuttable


def elsewhere(mixer: Mixer) -> str | None:
    """An exemption: threads play the processes, and on a device their backward passes would wait in one queue."""
    return None if device_of(mixer).type == "cpu" else "it is checked on a CPU"


@law(
    15,
    "pieces",
    settings=({"pieces": 3, "steps": 10, "packed": True}, {"pieces": 2, "steps": 37}, {"pieces": 4, "steps": 70}),
    tried=1,
    cases="first",
    unless=(not_cuttable, couples_rows, elsewhere),
)
def pieces(mixer: Mixer, pieces: int, steps: int, packed: bool = False) -> None:
    """Pieces of a sequence, each in a thread of its own, agree with the whole in outputs and gradients."""
    dtype, names = dtype_of(mixer), parameter_names(mixer)
    x, weight = (noise(2, steps, mixer.d_model, seed=seed, device="cpu").to(dtype) for seed in (0, 1))
    timespans = spans(2, steps, device="cpu").to(dtype)
    resets = torch.zeros(2, steps, dtype=torch.bool, device="cpu")
    if packed:  # one document within a piece, one that goes on for two, and one that starts with a piece
        resets[0, [1, 2, 8]] = resets[1, 7] = True

    def run(mixer: Mixer, cut: slice, pieces: Pieces | None) -> tuple[Tensor, list[Tensor]]:
        inputs = x[:, cut].clone().requires_grad_()
        fields: dict[str, Any] = {"timespans": timespans[:, cut], "resets": resets[:, cut] if packed else None}
        y, _ = mixer(inputs, None, Context(**fields, pieces=pieces))
        (y * weight[:, cut]).sum().backward()  # all of the graph: messages are received in parts that lead nowhere here
        wanted = [inputs, *mixer.parameters()]
        return y.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]

    def piece(pieces: Pieces) -> tuple[Tensor, list[Tensor]]:
        with torch.device("cpu"):
            return run(copy.deepcopy(mixer), pieces.steps, pieces)

    y, expected = run(copy.deepcopy(mixer), slice(None), None)
    found = in_threads(pieces, steps, piece)
    what = f"{steps} steps in {pieces} pieces"
    assert_close(torch.cat([part for part, _ in found], 1), y, TOLERANCE[dtype], f"{what}: outputs")
    d_x, *d_weights = zip(*(gradients for _, gradients in found), strict=True)
    actual = [torch.cat(d_x, 1), *(torch.stack(each).sum(0) for each in d_weights)]
    assert_close_gradients(actual, expected, TOLERANCE[dtype], what, ["x", *names])
