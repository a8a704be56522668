"""What `zoo sweep` does with the texts of its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.core.errors import UsageError, quoted
from zoo.sweeps.config import read_sweep_config
from zoo.sweeps.sweep import dry_run, run_sweep, summary
from zoo.training.recipes import parse_overrides


def run(
    source: str,
    overrides: Sequence[str],
    *,
    variants: Sequence[str],
    seeds: str | None,
    choose: str | None,
    choose_seeds: str | None,
    budget: Mapping[str, Any],
    options: Mapping[str, Any],
    address: str | None,
    ray: bool | None,
    dry: bool,
    quiet: bool,
) -> tuple[list[str], int]:
    """The lines to print at the end, and the exit status: 1 if a trial failed.

    Raises:
        UsageError: any wrong option.
        Interrupted: see `zoo.sweeps.sweep.sweep`.
    """
    given: dict[str, Any] = dict(options)
    if seeds is not None:
        given["seeds"] = numbers(seeds, "--seeds")
    if (choose is None) != (choose_seeds is None):
        raise UsageError("--choose KEY and --choose-seeds 100,101 go together: the choice has seeds of its own.")
    if choose is not None and choose_seeds is not None:
        given["choose"] = {"key": choose, "seeds": numbers(choose_seeds, "--choose-seeds")}
    if any(v is not None for v in budget.values()):
        given["budget"] = {k: v for k, v in budget.items() if v is not None}
    config = read_sweep_config(source, parse_overrides(overrides), list(variants), **given)
    if dry:
        return dry_run(config), 0
    done = run_sweep(config, address=address, ray=ray, quiet=quiet)
    return summary(done), int(done.failed > 0)


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        told = "it should be whole numbers between commas, such as 0,1,2"
        raise UsageError(f"{option} {quoted(text, 40)} is not allowed: {told}.") from None


__all__ = ["numbers", "run"]
