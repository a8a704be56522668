"""Noisy in-context recall, a task of MAD (Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from zoo.core.options import Options
from zoo.tasks.protocol import register
from zoo.tasks.recall import PairRecall, Teach


@register("noisy_recall")
class NoisyRecall(PairRecall):
    """Recall the value of each key when the key appears again, among tokens of noise.

    With vocab_size=12, noise_vocab_size=4, seq_len=14 (keys 0 to 3, values 4 to 7, noise 8 to 11, `.` is `IGNORE`), a
    held-out row:

        ```
                   key val  ~   ~  key val key val  ~   ~  key val key
        inputs      2   7   9  11   0   4   2   7  10   8   3   4   0
        targets     .   .   .   .   .   .   7   .   .   .   .   .   4
        ```

    As `in_context_recall`, but with the probability `frac_noise` a pair is replaced by two tokens of noise. The last
    pair and the pair that is drawn first are never replaced.
    """

    class Config(Options):
        """Options of `noisy_recall`."""

        vocab_size: PositiveInt = 32
        """V, noise included; half of the rest is keys."""
        seq_len: PositiveInt = 128
        """Tokens of the pairs, even; a row reads one less."""
        noise_vocab_size: PositiveInt = 16
        """Number of noise tokens."""
        frac_noise: Annotated[float, Field(ge=0, lt=1)] = 0.2
        """Share of the pairs that are noise."""
        teach: Teach = "all"
        """Targets of training rows: every next token, or only `values` of keys that appeared before."""

    mad_variations = {  # noqa: RUF012 - never written to
        "vocab_size": (48, 80, 144),
        "seq_len": (256, 512, 1024),
        "rows": (6400, 3200, 1600, 800),
        "frac_noise": (0.4, 0.6, 0.8),
    }
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.noise_tokens, self.noise_share = config.noise_vocab_size, config.frac_noise
        self._set_up()
