"""The whole CfC and LTC mixers, beside their authors' package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from zoo.benchmarks.studies.measure import Case, Function, mixer_case

B, FORMS = 2, ("compiled", "reference")


def cases() -> dict[str, Case]:
    # Membranes ten times the published capacity: from those, neurons come to rest within each step, what is left of
    # the capacity's gradient is rounding, and no float32 form, ncps's included, has it closer than 6e-5.
    slow = {"cm": torch.linspace(4, 6, 64)}
    options = {"counted": "reference", "peer_name": "ncps", "at_least": 5}
    return {
        "cfc, width 256": mixer_case("cfc", 256, (B, 2048), FORMS, peer=_cfc, **options),
        "ltc, width 64, T 256": mixer_case("ltc", 64, (B, 256), FORMS, inputs=slow, peer=_ltc, **options),
    }


def _cfc() -> Function:
    from ncps.torch import CfC

    theirs = CfC(256, 256)

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        ours = {name.replace("cells.0.", "rnn_cell."): p for name, p in inputs.items() if name != "x"}
        return functional_call(theirs, ours, (inputs["x"],))

    return run


def _ltc() -> Function:
    from ncps.torch import LTC

    theirs = LTC(64, 64)

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        theirs.rnn_cell._params.update({name: p for name, p in inputs.items() if name != "x"})  # what its forward reads
        return theirs(inputs["x"])

    return run
