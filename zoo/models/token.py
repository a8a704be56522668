"""The token model: tokens through the backbone once, and the next state."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from zoo.door import read_ids
from zoo.models.config import ModelConfig
from zoo.models.policy import Policy
from zoo.models.stack import Stack
from zoo.protocol import Context, admit


@final
class TokenModel(Stack):
    """Token ids (B, T) to logits (B, T, vocab_size), and the next state.

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
        tokens = read_ids("model", "tokens", inputs, "BT", self.config.vocab_size, "vocab_size")
        context = admit("model", context, len(tokens), tokens.shape[1], tokens.device)
        context.tokens = tokens
        return tokens, context
