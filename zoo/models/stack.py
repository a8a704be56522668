"""Models that read their inputs through the backbone once, whatever the inputs are, and carry its state on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import UsageError
from zoo.models.ends import Ends, sinusoidal
from zoo.ops.modules import bare
from zoo.protocol import Context, Mixer, State, check_state, first_parameter_like
from zoo.states import document_positions, next_position, tree_bytes


class ModelState(NamedTuple):
    """position: (B,) int64, steps of the current document already seen; layers: the backbone's state."""

    position: Tensor
    layers: State


class Stack(Ends):
    """Inputs through the backbone once, to outputs and the next state; a subclass says what inputs are.

    A model that is not causal takes no state and returns `()`.
    """

    @abstractmethod
    def read(self, inputs: Any, context: Context | None) -> tuple[Tensor, Context]:
        """The inputs of a pass and its context, checked, as the embedding takes them.

        Raises:
            UsageError: inputs or a field of the context that do not fit the model or each other.
        """

    def features(
        self, inputs: Tensor, state: ModelState | tuple[()] | None = None, context: Context | None = None
    ) -> tuple[Tensor, ModelState | tuple[()]]:
        """As `forward`, up to the normed hidden states (B, T, D) that `logits` reads.

        Of a sequence that is cut over processes (`context.pieces`), the inputs are one piece, and no state is returned.
        """
        if not self.causal and isinstance(state, ModelState):
            raise UsageError("A model with causal=False reads whole sequences and takes no state.")
        inputs, context = self.read(inputs, context)
        if state is not None and not torch.compiler.is_compiling():
            check_state("model", self, state, len(inputs), self.compute_dtype())
        carried = state if isinstance(state, ModelState) else None
        start = carried.position if carried else torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        if context.pieces is not None:
            if carried:
                raise UsageError("A sequence that is cut over processes starts from rest: give no state.")
            start = context.pieces.positions(len(inputs), context.resets, inputs.device)
        positions = document_positions(start, inputs.shape[1], context.resets)
        seen = positions
        if context.lengths is not None:  # padding stands nowhere, and so never beyond max_len
            padding = torch.arange(inputs.shape[1], device=inputs.device) >= context.lengths[:, None]
            seen = positions.masked_fill(padding, 0)
        x = self.embed(inputs, seen, context.timespans)
        how = {"recompute": True} if self.recompute else {}
        x, layers = self.backbone(x, carried.layers if carried else None, context, **how)
        x = self.norm(x)
        if not self.causal or context.pieces is not None:
            return x, ()
        return x, ModelState(next_position(positions, start, context.lengths), layers)

    def step(self, inputs: Tensor, state: State, context: Context | None = None) -> tuple[Tensor, State]:
        if context is not None or not self._decodes(inputs, state):
            return super().step(inputs, state, context)
        inputs, context = self.read(inputs[:, None], None)
        check_state("model", self, state, len(inputs), self.compute_dtype())
        position, layers = state
        x, layers = self.backbone(self.embed(inputs, position[:, None]), layers, context)
        return self.logits(self.norm(x)).squeeze(1), ModelState(position + 1, layers)

    def _decodes(self, inputs: Tensor, state: State) -> bool:
        """Whether a step is a decoder's: without gradients, of a model to which nothing is attached."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(state, ModelState):
            return False
        return inputs.ndim == (1 if self.config.inputs is None else 2) and bare(self, cls=type(self))

    def embed(self, inputs: Tensor, positions: Tensor, timespans: Tensor | None = None) -> Tensor:
        """Inputs, positions and timespans (B, T; 1 by default) to (B, T, D)."""
        soft = inputs.ndim == 3 and self.config.inputs is None
        x = self._weighted(inputs) if soft else self.embedding(inputs)
        x = x.to(self.compute_dtype())  # autocast leaves a linear layer's output in half precision
        x = x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale
        if self.time_feature is not None:
            timespans = x.new_ones(positions.shape) if timespans is None else timespans
            x = x + self.time_feature(timespans.to(x.dtype))
        if self.positions is not None:
            on_hand = (
                positions.device.type == "cpu" and not torch.compiler.is_compiling()
            )  # else it would be waited for
            longest = self.config.max_len or 0
            if on_hand and (n := int(positions.max()) + 1) > longest:
                raise UsageError(f"{n} tokens are more than max_len={longest}.")
            x = x + self.positions(positions)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoidal(positions, self.config.d_model).to(x.dtype)
        x = self.embedding_norm(x)
        return F.dropout(x, self.config.dropout) if self.training else x

    def _weighted(self, weights: Tensor) -> Tensor:
        """The embeddings of all tokens by their weights (B, T, vocab_size), summed, (B, T, D)."""
        if bare(self.embedding, cls=nn.Embedding):
            table = self.embedding.weight
        else:
            table = self.embedding(torch.arange(weights.shape[-1], device=weights.device))
        return weights.to(table.dtype) @ table

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState | tuple[()]:
        """The state at rest, as `Mixer.init_state`; `()` for a model that is not causal."""
        if not self.causal:
            return ()
        device, dtype = first_parameter_like(self, device, dtype)
        layers = self.backbone.init_state(batch_size, capacity=capacity, device=device, dtype=dtype)
        return ModelState(torch.zeros(batch_size, dtype=torch.int64, device=device), layers)

    def mixers(self) -> list[Mixer]:
        """All mixers, in order."""
        return self.backbone.mixers()

    def flops_per_token(self, context_length: int) -> int:
        """Matmul FLOPs (multiply-add = 2) to read one step at a context of `context_length`, both ends included.

        With a decoder, to predict it again too.
        """
        ends = 2 * self.config.d_model * (self.config.n_outputs + (self.config.inputs or 0))
        time = 0 if self.time_feature is None else self.time_feature.flops_per_token()
        decoder = 0 if self.decoder is None else 4 * self.config.d_model**2
        return ends + time + decoder + self.backbone.flops_per_token(context_length)

    def state_bytes(self, batch_size: int, context_length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state after `context_length` tokens; 0 for a model that is not causal."""
        if not self.causal:
            return 0
        position = tree_bytes(torch.empty(batch_size, dtype=torch.int64, device="meta"))
        return position + self.backbone.state_bytes(batch_size, context_length, dtype)
