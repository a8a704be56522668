"""The files of the user's own that a run needs: recorded in its folder, and named when they are missing.

Only `ZOO_IMPORT` has a file imported, never what a run folder says: a folder may come from a stranger.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.core.errors import UsageError, UsageWarning
from zoo.core.files import write_atomic
from zoo.core.imports import IMPORTS
from zoo.core.readers import read_json, shown
from zoo.core.registry import Registry
from zoo.core.run_files import IMPORTED
from zoo.models.config import ModelConfig
from zoo.objectives.base import objectives
from zoo.pattern import parse, read_named
from zoo.protocol import mixers, norms
from zoo.residual import residuals
from zoo.tasks.protocol import registry as tasks

if TYPE_CHECKING:
    from zoo.training.fit import Parts

KINDS: dict[str, Registry[Any]] = {
    registry.kind: registry for registry in (tasks, objectives, mixers, norms, residuals)
}
MODEL_KINDS = (mixers.kind, norms.kind, residuals.kind)
"""Of what a model is made of, without its task or its teaching."""
_MOST_BYTES = 2**20


def needed(parts: Parts) -> list[dict[str, Any]]:
    """The words of an experiment that files outside the package register: kind, name, path as given, and digest."""
    return [*_outside([("task", parts.task.name), ("objective", parts.objective.name)]), *needed_by_model(parts.model)]


def needed_by_model(model: ModelConfig) -> list[dict[str, Any]]:
    """As `needed`, of a model alone."""
    recursion = model.recursion
    patterns = [model.pattern, recursion.outer if recursion is not None else None]
    trees = [parse(pattern) for pattern in patterns if pattern]
    words = sorted({name for tree in trees for name in tree.names()})
    of_steps = {word.step.norm for tree in trees for word in tree.words() if word.step.norm is not None}
    normed = sorted({read_named(norms, norm).name for norm in {model.norm, *of_steps}})
    used = [*(("mixer", word) for word in words), *(("norm", name) for name in normed)]
    return _outside([*used, (residuals.kind, read_named(residuals, model.residual).name)])


def _outside(used: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    found = [(kind, name, KINDS[kind].origin(name)) for kind, name in used]
    return [{"kind": kind, "name": name, **origin._asdict()} for kind, name, origin in found if origin is not None]


def record(folder: Path, parts: Parts) -> None:
    """Note in a run folder what the run needs, where it needs anything and that is not noted yet."""
    found = needed(parts)
    if found and not (folder / IMPORTED).exists():
        write_atomic(folder / IMPORTED, json.dumps(found, indent=1).encode() + b"\n")


def check(folder: Path, kinds: Collection[str] = tuple(KINDS)) -> None:
    """Make sure that the words of these kinds which a run needs are there; one whose file has changed is warned of.

    Raises:
        UsageError: one is missing; says which file registered it.
    """
    if not (folder / IMPORTED).exists():
        return
    try:
        noted = read_json(folder / IMPORTED, most=_MOST_BYTES)
    except UsageError as error:
        warnings.warn(f"What {shown(folder)} needs to be imported is not known: {error}", UsageWarning, stacklevel=2)
        return
    check_entries(folder, noted if isinstance(noted, list) else [noted], kinds)


def check_entries(folder: Path, noted: Iterable[Any], kinds: Collection[str] = tuple(KINDS)) -> None:
    """As `check`, with what `needed` or `needed_by_model` gave."""
    for entry in noted:
        match entry:
            case {"kind": str(kind), "name": str(name), "path": str(path), "sha256": str() | None as digest}:
                if kind in kinds and kind in KINDS:
                    _check(folder, KINDS[kind], name, path, digest)
            case _:
                told = f"{shown(folder)} notes {entry!r:.60}, which is no file that a model or a run needs: damaged?"
                warnings.warn(told, UsageWarning, stacklevel=2)


def _check(folder: Path, registry: Registry[Any], name: str, path: str, digest: str | None) -> None:
    what = f"{shown(folder)} needs the {registry.kind} {shown(name)!r} of {shown(path)}"
    if name not in registry:
        if _inside(Path(path), folder):
            told = "code in a run folder is never imported: copy it elsewhere if you trust it"
            raise UsageError(f"{what}: {told}, and set {IMPORTS} to the copy.")
        reason = registry.left_out(name) or "It is not imported."
        raise UsageError(f"{what}: set {IMPORTS}={shown(path)}. {reason}")
    origin = registry.origin(name)
    if origin is not None and digest is not None and origin.sha256 != digest:
        told = f"{what}, and {origin.path} is not the file it was then (its kernels' sources count)."
        warnings.warn(told, UsageWarning, stacklevel=2)


def _inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return True


__all__ = ["check", "check_entries", "needed", "needed_by_model", "record"]
