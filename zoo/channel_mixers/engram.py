"""A memory of n-grams: tables that the last few tokens address by a hash."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.norms import NORM_EPS, make_norm
from zoo.ops import causal_conv1d
from zoo.ops.common import owned
from zoo.ops.cut import edge_before
from zoo.parameters import set_rule
from zoo.protocol import Context, Mixer, Place, State, Traits, first_parameter_like, packing, recurrent_dtype, register

LARGEST = (1 << 31) - 1  # of a token and of a multiplier: their product is an int64
LEAST_GATE = 1e-6  # below it the square root would have a boundless slope


class EngramState(NamedTuple):
    tokens: Tensor  # (B, max_order - 1) int64: the last tokens plus 1 in time order, 0 where there is none
    conv: Tensor  # (B, (W - 1) dilation, D): the last inputs of the convolution; 0 rows without one


class NGrams(nn.Module):
    """One table for every order and every head; the n-gram that ends at a step names a row of each.

    With ids that are the tokens plus 1, and 0 before the start of the document,

        mix_n = (id_t m_0) xor (id_{t-1} m_1) xor ... xor (id_{t-n+1} m_{n-1}) ;  row = mix_n mod p

    The multipliers m are odd numbers below 2^31 from the generator SplitMix64 (Steele et al. 2014), which starts from
    the seed. The sizes p are the first primes from `n_slots` on, another one for every table.
    """

    def __init__(self, max_order: int, n_heads: int, d_head: int, n_slots: int, seed: int):
        super().__init__()
        self.max_order, self.n_heads, self.seed = max_order, n_heads, seed
        self.sizes_of_tables = primes(n_slots, (max_order - 1) * n_heads)
        self.table = nn.Embedding(sum(self.sizes_of_tables), d_head)
        nn.init.normal_(self.table.weight, std=0.02)
        set_rule(self.table, "weight", weight_decay=False, lr_scale=5.0)
        self._hash(None)
        self.register_load_state_dict_post_hook(_hash_again)

    multipliers: Tensor
    sizes: Tensor
    starts: Tensor

    def _hash(self, device: torch.device | None) -> None:
        """The numbers of the hash, which the options determine and no file holds."""
        sizes = torch.tensor(self.sizes_of_tables, device=device)
        numbers = {"multipliers": torch.tensor(multipliers(self.seed, self.max_order), device=device)}
        numbers |= {"sizes": sizes.view(-1, self.n_heads), "starts": (sizes.cumsum(0) - sizes).view(-1, self.n_heads)}
        for name, tensor in numbers.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """As any module, but the numbers of the hash are made anew: `to_empty` leaves no values."""
        super()._apply(fn, recurse)
        self._hash(self.table.weight.device)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T, max_order), those of a step and of the steps before it, to (B, T, orders * heads * d_head)."""
        mix, mixes = ids[..., 0] * self.multipliers[0], []
        for k in range(1, self.max_order):
            mix = mix ^ (ids[..., k] * self.multipliers[k])
            mixes.append(mix)
        rows = torch.stack(mixes, -1)[..., None] % self.sizes + self.starts
        return self.table(rows.flatten(-2)).flatten(-2)


def _hash_again(module: nn.Module, keys: Any) -> None:
    """The numbers of the hash beside weights that were loaded, which may have come from the meta device."""
    assert isinstance(module, NGrams)
    module._hash(next(module.parameters()).device)


