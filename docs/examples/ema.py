"""An op with a kernel in C++, and a mixer that uses it: a decaying sum of the past of every channel."""

import pathlib
from typing import Literal

import torch
from pydantic import Field
from torch import nn

import zoo
from zoo.core.options import Options
from zoo.mixers.parts import precise
from zoo.ops import common
from zoo.ops.bridge import Operator
from zoo.ops.kernel import Kernel
from zoo.protocol import Mixer, Place, first_parameter_like, packing, recurrent_dtype

KERNEL = Kernel(pathlib.Path(__file__).with_name("ema.cpp"))
LEGEND = "x (B, T, D); a (D,); state (B, D); lengths (B,) whole numbers; resets (B, T) bool."


def reference(x, a, state, lengths, resets):
    """The definition, one step at a time."""
    outputs = []
    for t in range(x.shape[1]):
        kept = state if resets is None else common.blank(state, resets[:, t])
        h = a * kept + x[:, t]
        valid = torch.ones_like(h, dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
        state = torch.where(valid, h, state)
        outputs.append(torch.where(valid, h, 0))
    return torch.stack(outputs, 1), state


def forward(call, x, a, state, lengths, resets):
    h, last = torch.empty_like(x), torch.empty_like(state)
    call("ema_forward", (x, a, state, lengths, resets), (h, last), *x.shape)
    return h, last


def backward(call, a, state, lengths, resets, h, d_h, d_last):
    d_x, d_a, d_state = torch.empty_like(h), torch.empty_like(state), torch.empty_like(state)
    call("ema_backward", (a, state, lengths, resets, h, d_h, d_last), (d_x, d_a, d_state), *h.shape)
    return d_x, d_a.sum(0), d_state


compiled = Operator(
    KERNEL,
    "ema(Tensor x, Tensor a, Tensor state, Tensor? lengths, Tensor? resets) -> (Tensor h, Tensor last)",
    forward,
    backward,
    gradients="x a state",
    plain=reference,
)


@common.without_autocast
def ema(x, a, state, *, lengths=None, resets=None, backend="auto"):
    """h_t = a h_{t-1} + x_t: all h (B, T, D) and the last one. Inputs in float32 or float64."""
    common.check("ema", LEGEND, "a", a, x, (x.shape[2],))
    common.check("ema", LEGEND, "state", state, x, (len(x), x.shape[2]))
    lengths = common.check_packing("ema", LEGEND, x, lengths, resets)
    offers = {"compiled": lambda: KERNEL.why_not(x, a, state)}
    form = common.choose_form("ema", backend, x.shape[1], 1, offers, plain=("reference",))
    return (compiled if form == "compiled" else reference)(x, a, state, lengths, resets)


@zoo.register("ema")
class EMA(Mixer):
    """h_t = a h_{t-1} + x_t ;  y_t = W h_t, with a = sigmoid(p) learned for each channel.

    | state | cost per token | parallel form         | cannot                  |
    |-------|----------------|-----------------------|-------------------------|
    | D     | 2 D^2          | none: a loop of steps | choose what to remember |
    """

    class Config(Options):
        """The options.

        Attributes:
            start: a at initialisation.
            backend: form of the op.
        """

        start: float = Field(default=0.9, gt=0, lt=1)
        backend: Literal["auto", "reference", "compiled"] = "auto"

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.decay = nn.Parameter(torch.logit(torch.full((d_model,), config.start)))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        device, dtype = first_parameter_like(self, device, dtype)
        return (torch.zeros(batch_size, self.d_model, device=device, dtype=recurrent_dtype(dtype)),)

    def forward(self, x, state=None, context=None):
        (h,) = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        wide, a = precise(x), precise(self.decay).sigmoid()
        y, h = ema(wide, a.to(wide.dtype), h, backend=self.config.backend, **packing(context))
        return self.out_proj(y.to(x.dtype)), (h,)

    def flops_per_token(self, context_length):
        return 2 * self.d_model**2

    @classmethod
    def law_cases(cls):
        return [{}, {"start": 0.5, "backend": "reference"}]
