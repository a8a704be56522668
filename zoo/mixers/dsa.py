"""Sparse attention: latent attention to the steps that a small indexer chooses."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.mixers.attention_parts import AttentionWord
from zoo.mixers.mla import MultiHeadLatentAttention, Projected
from zoo.ops import LatentCache, SparseIndex, SparseLatentCache, rotate, sparse_latent_attention
from zoo.ops.derivatives import transformed
from zoo.ops.modules import widely
from zoo.protocol import Context, Place, State, first_parameter_like, register

NORM_EPS = 1e-6  # of the LayerNorm of the indexer's keys
CHOICE = "dsa_choice"  # what a layer with an indexer leaves in `context.shared`
OF_THE_INDEXER = ("index_heads", "index_dim", "index_rope_interleaved", "indexer_loss", "dense")


@register("dsa")
class SparseAttention(AttentionWord):
    """DeepSeek Sparse Attention: `mla` to the few steps that an indexer chooses (DeepSeek-AI 2025, arXiv 2512.02556,
    section 2.1).

        I_ts = sum_j w_tj relu(q_tj . k_s) / sqrt(J E)           j of J heads, each E wide
        q_j = R_t W_q,j c_q ;  k = R_t LayerNorm(W_k x) ;  w = W_w x        R_t turns the first P channels
        C_t = the top_k visible steps s with the largest I_ts, ties to the latest;  y = mla's, over C_t alone

    While training, `context.losses` gets `indexer_loss` * mean_t KL(p_t || softmax_{s in C_t} I_ts) with p_t the mean
    of the heads' attention weights, a constant (equation 4); the indexer reads x and c_q as constants too. So this loss
    trains only the indexer, and the model's loss trains everything else. With `dense=True` attention and the loss go
    over all steps: this is the warm-up (equation 3; in the paper all other parameters are frozen meanwhile).
    `context.metrics` gets the divergence. Padding counts in neither.

    With `indexer="shared"` a layer has no indexer: it attends to the steps that the nearest `dsa` before it with an
    indexer has chosen in this pass (GLM-5.2; arXiv 2603.12201), and caches no keys of one. Of single steps the choice
    itself is taken over; longer pieces score again. It adds no loss of its own. The first `dsa` of a model finds no
    choice and attends to the latest top_k steps.

    The published code also turns q and k by a Hadamard matrix, which changes no product, and rounds them to 8 bits;
    here scores are float32 at least. Inits as in `mla`; the indexer's are normal, std fan_in^-0.5.

    | state         | cost per token at context T                        | parallel form            | cannot       |
    |---------------|----------------------------------------------------|--------------------------|--------------|
    | (r + P + E) T | projections + 2 J (E + 1) T + 2 H (2 r + P) top_k  | attention, O(T^2) in all | see all of T |
    """

    class Config(MultiHeadLatentAttention.Config):
        """The options; see `mla` for the rest.

        Attributes:
            top_k: number of steps that a query attends to; 2048 in DeepSeek-V3.2.
            index_heads: J, by default half of n_heads, and 2 at least.
            index_dim: E, at least rope_dim, by default twice that.
            index_rope_interleaved: as `rope_interleaved`, of the indexer.
            indexer_loss: coefficient of the indexer's loss; with 0 the indexer is not trained.
            dense: attend to all steps, and train the indexer on all of them.
            indexer: "own", or "shared", that of the nearest `dsa` before with its own and the same `top_k`.
            backend: form of the op, see `zoo.ops.sparse_latent_attention`.
        """

        top_k: int = Field(default=64, ge=1)
        index_heads: int | None = Field(default=None, ge=1)
        index_dim: int | None = Field(default=None, ge=2)
        index_rope_interleaved: bool = False
        indexer_loss: float = Field(default=1.0, ge=0)
        dense: bool = False
        indexer: Literal["own", "shared"] = "own"
        backend: Literal["auto", "reference", "chunked"] = "auto"  # type: ignore[assignment]

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.layer = place.layer
        self.attention = inner = MultiHeadLatentAttention(d_model, config, place=place)
        self.causal, self.top_k = inner.causal, None if config.dense else config.top_k
        self.shares = config.indexer == "shared"
        if self.shares:
            if given := [name for name in OF_THE_INDEXER if name in config.changed()]:
                raise UsageError(f'{self.name}: {given[0]} is an option of an indexer; indexer="shared" has none.')
            return
        self.index_heads = J = config.index_heads or max(inner.n_heads // 2, 2)
        self.index_dim = E = config.index_dim or 2 * inner.rope_dim
        if inner.rope_dim > E:
            raise UsageError(f"{self.name}: index_dim={E} is less than rope_dim={inner.rope_dim}.")
        self.index_q = nn.Linear(config.q_rank or d_model, J * E, bias=False)
        self.index_proj = nn.Linear(d_model, E + J, bias=False)  # k, w
        self.index_norm = nn.LayerNorm(E, eps=NORM_EPS)
        for layer in (self.index_q, self.index_proj):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        if not self.causal:
            return ()
        device, dtype = first_parameter_like(self, device, dtype)
        width = self.attention.kv_rank + self.attention.rope_dim
        if self.shares:
            return LatentCache.empty(batch_size, width, capacity, device=device, dtype=dtype)
        return SparseLatentCache.empty(batch_size, width, self.index_dim, capacity, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        return self.attention(x, state, context, attend=functools.partial(self._attend, x))

    def _attend(self, x: Tensor, given: Projected, state: Any, context: Context) -> tuple[Tensor, State]:
        """To the steps that the indexer chooses."""
        c, inner = self.config, self.attention
        o, state, divergence, choice = sparse_latent_attention(
            given.q,
            given.latent,
            given.key,
            inner.kv_up,
            context.shared.get(CHOICE) if self.shares else self._index(x, given),
            state,
            top_k=self.top_k,
            align=self.training and torch.is_grad_enabled() and c.indexer_loss > 0 and not self.shares,
            causal=self.causal,
            lengths=context.lengths,
            resets=context.resets,
            scale=inner.scale,
            absorb=c.absorb,
            backend=c.backend,
        )
        context.shared[CHOICE] = choice
        if divergence is not None:
            n = divergence.numel() if context.lengths is None else context.lengths.sum().clamp(min=1)
            mean = divergence.sum() / n
            context.losses.append(c.indexer_loss * mean)
            context.metrics[f"dsa_{self.layer}_divergence"] = mean.detach()
            o = o if transformed() else _Beside.apply(o, mean)
        return o, state

    def _index(self, x: Tensor, given: Projected) -> SparseIndex:
        """The indexer's view of x (B, T, D), which it does not teach."""
        J, E = self.index_heads, self.index_dim
        q = self.index_q(given.compressed.detach()).unflatten(-1, (J, E))
        key, weight = self.index_proj(x.detach()).split([E, J], -1)
        key = widely(self.index_norm, key).to(key.dtype)
        interleaved = self.config.index_rope_interleaved
        q = rotate(q, given.cos, given.sin, interleaved=interleaved)
        key = rotate(key.unsqueeze(2), given.cos, given.sin, interleaved=interleaved).squeeze(2)
        return SparseIndex(q, key, weight * (J * E) ** -0.5)

    def flops_per_token(self, context_length: int) -> int:
        if self.shares:
            return self.attention.flops_per_token(min(context_length, self.top_k or context_length))
        seen, J, E = context_length, self.index_heads, self.index_dim
        flops = 2 * ((self.config.q_rank or self.d_model) * J * E + self.d_model * (E + J))
        if self.top_k is not None and self.top_k < seen:
            flops += 2 * seen * J * (E + 1)
            seen = self.top_k
        return flops + self.attention.flops_per_token(seen)

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        own: list[dict[str, Any]] = [
            {"top_k": 8},
            {"top_k": 5, "index_heads": 3, "index_dim": 6, "indexer_loss": 0.5},
            {"top_k": 3, "index_rope_interleaved": True},
            {"dense": True},
        ]
        latent = [{k: v for k, v in case.items() if k != "backend"} for case in MultiHeadLatentAttention.law_cases()]
        shared = {"indexer": "shared", "top_k": 4, "n_heads": 2}
        more = [{"top_k": 4, **case} for case in latent[len(own) :]]
        return [{**case, **mine} for case, mine in zip(latent, own, strict=False)] + more + [shared, {}]


class _Beside(torch.autograd.Function):
    """o, with a gradient of zero for a loss, which then reaches the indexer in every backward pass.

    Where the loss is left out, its parameters have a gradient all the same, as DistributedDataParallel asks for.
    """

    @staticmethod
    def forward(o: Tensor, loss: Tensor) -> Tensor:
        return o.view_as(o)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, d: Tensor):
        return d, d.new_zeros(())
