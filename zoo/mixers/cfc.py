"""The closed-form continuous-time network."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.mixers._wirings import WIRINGS, WiringOptions, make_wiring, units_of
from zoo.mixers.parts import precise
from zoo.ops import CFC_ACTIVATIONS, cfc, cfc_by_steps
from zoo.ops.common import blank, valid_steps, without_autocast
from zoo.ops.modules import bare, widely
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register


class CfCState(NamedTuple):
    h: Tensor  # (B, d_hidden)


class MixedCfCState(NamedTuple):
    h: Tensor  # (B, d_hidden)
    c: Tensor  # (B, d_hidden), the memory cell


@register("cfc")
class CfC(Mixer):
    """CfC, a liquid network with a closed-form solution in time (Hasani et al. 2022, arXiv 2106.13898).

        a = backbone(x_t, h_{t-1}) ;  f, g, r, u = W a + b
        h_t = tanh(f) (1 - s) + tanh(g) s with s = sigmoid(r dt_t + u)                   (equation 4; mode "default")
        h_t = tanh(f) + tanh(g) s                                                        (mode "no_gate")
        h_t = A - A exp(-dt_t (|w_tau| + |f|)) f                                         (equation 2; mode "pure")
        y_t = h_t, or W_out h_t + b_out where the width differs from D

    dt_t is the time since the previous step, `context.timespans`, 1 by default. Parameters, their inits (Xavier-uniform
    matrices, A and w_tau among them) and names are those of the authors' package ncps. With a `wiring` the cell is one
    small CfC without backbone for every layer of neurons, with sparse f and g; a layer reads the previous layer at the
    same step.

    | state              | cost per token        | parallel form | cannot                                            |
    |--------------------|-----------------------|---------------|---------------------------------------------------|
    | H, with memory 2 H | 2 U (D + 4 H)         | none          | recall more than its state can hold, skip a step  |

    with H = d_hidden and U = backbone_units; with timespans the gate has two heads, 2 U (D + 5 H).

    The recurrence runs in float32 at least, under autocast too: rounding feeds back at every step.
    """

    traits = Traits(reads_timespans=True)

    class Config(WiringOptions):
        """The options, besides those of the wiring.

        Attributes:
            mode: the closed form; see above.
            backbone_units: width of the layers before the heads; unwired cells only.
            backbone_layers: number of these layers; unwired cells only.
            backbone_activation: activation after each of these layers.
            mixed_memory: an LSTM hands its output to the cell as previous state (Lechner and Hasani 2020, arXiv
                2006.04418), so that gradients neither vanish nor explode; unwired cells only.
            wiring: how neurons are connected; None for a dense cell with a backbone.
            backend: "reference" is one step at a time, "compiled" a C++ loop; "auto" takes the faster that runs.
        """

        mode: Literal["default", "no_gate", "pure"] = "default"
        backbone_units: int = Field(default=128, ge=1)
        backbone_layers: int = Field(default=1, ge=0, le=1024)
        backbone_activation: Literal["lecun_tanh", "tanh", "relu", "silu", "gelu"] = "lecun_tanh"
        mixed_memory: bool = False
        wiring: WIRINGS | None = None
        backend: Literal["auto", "reference", "compiled"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        c = config
        self.d_hidden = d_out = units_of(self.name, c.wiring, c, d_model)
        if c.wiring is None:
            cells = [CfCCell(d_model, self.d_hidden, c)]
        else:
            for name in ("backbone_units", "backbone_layers", "backbone_activation", "mixed_memory"):
                if name in c.changed():
                    raise UsageError(
                        f"{self.name}: {name} has no effect with wiring={c.wiring!r}; it belongs to wiring=None."
                    )
            wiring = make_wiring(self.name, c.wiring, c, d_model, self.d_hidden)
            signs, before, cells = wiring.sensory, range(d_model), []
            for neurons in wiring.layers:
                synapses = torch.as_tensor(abs(signs[before.start : before.stop, neurons.start : neurons.stop]).T)
                cells.append(CfCCell(len(before), len(neurons), c, synapses))
                signs, before = wiring.inner, neurons
            d_out = len(before)
        self.cells, self.sizes = nn.ModuleList(cells), [cell.d_hidden for cell in cells]
        self.cell_flops = sum(cell.flops for cell in cells)
        if c.mixed_memory and c.backend == "compiled":
            raise UsageError("cfc: mixed_memory has no compiled form. Available backends: auto, reference.")
        self.lstm = MemoryCell(d_model, self.d_hidden) if c.mixed_memory else None
        self.fc = nn.Linear(d_out, d_model) if d_out != d_model else None

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        device, dtype = first_parameter_like(self, device, dtype)
        h = torch.zeros(batch_size, self.d_hidden, device=device, dtype=recurrent_dtype(dtype))
        return MixedCfCState(h, h.clone()) if self.config.mixed_memory else CfCState(h)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        timespans = None if context is None else context.timespans
        h = precise(x)
        if context is not None and context.lengths is not None:
            h = blank(h, ~valid_steps(context.lengths, x.shape[1]))
        after: State
        if self.lstm is not None:
            h, after = self._mixed(self.lstm, h, state, context or Context())
        else:
            last = []
            for cell, past in zip(self.cells, state.h.split(self.sizes, 1), strict=True):
                h, past = cell(h, past, timespans, packing(context), self.config.backend)
                last.append(past)
            after = CfCState(torch.cat(last, 1))
        h = h.to(x.dtype)
        return h if self.fc is None else self.fc(h), after

    @without_autocast
    def _mixed(
        self, memory: MemoryCell, x: Tensor, state: MixedCfCState, context: Context
    ) -> tuple[Tensor, MixedCfCState]:
        """A step of the LSTM before each step of the cell."""
        gates = memory.gates(x)
        valid = None if context.lengths is None else valid_steps(context.lengths, x.shape[1])
        resets = context.resets if valid is None or context.resets is None else context.resets & valid
        h, c = state
        outputs = []
        for t in range(x.shape[1]):
            if resets is not None:
                h, c = blank(h, resets[:, t]), blank(c, resets[:, t])
            new_h, new_c = memory.step(gates[:, t] + widely(memory.recurrent_map, h), c)
            spans = None if context.timespans is None else context.timespans[:, t, None]
            _, new_h = self.cells[0](x[:, t, None], new_h, spans, {}, "reference")
            if valid is None:
                h, c = new_h, new_c
            else:
                h, c = (torch.where(valid[:, t, None], new, old) for new, old in ((new_h, h), (new_c, c)))
            outputs.append(new_h)
        y = torch.stack(outputs, 1)
        return y if valid is None else blank(y, ~valid), MixedCfCState(h, c)

    def flops_per_token(self, context_length: int) -> int:
        memory = 0 if self.lstm is None else 8 * self.d_hidden * (self.d_model + self.d_hidden)
        return memory + self.cell_flops + (0 if self.fc is None else 2 * self.d_model * self.sizes[-1])

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        circuit = {"ncp_neurons": (9, 6, 4), "ncp_synapses": (3, 2, 5, 3), "wiring_seed": 3}
        return [
            {},
            {
                "mode": "no_gate",
                "d_hidden": 24,
                "backbone_units": 40,
                "backbone_layers": 2,
                "backbone_activation": "silu",
            },
            {"mode": "pure", "backbone_layers": 0, "backend": "reference"},
            {"mixed_memory": True, "d_hidden": 10, "backbone_units": 20, "backbone_activation": "tanh"},
            {"wiring": "auto_ncp", "n_motor": 5, "sparsity": 0.3},
            {"wiring": "ncp", "mode": "pure", **circuit},
        ]


class MemoryCell(nn.Module):
    """The LSTM of ncps: gates in the order g, i, f, o, and 1 added to the forget gate."""

    def __init__(self, d_in: int, d_hidden: int):
        super().__init__()
        self.input_map = nn.Linear(d_in, 4 * d_hidden)
        self.recurrent_map = nn.Linear(d_hidden, 4 * d_hidden, bias=False)
        nn.init.xavier_uniform_(self.input_map.weight)
        nn.init.uniform_(self.input_map.bias, -0.1, 0.1)
        nn.init.orthogonal_(self.recurrent_map.weight)

    def gates(self, x: Tensor) -> Tensor:
        """The inputs' part of the gates at all steps."""
        return widely(self.input_map, x)

    def step(self, gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The next output and cell."""
        g, i, f, o = gates.chunk(4, 1)
        c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class WiredLinear(nn.Linear):
    """A linear layer whose weight counts times the `sparsity_mask` of its cell."""

    def __init__(self, d_in: int, d_out: int, cell: CfCCell):
        super().__init__(d_in, d_out)
        self.cell = (cell,)  # in a tuple, as the cell is no part of its layer

    def forward(self, x: Tensor) -> Tensor:
        mask = self.cell[0].sparsity_mask
        assert mask is not None
        return F.linear(x, self.weight * mask, self.bias)


class CfCCell(nn.Module):
    """A cell's layers, named as in ncps; `synapses` (d_hidden, d_in) of 0 and 1 are f's and g's ties to the input."""

    sparsity_mask: Tensor | None

    def __init__(self, d_in: int, d_hidden: int, config: CfC.Config, synapses: Tensor | None = None):
        super().__init__()
        self.d_in, self.d_hidden, self.mode, self.activation = d_in, d_hidden, config.mode, config.backbone_activation
        n_layers = config.backbone_layers if synapses is None else 0
        self.widths = widths = [d_in + d_hidden] + n_layers * [config.backbone_units]
        self.backbone = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.ff1 = self._first_kind(widths[-1], synapses)
        if self.mode == "pure":
            self.w_tau = nn.Parameter(torch.empty(1, d_hidden))
            self.A = nn.Parameter(torch.empty(1, d_hidden))
        else:
            self.ff2 = self._first_kind(widths[-1], synapses)
            self.time_a, self.time_b = (nn.Linear(widths[-1], d_hidden) for _ in range(2))
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)
        mask = None if synapses is None else torch.cat([synapses, torch.ones(d_hidden, d_hidden)], 1).float()
        self.register_buffer("sparsity_mask", mask)

    def forward(
        self, x: Tensor, state: Tensor, timespans: Tensor | None, packed: dict[str, Any], backend: str
    ) -> tuple[Tensor, Tensor]:
        backbone: list[Any] = list(self.backbone)
        kind = nn.Linear if self.sparsity_mask is None else WiredLinear
        heads = [self.ff1] if self.mode == "pure" else [self.ff1, self.ff2]
        gates = [] if self.mode == "pure" else [self.time_a, self.time_b]
        if not (bare(*backbone, *gates) and bare(*heads, cls=kind)):
            return self._by_layers(x, state, timespans, packed, backend)
        layers = [*((layer.weight, layer.bias) for layer in backbone), self._heads(timespans is None)]
        (weight, bias), *rest = [(precise(w), precise(b)) for w, b in layers]
        return cfc(
            F.linear(x, weight[:, : self.d_in], bias),
            weight[:, self.d_in :],
            rest,
            state,
            mode=self.mode,
            activation=self.activation,
            timespans=timespans,
            tau=self.w_tau[0] if self.mode == "pure" else None,
            level=self.A[0] if self.mode == "pure" else None,
            backend=backend,
            **packed,
        )

    @without_autocast
    def _by_layers(
        self, x: Tensor, state: Tensor, timespans: Tensor | None, packed: dict[str, Any], backend: str
    ) -> tuple[Tensor, Tensor]:
        """Step by step through the layers as they are called, for those that something is attached to."""
        if backend == "compiled":
            raise UsageError("cfc: backend='compiled' reads weights, and takes no hooks, adapters or pruning.")

        def heads(x: Tensor, state: Tensor) -> Tensor:
            a = torch.cat([x, state], 1)
            for layer in self.backbone:
                a = CFC_ACTIVATIONS[self.activation](widely(layer, a))
            if self.mode == "pure":
                return widely(self.ff1, a)
            f, g, rate, shift = (widely(layer, a) for layer in (self.ff1, self.ff2, self.time_a, self.time_b))
            return torch.cat([f, g, *([rate + shift] if timespans is None else [rate, shift])], 1)

        constants = [precise(self.w_tau[0]), precise(self.A[0])] if self.mode == "pure" else []
        spans = None if timespans is None else timespans.to(x.dtype)
        lengths, resets = packed.get("lengths"), packed.get("resets")
        return cfc_by_steps(heads, x, state, constants, spans, lengths, resets, self.mode)

    def _first_kind(self, d_in: int, synapses: Tensor | None) -> nn.Linear:
        """One of the heads f and g."""
        return nn.Linear(d_in, self.d_hidden) if synapses is None else WiredLinear(d_in, self.d_hidden, self)

    def _heads(self, unit_spans: bool) -> tuple[Tensor, Tensor]:
        """Weight and bias of all heads; with all time spans 1, rate and shift are one."""
        cut = [self.ff1] if self.mode == "pure" else [self.ff1, self.ff2]
        heads: list[tuple[Tensor, Tensor]]
        heads = [(h.weight if self.sparsity_mask is None else h.weight * self.sparsity_mask, h.bias) for h in cut]
        if self.mode != "pure":
            rate, shift = ((h.weight, h.bias) for h in (self.time_a, self.time_b))
            heads += [(rate[0] + shift[0], rate[1] + shift[1])] if unit_spans else [rate, shift]
        weights, biases = zip(*heads, strict=True)
        return torch.cat(weights), torch.cat(biases)

    @property
    def flops(self) -> int:
        """Matmul FLOPs of a step without time spans."""
        heads = self.widths[-1] * self.d_hidden * (1 if self.mode == "pure" else 3)
        return 2 * (sum(a * b for a, b in pairwise(self.widths)) + heads)
