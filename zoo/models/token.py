"""The token model: tokens through the backbone once, and the next state."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from zoo.door import read_ids, read_weights
from zoo.models.config import ModelConfig
from zoo.models.policy import Policy
from zoo.models.stack import Stack
from zoo.protocol import Context, admit


@final
class TokenModel(Stack):
    """Token ids (B, T) to logits (B, T, vocab_size), and the next state.

    In place of ids it reads weights (B, T, vocab_size) of tokens too, real numbers: the embedding of a step is then the
    sum of the embeddings of all tokens by their weights, that of its one token where one weight is 1 and all others 0.
    Words that look up tokens (`engram`) read `context.tokens` (B, T), by default the tokens of the largest weights.

    A model that is not causal takes no state and returns `()`.

    Attributes:
        unmasking_policy: which masked cell is unmasked next, where the config has one; passes of the model do not run
            it.
        halting: the halting head, where the config has one; only deep supervision of a loop reads it
            (`zoo.models.looped`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.unmasking_policy = None if config.unmasking_policy is None else Policy(config)
        self.halting = nn.Linear(config.d_model, 2) if config.halting else None
        if self.halting is not None:  # it says no at first, as TRM's
            nn.init.zeros_(self.halting.weight)
            nn.init.constant_(self.halting.bias, -5.0)

    def read(self, inputs: Any, context: Context | None) -> tuple[Tensor, Context]:
        n = self.config.vocab_size
        if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 3:
            weights = read_weights("model", inputs, n)
            given = None if context is None else context.tokens
            context = admit("model", context, len(weights), weights.shape[1], weights.device)
            looked_up = weights.argmax(-1) if given is None else given
            context.tokens = read_ids("model", "tokens", looked_up, "BT", n, "vocab_size")
            return weights, context
        tokens = read_ids("model", "tokens", inputs, "BT", self.config.vocab_size, "vocab_size")
        context = admit("model", context, len(tokens), tokens.shape[1], tokens.device)
        context.tokens = tokens
        return tokens, context
