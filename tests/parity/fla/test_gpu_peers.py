"""What `make gpu` measures beside ours: fla's functions are called with the arguments that they take, and are right."""

from __future__ import annotations

import pytest
import torch

from zoo.benchmarks.studies.gpu.parts import peers as part
from zoo.benchmarks.studies.gpu.peers import CASES, FLA, Sizes

AT = Sizes(2, 70, 2, 16)
NARROW = ("fla chunk_delta_rule",)
"""Functions that take no float32; the interpreter computes with nothing less."""
FOUND = [
    (name, peer) for name, case in CASES.items() for peer in case.peers if peer.startswith(FLA) and peer not in NARROW
]


@pytest.mark.parametrize(("name", "peer"), FOUND)
def test_a_peer_is_right(name, peer):
    case = CASES[name]
    inputs = case.inputs(AT)
    wide = {key: x.requires_grad_() for key, x in part.rounded(part.first_row(case, inputs), "cpu").items()}
    exact = part.results(case.ours("reference"), wide)
    row = part.compared(case.peers[peer](), case, inputs, exact, "cpu", torch.float32)
    assert row["error"] <= part.TOLERANCE, row["of"]


def test_an_input_in_another_place_is_seen():
    """The comparison would not take a peer for right that has two inputs in each other's place."""
    case = CASES["delta_rule, decay per head"]
    inputs = case.inputs(AT)
    wide = {key: x.requires_grad_() for key, x in part.rounded(part.first_row(case, inputs), "cpu").items()}
    ours = case.ours("reference")
    exact = part.results(ours, wide)
    assert part.compared(ours, case, inputs, exact, "cpu")["right"]
    assert not part.compared(lambda x: ours(x | {"q": x["k"], "k": x["q"]}), case, inputs, exact, "cpu")["right"]
    torch.testing.assert_close(exact[0], part.results(ours, wide)[0])
