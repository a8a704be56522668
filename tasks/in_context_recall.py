"""In-context recall, the first task of MAD (Poli et al. 2024, arXiv 2403.17844)."""

from __future__ import annotations

from pydantic import PositiveInt

from zoo.core.options import Options
from zoo.tasks.protocol import register
from zoo.tasks.recall import PairRecall, Teach


@register("in_context_recall")
class InContextRecall(PairRecall):
    """Recall the value of each key when the key appears again.

    With vocab_size=8, seq_len=12 (keys 0 to 3, values 4 to 7, `.` is `IGNORE`), a held-out row:

        ```
                   key val key val key val key val key val key
        inputs      2   7   0   4   2   7   3   4   0   4   2
        targets     .   .   .   .   7   .   .   .   4   .   7
        ```

    A row is seq_len / 2 pairs, and its last value is not read. Each key is drawn from V / 2 keys, and each row draws a
    value for each key, so two keys may have the same value. The last key is one of the different keys before it. In
    training rows every next token is a target, in held-out rows the values of keys that appeared before. Slices:
    `n_keys`, different keys in the row, rounded up to the next of 1, 2, 3, 4, 6, 8, 12, ...
    """

    class Config(Options):
        """Options of `in_context_recall`."""

        vocab_size: PositiveInt = 16
        """V, half of it keys."""
        seq_len: PositiveInt = 128
        """Tokens of the pairs, even; a row reads one less."""
        teach: Teach = "all"
        """Targets of training rows: every next token, or only `values` of keys that appeared before."""

    mad_variations = {  # noqa: RUF012 - never written to
        "vocab_size": (32, 64, 128),
        "seq_len": (256, 512, 1024),
        "rows": (6400, 3200, 1600, 800),
    }
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self._set_up()
