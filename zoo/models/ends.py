"""What every model has around its network: the embedding of its inputs before it, the norm and the head after it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.core.errors import UsageError
from zoo.models import generation
from zoo.models.config import ModelConfig
from zoo.models.weights import Transfer
from zoo.norms import make_norm
from zoo.ops.modules import bare
from zoo.pattern import parse
from zoo.protocol import Context, Mixer, State, first_parameter_like


def make_backbone(config: ModelConfig, pattern: str) -> Backbone:
    """The layers of a pattern, with the options of a model."""
    return Backbone(
        parse(pattern),
        config.d_model,
        causal=config.causal,
        defaults=config.step_options(),
        norm_eps=config.norm_eps,
        residual=config.residual,
        length=config.max_len,
    )


class Ends(nn.Module, ABC):
    """A model: inputs to outputs, from state to state, through a network between two ends.

    Inputs are token ids (B, T) and outputs logits (B, T, vocab_size); or real vectors, (B, T, inputs) and
    (B, T, outputs). Before the network stand the embedding, learned positions and the feature of time, and after it
    the norm, the decoder and the head, each where the config asks for it. A subclass says how inputs pass from one end
    to the other.

    Attributes:
        recompute: whether training stores no activations within a step of the pattern (a recursive model: within an
            application of its network), and the backward pass computes them again: memory for one of them, the same
            bits.
        swapped: of a model that `zoo.swap` gave, which weights it kept and which are new.
    """

    embedding: Any
    recompute: bool = False
    swapped: Transfer | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.causal = config.causal
        if config.positions == "learned" and config.max_len is None:
            raise UsageError('positions="learned" needs max_len, the number of positions to learn.')
        d = config.d_model
        self.embedding = nn.Linear(config.inputs, d) if config.inputs else nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.max_len, d) if config.positions == "learned" and config.max_len else None
        self.time_feature = TimeFeature(d) if config.time_feature else None
        self.embedding_norm = make_norm(config.norm if config.embedding_norm else "none", d, config.norm_eps)
        self.backbone = make_backbone(config, config.pattern)
        self.norm = make_norm(config.norm if config.placement != "post" else "none", d, config.norm_eps)
        self.decoder = Decoder(config) if config.decoder else None
        self.head = None if config.tie_embeddings else nn.Linear(d, config.n_outputs, bias=False)
        biased = config.head_bias or config.outputs is not None
        self.head_bias = nn.Parameter(torch.zeros(config.n_outputs)) if biased else None
        self._init_own()

    def _init_own(self) -> None:
        std = 0.02 if self.head is None else 1.0  # a tied head wants small weights
        if self.config.inputs:  # a bias too: a norm of w x alone would keep of a single number x its sign only
            nn.init.normal_(self.embedding.weight, std=self.config.inputs**-0.5)
            nn.init.normal_(self.embedding.bias)
        else:
            nn.init.normal_(self.embedding.weight, std=std)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=std / 2)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.config.d_model**-0.5)

    def forward(
        self, inputs: Tensor, state: State | None = None, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """Inputs (B, T) of whole numbers or (B, T, inputs) of real ones, from `state` (rest by default; consumed) to
        logits (B, T, vocab_size) or outputs (B, T, outputs), and the next state."""
        hidden, state = self.features(inputs, state, context)
        return self.logits(hidden), state

    @abstractmethod
    def features(
        self, inputs: Tensor, state: State | None = None, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """As `forward`, up to the normed hidden states (B, T, D) that `logits` reads."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (..., D) to logits (..., vocab_size), or outputs (..., outputs)."""
        if self.head is None or bare(self.head):
            logits = F.linear(hidden, self._tied() if self.head is None else self.head.weight, self.head_bias)
        else:
            logits = self.head(hidden) if self.head_bias is None else self.head(hidden) + self.head_bias
        logits = logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _tied(self) -> Tensor:
        """(vocab_size, D), the embeddings of all tokens, those of an adapter in its place too."""
        if isinstance(self.embedding, nn.Embedding):
            return self.embedding.weight
        device = next(self.embedding.parameters()).device
        return self.embedding(torch.arange(self.config.vocab_size, device=device))

    @abstractmethod
    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state at rest, as `Mixer.init_state`."""

    def step(self, inputs: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        """`forward` at T = 1: inputs (B,) or (B, inputs) to (logits (B, vocab_size) or outputs (B, outputs), next
        state)."""
        n = self.config.inputs
        if inputs.ndim != (1 if n is None else 2):
            wanted = "tokens (B,)" if n is None else f"inputs (B, {n})"
            raise UsageError(f"model: step takes {wanted}, not {tuple(inputs.shape)}.")
        logits, state = self(inputs[:, None], state, context)
        return logits.squeeze(1), state

    def zeros(self, batch_size: int, n_steps: int) -> Tensor:
        """Inputs of the kind that it reads, on its device: all the first token, or all zero vectors."""
        n, device = self.config.inputs, next(self.parameters()).device
        if n is None:
            return torch.zeros(batch_size, n_steps, dtype=torch.int64, device=device)
        return torch.zeros(batch_size, n_steps, n, dtype=self.compute_dtype(), device=device)

    @abstractmethod
    def mixers(self) -> list[Mixer]:
        """All mixers, in order."""

    def n_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    @abstractmethod
    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs (multiply-add = 2) to read one token at a context of `context_length`, head included."""

    @abstractmethod
    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state after `context_length` tokens."""

    def compute_dtype(self) -> torch.dtype:
        """The dtype of the embedding's weights, and so of what the network reads."""
        weight = getattr(self.embedding, "weight", None)  # an adapter around the embedding need not have it
        return first_parameter_like(self, None, None)[1] if weight is None else weight.dtype

    generate = generation.generate
    stream = generation.stream


