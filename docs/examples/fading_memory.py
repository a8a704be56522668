"""A mixer in one file: a decaying sum of outer products of keys and values, with a learned decay for each head."""

import torch
from pydantic import Field
from torch import nn

import zoo
from zoo.core.options import Options
from zoo.ops import linear_attention
from zoo.protocol import Context, Mixer, Place, first_parameter_like, recurrent_dtype


@zoo.register("fading_memory")
class FadingMemory(Mixer):
    """S_t = a S_{t-1} + k_t v_t^T ;  y_t = W_out S_t^T q_t, with a = sigmoid(p) learned for each head.

        q, k, v = W x ;  q, k = softmax(q), softmax(k)

    | state | cost per token  | parallel form         | cannot                                             |
    |-------|-----------------|-----------------------|----------------------------------------------------|
    | H K V | 8 D^2 + 2 H K V | chunked matmuls, O(T) | forget by content, or overwrite what it has stored |
    """

    class Config(Options):
        """The options.

        Attributes:
            n_heads: H, a divisor of D.
            half_life: steps after which the memory has decayed to one half, before training.
        """

        n_heads: int = Field(default=2, ge=1)
        half_life: float = Field(default=50.0, gt=0)

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        if d_model % config.n_heads:
            raise zoo.UsageError(f"fading_memory: n_heads={config.n_heads} does not divide {d_model}.")
        a = torch.tensor(0.5 ** (1 / config.half_life))
        self.decay = nn.Parameter(torch.logit(a).repeat(config.n_heads))
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        device, dtype = first_parameter_like(self, device, dtype)
        width = self.d_model // self.config.n_heads
        shape = batch_size, self.config.n_heads, width, width
        return (torch.zeros(shape, device=device, dtype=recurrent_dtype(dtype)),)

    def forward(self, x, state=None, context=None):
        context = Context() if context is None else context
        memory = None if state is None else state[0]
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.config.n_heads, -1)).unbind(2)
        log_decay = nn.functional.logsigmoid(self.decay.to(recurrent_dtype(x.dtype))).expand(*x.shape[:2], -1)
        o, memory = linear_attention(
            q.softmax(-1), k.softmax(-1), v, log_decay, memory, lengths=context.lengths, resets=context.resets
        )
        return self.out_proj(o.flatten(-2)), (memory,)

    def flops_per_token(self, context_length):
        return 8 * self.d_model**2 + 2 * self.d_model**2 // self.config.n_heads

    @classmethod
    def law_cases(cls):
        return [{}, {"n_heads": 4, "half_life": 5.0}]
