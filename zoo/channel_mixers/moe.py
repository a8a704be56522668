"""Mixture of experts: every token is sent to a few of many feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.channel_mixers.glu import ACTIVATIONS, GLU, Gate, gated, hidden_width
from zoo.channel_mixers.mlp import MLP
from zoo.core.errors import UsageError
from zoo.core.options import Options
from zoo.experts import held_here, sharers, through_experts
from zoo.ops import grouped_feed_forward
from zoo.ops.common import without_autocast
from zoo.ops.derivatives import transformed
from zoo.ops.modules import widely
from zoo.parameters import set_rule
from zoo.protocol import Context, Mixer, Place, State, recurrent_dtype, register

JUDGED_BY = {"top2": 2, "max": 1}  # best experts whose scores are summed to a group's


class Routing(NamedTuple):
    """The router's decision for N tokens: chosen experts and their weights (N, k), logits and scores (N, E)."""

    experts: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor


@register("moe")
class MoE(Mixer):
    """A mixture of experts: every token is sent to k of E gated layers, and to shared ones.

        s = softmax(W_r x) or sigmoid(W_r x);   C = the k largest of s + b, ties to the lowest index
        y = c sum_{i in C} s_i / (sum_{j in C} s_j) E_i(x) + S(x);   E_i, S gated layers as in `glu`

    (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961). The bias b starts at zero and
    changes only the choice. After every step b_i grows by `bias_rate` if expert i had less than the mean load, and
    shrinks if it had more (Wang et al. 2024, arXiv 2408.15664). With groups, C is taken from the `top_groups` best
    groups of experts, judged by their two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) or their best expert
    (DeepSeek-V2, arXiv 2405.04434, section 2.2.2). Zero experts return their input (LongCat-Flash,
    arXiv 2509.01322, section 2.1).

    While training, `context.losses` gets `balance_loss` * E sum_i f_i p_i, f_i the share of choices and p_i the mean
    share of the score that expert i has, which is `balance_loss` when all are even (Switch's equation 4, DeepSeekMoE's
    equation 12; transformers' is k times that); and `z_loss` * mean (logsumexp W_r x)^2 (Zoph et al. 2022, arXiv
    2202.08906, equation 5). `context.metrics` gets the largest share of choices that an expert has and their entropy
    over log E, 1 when all are even. Padding counts in none of these, and passes under torch.func count in no b.

    The router is at least float32, also under autocast. Tokens are sorted by expert and none is dropped. Init as in
    `swiglu`, of each expert; biases are not decayed.

    | state | cost per token                    | parallel form      | cannot             |
    |-------|-----------------------------------|--------------------|--------------------|
    | none  | 2 D E + 6 k D d_hidden (+ shared) | every step at once | see any other step |
    """

    kind = "channel"

    class Config(Options):
        """The options.

        Attributes:
            n_experts: E, number of experts.
            top_k: k, experts of a token.
            d_hidden: inner width of an expert, by default 8/3 D / top_k rounded up to a multiple of 32.
            activation: activation of the experts, as in `glu`.
            gated: false makes the experts perceptrons of two matrices.
            bias: biases in the experts.
            router: how logits become scores.
            router_bias: bias of the router's logits.
            normalize: divide the chosen scores by their sum.
            normalize_eps: added to that sum (LFM2: 1e-6).
            scale: factor c on the sum of experts.
            n_groups: groups of experts, which must divide their number.
            top_groups: groups from which a token may choose.
            group_score: score by which a group is chosen.
            n_shared: number of experts that every token uses, in one layer of n_shared * d_shared.
            d_shared: inner width of each shared expert, `d_hidden` by default.
            shared_gate: the sum of the shared experts times sigmoid(w x) (Qwen2-MoE, Qwen3-Next).
            d_latent: width in which the experts work, projected down to and up from by W_in and W_out, which all of
                them share; by default D without either (LatentMoE of Nemotron 3 Super).
            n_zero_experts: experts that return their input.
            balance: by an auxiliary loss, by the bias b on the choice, both or not at all.
            balance_loss: coefficient of the auxiliary loss.
            balance_over: tokens over which loads are balanced: all of a "batch" (for f and p), or those of each
                "sequence"; the loss is then the mean over sequences (DeepSeek-V2, section 2.2.3).
            bias_rate: change of b in one step.
            z_loss: coefficient of the router's z-loss.
        """

        n_experts: int = Field(default=8, ge=1)
        top_k: int = Field(default=2, ge=1)
        d_hidden: int | None = Field(default=None, ge=1)
        activation: Gate = "silu"
        gated: bool = True
        bias: bool = False
        router: Literal["softmax", "sigmoid"] = "softmax"
        router_bias: bool = False
        normalize: bool = True
        normalize_eps: float = Field(default=1e-20, ge=0)
        scale: float = 1.0
        n_groups: int = Field(default=1, ge=1)
        top_groups: int = Field(default=1, ge=1)
        group_score: Literal["top2", "max"] = "top2"
        n_shared: int = Field(default=0, ge=0)
        d_shared: int | None = Field(default=None, ge=1)
        shared_gate: bool = False
        d_latent: int | None = Field(default=None, ge=1)
        n_zero_experts: int = Field(default=0, ge=0)
        balance: Literal["loss", "bias", "both", "none"] = "loss"
        balance_loss: float = Field(default=0.01, ge=0)
        balance_over: Literal["batch", "sequence"] = "batch"
        bias_rate: float = Field(default=0.001, ge=0)
        z_loss: float = Field(default=0.0, ge=0)

    load: Tensor
    e_score_correction_bias: Tensor | None

    def __init__(self, d_model: int, config: Config, *, place: Place = Place()):
        super().__init__(d_model, config, place=place)
        self.layer = place.layer
        self.n_choices = config.n_experts + config.n_zero_experts
        _check(config, self.n_choices)
        if config.n_zero_experts:
            self.traits = self.traits._replace(work_varies="A zero expert costs nothing.")
        n, h = config.n_experts, config.d_hidden or hidden_width(d_model, config.top_k)
        self.d_hidden, d_shared = h, config.n_shared * (config.d_shared or h)
        self.router = nn.Linear(d_model, self.n_choices, bias=config.router_bias)
        width = config.d_latent or d_model
        self.up_proj = nn.Parameter(torch.empty(n, 2 * h if config.gated else h, width))  # gate first
        self.down_proj = nn.Parameter(torch.empty(n, width, h))
        self.up_bias = _bias(config.bias, n, self.up_proj.shape[1])
        self.down_bias = _bias(config.bias, n, width)
        for name in ("up_bias", "down_bias"):
            set_rule(self, name, weight_decay=False)
        self.expert_weights = ("up_proj", "down_proj", *(("up_bias", "down_bias") if config.bias else ()))
        nn.init.normal_(self.router.weight, std=d_model**-0.5)
        nn.init.normal_(self.up_proj, std=width**-0.5)
        nn.init.normal_(self.down_proj, std=(2 * place.n_layers * h) ** -0.5)
        self.latent_in = nn.Linear(d_model, width, bias=False) if config.d_latent else None
        self.latent_out = nn.Linear(width, d_model, bias=False) if config.d_latent else None
        if self.latent_in is not None and self.latent_out is not None:
            nn.init.normal_(self.latent_in.weight, std=d_model**-0.5)
            nn.init.normal_(self.latent_out.weight, std=width**-0.5)
        if config.router_bias:
            nn.init.zeros_(self.router.bias)
        self.shared: Mixer | None = None
        if config.n_shared:
            layer: Any = GLU if config.gated else MLP
            options = layer.Config(d_hidden=d_shared, activation=config.activation, bias=config.bias)
            self.shared = layer(d_model, options, place=place)
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if config.shared_gate else None
        corrects, dtype = config.balance in ("bias", "both"), recurrent_dtype(torch.get_default_dtype())
        correction = torch.zeros(self.n_choices, dtype=dtype) if corrects else None
        self.register_buffer("e_score_correction_bias", correction)
        self.register_buffer("load", torch.zeros(self.n_choices, dtype=torch.int64), persistent=False)
        self.step_sums = ("load",) if corrects else ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """As any module, but the correction stays in float32 at least: the steps it is moved by are small beside it.

        The count of the load starts from zero where it had no values: `to_empty` gives it none.
        """
        before, no_count = self.e_score_correction_bias, self.load.is_meta
        super()._apply(fn, recurse)
        if no_count:
            self.load = torch.zeros_like(self.load)
        if before is not None and self.e_score_correction_bias is not None:
            after = self.e_score_correction_bias
            if after.dtype != recurrent_dtype(after.dtype):
                self.e_score_correction_bias = before.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As any module; the count of the load, which no file holds, starts anew beside the weights."""
        super()._load_from_state_dict(*args, **kwargs)
        self.load = torch.zeros(self.n_choices, dtype=torch.int64, device=self.up_proj.device)

    def init_state(self, batch_size: int, *, capacity: int | None = None, device=None, dtype=None) -> State:
        return ()

    def forward(self, x: Tensor, state: State | None = None, context: Context | None = None) -> tuple[Tensor, State]:
        tokens = x.flatten(0, 1)
        routing = self.route(tokens)
        y = self._experts(tokens if self.latent_in is None else self.latent_in(tokens), routing)
        y = y if self.latent_out is None else self.latent_out(y)
        if self.training:
            self._account(routing, len(x), _valid(x, context), Context() if context is None else context)
        if self.shared is not None:
            shared = self.shared(x)[0].flatten(0, 1)
            y = y + (shared if self.shared_gate is None else shared * torch.sigmoid(self.shared_gate(tokens)))
        return y.view(x.shape), ()

    @without_autocast
    def route(self, tokens: Tensor) -> Routing:
        """Choose the experts of tokens (N, D), in at least float32."""
        config = self.config
        logits = widely(self.router, tokens)
        scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
        wanted = scores.detach()
        if self.e_score_correction_bias is not None:
            wanted = wanted + self.e_score_correction_bias
        if config.top_groups < config.n_groups:
            groups = wanted.unflatten(-1, (config.n_groups, -1))
            best = _largest(groups, min(JUDGED_BY[config.group_score], groups.shape[-1]))
            chosen = _largest(groups.gather(-1, best).sum(-1), config.top_groups)
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, chosen, False)
            wanted = groups.masked_fill(closed[..., None], -math.inf).flatten(-2)
        experts = _largest(wanted, config.top_k)
        weights = scores.gather(-1, experts)
        if config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + config.normalize_eps)
        return Routing(experts, config.scale * weights, logits, scores)

    def _experts(self, tokens: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of every token's experts, (N, D)."""
        config, k = self.config, self.config.top_k
        real = routing.experts < config.n_experts
        order = routing.experts.flatten().argsort(stable=True)  # places (token, choice) by expert, zero experts last
        sizes = _count(routing.experts, real, config.n_experts)
        # Copied k times, then permuted: the gradient is then a sum in fixed order, on a GPU too.
        rows = tokens[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, order)
        if (processes := sharers(self.up_proj)) is None:
            y = self._products(rows, sizes)
        else:
            y = through_experts(rows, sizes, processes, self._dtype(rows), self._products)
        y = y.index_select(0, order.argsort())
        total = (y.unflatten(0, (-1, k)) * routing.weights.masked_fill(~real, 0)[..., None]).sum(1)
        if config.n_zero_experts:
            total = total + tokens * routing.weights.masked_fill(real, 0).sum(-1, keepdim=True)
        return total.to(y.dtype)

    def _products(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """What the experts of this process give for rows sorted by expert, of which `sizes` has their numbers."""
        up, down, up_bias, down_bias = map(held_here, (self.up_proj, self.down_proj, self.up_bias, self.down_bias))
        return grouped_feed_forward(rows, sizes, up, down, self._activate, up_bias, down_bias)

    def _dtype(self, rows: Tensor) -> torch.dtype:
        """In which the products are computed."""
        device = rows.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.up_proj.dtype

    def _activate(self, h: Tensor) -> Tensor:
        activation = self.config.activation
        return gated(activation, *h.chunk(2, -1)) if self.config.gated else ACTIVATIONS[activation](h)

    @without_autocast
    def _account(self, routing: Routing, batch_size: int, valid: Tensor | None, context: Context) -> None:
        """The auxiliary losses, the load of this pass, and figures about it."""
        config, scores, logits = self.config, routing.scores, routing.logits
        counted = torch.ones_like(routing.experts, dtype=torch.bool)
        n_tokens: Any = len(scores)
        if valid is not None:
            counted = counted & valid[:, None]
            n_tokens = valid.sum().clamp(min=1)
            logits = logits.masked_fill(~valid[:, None], 0)
        load = _count(routing.experts, counted, self.n_choices)
        share = load.to(scores.dtype) / load.sum().clamp(min=1)
        if config.balance in ("loss", "both"):
            rows = batch_size if config.balance_over == "sequence" else 1
            context.losses.append(config.balance_loss * self._unevenness(routing, counted, rows))
        if config.z_loss:
            context.losses.append(config.z_loss * (logits.logsumexp(-1).square() * counted[:, 0]).sum() / n_tokens)
        if self.e_score_correction_bias is not None and torch.is_grad_enabled() and not transformed():
            self.load = self.load + load
        entropy = torch.special.entr(share).sum() / math.log(max(self.n_choices, 2))
        context.metrics[f"moe_{self.layer}_max_load"] = share.max()
        context.metrics[f"moe_{self.layer}_load_entropy"] = entropy

    def _unevenness(self, routing: Routing, counted: Tensor, rows: int) -> Tensor:
        """E sum_i f_i p_i of each of `rows` stretches of the tokens, on average over those with any that count."""
        E, scores = self.n_choices, routing.scores
        stretch = torch.arange(rows, device=scores.device).repeat_interleave(len(scores) // rows)
        load = _count(routing.experts + E * stretch[:, None], counted, rows * E).view(rows, E).to(scores.dtype)
        share = load / load.sum(-1, keepdim=True).clamp(min=1)
        of_token = scores / scores.sum(-1, keepdim=True) * counted[:, :1]
        n_tokens = counted[:, 0].unflatten(0, (rows, -1)).sum(-1)
        mean = of_token.unflatten(0, (rows, -1)).sum(1) / n_tokens[:, None].clamp(min=1)
        return E * (share * mean).sum() / (n_tokens > 0).sum().clamp(min=1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the bias of the choice against the load of the passes since the last step."""
        if self.e_score_correction_bias is not None:
            ahead = self.load * self.n_choices - self.load.sum()  # in whole numbers, so that equal means equal
            self.e_score_correction_bias -= self.config.bias_rate * ahead.sign()
            self.load = torch.zeros_like(self.load)

    def flops_per_token(self, context_length: int) -> int:
        d, config = self.d_model, self.config
        width = config.d_latent or d
        experts = config.top_k * (6 if config.gated else 4) * width * self.d_hidden
        experts += 4 * d * width if config.d_latent else 0
        shared = 0 if self.shared is None else self.shared.flops_per_token(context_length)
        return 2 * d * (self.n_choices + config.shared_gate) + experts + shared

    @classmethod
    def law_cases(cls) -> list[dict[str, Any]]:
        deepseek = {"router": "sigmoid", "n_groups": 4, "top_groups": 2, "scale": 2.5, "n_shared": 2}
        return [
            {},
            {"n_experts": 16, "top_k": 3, "d_hidden": 24, **deepseek, "balance": "bias", "bias_rate": 0.01},
            {"n_shared": 1, "d_shared": 40, "shared_gate": True, "balance_loss": 0.1, "z_loss": 0.001},
            {"n_zero_experts": 4, "top_k": 3, "normalize": False, "scale": 6.0, "balance": "both"},
            {"activation": "gpt_oss", "bias": True, "router_bias": True, "n_experts": 5, "balance": "none"},
            {"gated": False, "activation": "gelu", "n_groups": 2, "group_score": "max", "n_shared": 1},
            {"router": "sigmoid", "normalize_eps": 0.1},
            {"d_latent": 12, "d_hidden": 20, "n_shared": 1, "balance_over": "sequence"},
        ]


def _check(config: MoE.Config, n_choices: int) -> None:
    """Refuse options that do not go together."""
    within = n_choices // config.n_groups * config.top_groups
    if n_choices % config.n_groups:
        raise UsageError(f"n_groups={config.n_groups} does not divide the {n_choices} experts.")
    if config.top_groups > config.n_groups:
        raise UsageError(f"top_groups={config.top_groups} is more than n_groups={config.n_groups}.")
    if config.top_k > within:
        raise UsageError(f"top_k={config.top_k} is more than the {within} experts that a token may choose from.")
    if config.top_k == 1 and config.normalize:
        raise UsageError("top_k=1 with normalize=True gives every expert the weight 1: set normalize=False.")
    if config.shared_gate and not config.n_shared:
        raise UsageError("shared_gate=True needs n_shared of at least 1.")
    for owner, there, options in (
        ("n_shared", config.n_shared > 0, ("d_shared",)),
        ("normalize", config.normalize, ("normalize_eps",)),
        ("n_groups", config.n_groups > 1, ("group_score",)),
        ('balance="loss" or "both"', config.balance in ("loss", "both"), ("balance_loss", "balance_over")),
        ('balance="bias" or "both"', config.balance in ("bias", "both"), ("bias_rate",)),
    ):
        stray = [option for option in options if option in config.changed()]
        if stray and not there:
            raise UsageError(f"moe: {stray[0]} belongs to {owner}, which is not set.")
    if config.d_latent and config.n_zero_experts:
        raise UsageError("n_zero_experts return their input, which d_latent projects: take one of the two.")
    if not config.gated and config.activation == "gpt_oss":
        raise UsageError('activation="gpt_oss" is that of a gated layer: it needs gated=True.')


def _bias(wanted: bool, n: int, width: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(n, width)) if wanted else None


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last axis, falling; among equals the lowest comes first."""
    indices = []
    for _ in range(k):
        indices.append(scores.argmax(-1, keepdim=True))  # the first of equals, which `topk` does not promise
        scores = scores.scatter(-1, indices[-1], -math.inf)
    return torch.cat(indices, -1)


def _count(experts: Tensor, counted: Tensor, n: int) -> Tensor:
    """How many of the `counted` choices fall to each of n experts, (n,) int64."""
    zeros = torch.zeros(n, dtype=torch.int64, device=experts.device)
    return zeros.scatter_add(0, experts.flatten().clamp(max=n - 1), counted.flatten().long())


def _valid(x: Tensor, context: Context | None) -> Tensor | None:
    """Which of the B T tokens are no padding, (B * T,)."""
    if context is None or context.lengths is None:
        return None
    return (torch.arange(x.shape[1], device=x.device) < context.lengths[:, None]).flatten()
