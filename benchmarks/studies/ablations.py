"""What each part of a layer does for recall, one change at a time: the sweep `ablations`.

    python -m zoo.benchmarks.studies.ablations

makes the page from the store `ablations`.
"""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from zoo.benchmarks.studies.sweep_study import Read, Stored, SweepStudy, comparison_table, gap_table
from zoo.report.trials.compare import Comparison, compare

STORE, KEY, LEARNED = "ablations", "words.layers", "0.9"
GROUPS = {
    "Gated delta rule": (
        "2*(gated_deltanet(A_init_range=[0.0, 1.0]))",
        "2*(gated_deltanet(A_init_range=[0.0, 1.0], conv_size=0))",
        "2*(gated_deltanet(A_init_range=[0.0, 1.0], gate=False))",
        "2*(gated_deltanet(A_init_range=[0.0, 1.0], n_heads=4))",
        "2*(gated_deltanet(A_init_range=[0.0, 1.0], allow_neg_eigval=True))",
        "2*(gated_deltanet)",
        "2*(deltanet)",
    ),
    "Attention": (
        "2*(mha(n_heads=4))",
        "2*(mha(n_heads=4, canon=4))",
        "2*(mha(n_heads=4, qk_norm=True))",
        "2*(mha(n_heads=1))",
        "short_conv mha(n_heads=4)",
    ),
    "Feature maps of linear attention": (
        "short_conv linear_attention",
        *(f'short_conv linear_attention(feature_map="{name}")' for name in ("relu", "identity", "taylor", "rebased")),
    ),
    "Loops": (
        "2*(mha(n_heads=4) swiglu)",
        "loop(2, mha(n_heads=4) swiglu)",
        "loop(4, mha(n_heads=4) swiglu)",
    ),
}
"""Patterns by what they are about; the first of each is the one that the others change."""

ABOUT = """
The task is that of [recall against state bytes](recall_state.md): 4, 8 or 16 pairs in rows of 64 tokens,
width 64. The first pattern of each group is the one that the others change. Differences are to that one,
paired by seed and test row.
"""
RULES = """
The learning rate is the better of two on validation, at a seed of its own. A seed has learned if its accuracy
is {learned} or more. Training ends at 99 % of the validation answers, or after 800 steps of 64 rows. A task
that both patterns solve does not tell them apart; then the steps say which was quicker.
"""


def compared(read: Read, patterns: tuple[str, ...]) -> Comparison | None:
    """A comparison of the patterns of a group; None where none has a result."""
    stored = read[STORE]
    if stored.trials is None or not any(stored.results({KEY: pattern}) for pattern in patterns):
        return None
    frames = stored.trials.frames
    kept = frames["trials"].filter(pl.col(f"set.{KEY}").is_in(patterns))
    trials = replace(stored.trials, frames={**frames, "trials": kept})
    baseline = patterns[0] if stored.results({KEY: patterns[0]}) else None
    return compare(trials, [KEY], best=["train.lr"], baseline=baseline, learned=LEARNED)


def sections(read: Read) -> dict[str, list[str]]:
    found = {title: compared(read, patterns) for title, patterns in GROUPS.items()}
    return {title: [*comparison_table(c), "", *gap_table(c)] if c else [] for title, c in found.items()}


STUDY = SweepStudy(
    "ablations",
    __doc__,
    (Stored(STORE, "zoo sweep ablations"),),
    "Ablations: one change at a time",
    (ABOUT, RULES.format(learned=LEARNED)),
    sections,
)

if __name__ == "__main__":
    STUDY.main()