class TimeFeature(nn.Module):
    """Timespans (B, T), not negative, to (B, T, D): W_2 silu(W_1 [dt, log(1 + dt)] + b)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        self.up = nn.Linear(2, d_model)
        self.down = nn.Linear(d_model, d_model, bias=False)
        nn.init.normal_(self.up.weight)
        nn.init.normal_(self.up.bias)
        nn.init.normal_(self.down.weight, std=d_model**-0.5)

    def forward(self, timespans: Tensor) -> Tensor:
        return self.down(F.silu(self.up(torch.stack([timespans, torch.log1p(timespans)], -1))))

    def flops_per_token(self) -> int:
        """Matmul FLOPs, multiply-add = 2."""
        return 2 * self.d_model * (2 + self.d_model)


class Decoder(nn.Module):
    """Features (B, D) of a row's last token to those (B, T, D) of each of its tokens, for the head.

    norm(gelu(W_2 norm(gelu(W_1 norm(h + p_t))))) with the sines and cosines p_t of place t, as in the auto-encoder of
    MAD (Poli et al. 2024, arXiv 2403.17844; `mad/model/auto_encoder.py`), where h is not normed before.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.norms = nn.ModuleList(make_norm(config.norm, d, config.norm_eps) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(2))

    def forward(self, last: Tensor, length: int) -> Tensor:
        """last (B, D) to (B, length, D)."""
        place = sinusoidal(torch.arange(length, device=last.device), last.shape[-1])
        x = self.norms[0](last[:, None] + place.to(last.dtype))
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            x = norm(F.gelu(layer(x)))
        return x


def sinusoidal(positions: Tensor, d_model: int) -> Tensor:
    """Sines and cosines of (B, T) positions, (B, T, D) float32 (Vaswani et al. 2017, section 3.5)."""
    frequency = torch.exp(torch.arange(0, d_model, 2, device=positions.device) * (-math.log(10000.0) / d_model))
    angle = positions[..., None].float() * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