class DilatedConv(nn.Module):
    """silu(conv(norm(x))), causal and depthwise, with steps of `dilation` between the taps; zero at first."""

    def __init__(self, d_model: int, size: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.norm = make_norm("rmsnorm", d_model, NORM_EPS)
        self.weight = nn.Parameter(torch.zeros(d_model, size))

    def forward(self, x: Tensor, state: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        gaps = self.weight.unsqueeze(-1) * F.pad(self.weight.new_ones(1), (0, self.dilation - 1))
        taps = gaps.flatten(1)[:, : self.reach + 1]
        return causal_conv1d(self.norm(x), taps, None, state, activation="silu", **packing(context))

    @property
    def reach(self) -> int:
        """Number of steps that it looks back."""
        return (self.weight.shape[1] - 1) * self.dilation


@register("engram")
class Engram(Mixer):
    """Hashed n-gram memory: embeddings of the last 2 to n tokens, which the stream gates (Engram, Cheng et al. 2026,
    arXiv 2601.07372, section 2).

        e_t = the rows of all tables that the n-grams ending at t name
        alpha = sigmoid(sign(s) sqrt(|s|)), s = norm(x) . norm(W_K e) / sqrt(D) ;  v = alpha W_V e
        y = v + silu(conv(norm(v))), a causal convolution with W taps, n steps apart

    An n-gram never reaches beyond the start of its document. Tokens come from `context.tokens`, which a model of tokens
    sets. The stream is normed here: `engram(norm="none")` reads it as published. In training the tables have five times
    the learning rate and no weight decay, and the convolution starts from zero (section 4.1). Published besides: a map
    of tokens that read alike to one id, which belongs to a tokenizer and is left out here; hash numbers that differ
    by layer: give each word another `seed` for that.

    | state                          | cost per token      | parallel form      | cannot                           |
    |--------------------------------|---------------------|--------------------|----------------------------------|
    | n - 1 tokens, (W - 1) n D      | 4 (n - 1) d D, with | every step at once | see tokens further back, or keep |
    | floats                         | d = heads * d_head  |                    | n-grams of the same rows apart   |
    """

    kind = "channel"
    traits = Traits(cuts_in_ops=True, reads_tokens=True)

    class Config(Options):
        """The options.

        Attributes:
            max_order: n, the length of the longest n-grams; there are tables for 2 to n.
            n_heads: number of tables for each order.
            d_head: width of a row, by default D / 16, at least 1.
            n_slots: number of rows of each table, rounded up to primes.
            conv_size: W, taps of the convolution; None leaves it out.
            dilation: steps between the taps, by default n.
            seed: what the multipliers of the hash are drawn from, the same on every machine.
        """

        max_order: int = Field(default=3, ge=2, le=16)
        n_heads: int = Field(default=8, ge=1, le=1024)
        d_head: int | None = Field(default=None, ge=1)
        n_slots: int = Field(default=4096, ge=2, le=1 << 26)
        conv_size: int | None = Field(default=4, ge=2, le=1024)
        dilation: int | None = Field(default=None, ge=1, le=1024)
        seed: int = Field(default=0, ge=0, lt=1 << 63)

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        if config.conv_size is None and config.dilation is not None:
            raise UsageError("engram: dilation belongs to the convolution, which conv_size=None leaves out.")
        n = config.max_order
        d_head = config.d_head or max(1, d_model // 16)
        self.memory = NGrams(n, config.n_heads, d_head, config.n_slots, config.seed)
        width = (n - 1) * config.n_heads * d_head
        self.key_proj = nn.Linear(width, d_model, bias=False)
        self.value_proj = nn.Linear(width, d_model, bias=False)
        for layer in (self.key_proj, self.value_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.query_norm = make_norm("rmsnorm", d_model, NORM_EPS)
        self.key_norm = make_norm("rmsnorm", d_model, NORM_EPS)
        self.conv = None if config.conv_size is None else DilatedConv(d_model, config.conv_size, config.dilation or n)

    def init_projections(self, init: Callable[[Tensor], Any]) -> None:
        """Keeps its inits: its weights read tables, not the stream."""

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> EngramState:
        device, dtype = first_parameter_like(self, device, dtype)
        tokens = torch.zeros(batch_size, self.config.max_order - 1, dtype=torch.int64, device=device)
        reach = 0 if self.conv is None else self.conv.reach
        conv = torch.zeros(batch_size, reach, self.d_model, dtype=recurrent_dtype(dtype), device=device)
        return EngramState(tokens, conv)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        c = Context() if context is None else context
        before = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        ids, tokens = last_ids(c, before.tokens)
        e = self.memory(ids).to(x.dtype)
        s = (self.query_norm(x) * self.key_norm(self.key_proj(e))).to(recurrent_dtype(x.dtype)).sum(-1, keepdim=True)
        s = s / math.sqrt(self.d_model)
        alpha = torch.sigmoid(s.sign() * s.abs().clamp(min=LEAST_GATE).sqrt()).to(x.dtype)
        y, conv = alpha * self.value_proj(e), before.conv
        if self.conv is not None:
            late, conv = self.conv(y, None if state is None else conv, c)
            y = y + late
        return y, EngramState(tokens, conv)

    def flops_per_token(self, context_length: int) -> int:
        return 4 * self.key_proj.in_features * self.d_model

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        return [
            {"n_heads": 2, "d_head": 3, "n_slots": 30, "dilation": 2},
            {"max_order": 2, "n_slots": 30, "conv_size": None, "seed": 3},
        ]


def last_ids(context: Context, before: Tensor) -> tuple[Tensor, Tensor]:
    """The ids of every step and of those before it in its document, and the last ones.

    Args:
        context: of the pass, with tokens (B, T), negative where a place has none.
        before: (B, n), the last ids before the pass in time order, 0 where there is none.

    Returns:
        (B, T, n + 1), the id of the step itself first, 0 where there is none; the ids that the next pass needs, (B, n).
    """
    tokens, resets, n = context.tokens, context.resets, before.shape[1]
    assert tokens is not None  # the door has seen to that
    ids = (tokens.clamp(min=-1) + 1) & LARGEST
    T = ids.shape[1]
    if context.pieces is not None:  # as numbers that messages between processes carry exactly
        before, numbers = edge_before(context.pieces, ids[..., None].double(), n, None, resets)
        before, ids = before.detach().squeeze(-1).long(), numbers.detach().squeeze(-1).long()
    known = torch.cat([before, ids], 1)
    document = None if resets is None else F.pad(resets.cumsum(1), (n, 0))
    found = [ids]
    for k in range(1, n + 1):
        earlier = known[:, n - k : n - k + T]
        if document is not None:
            earlier = earlier.masked_fill(document[:, n - k : n - k + T] != document[:, n:], 0)
        found.append(earlier)
    if context.lengths is None:
        last, at_end = known[:, T:], None if document is None else document[:, T:] != document[:, -1:]
    else:
        places = context.lengths[:, None] + torch.arange(n, device=ids.device)
        last, at_end = known.gather(1, places), None
        if document is not None:
            of = document.gather(1, places)
            at_end = of != of[:, -1:]
    return torch.stack(found, -1), owned(last if at_end is None else last.masked_fill(at_end, 0))


@functools.cache
def primes(start: int, count: int) -> tuple[int, ...]:
    """The first primes from `start` on."""
    found: list[int] = []
    number = max(start, 2)
    while len(found) < count:
        if all(number % d for d in range(2, math.isqrt(number) + 1)):
            found.append(number)
        number += 1
    return tuple(found)


def multipliers(seed: int, count: int) -> list[int]:
    """Odd numbers below 2^31 from SplitMix64, in whole numbers alone, so that they are the same everywhere."""
    found, z, every = [], seed, (1 << 64) - 1
    for _ in range(count):
        z = (z + 0x9E3779B97F4A7C15) & every
        y = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & every
        y = ((y ^ (y >> 27)) * 0x94D049BB133111EB) & every
        found.append(((y ^ (y >> 31)) >> 33) | 1)
    return found
