"""Folders that a model comes from: of which kind each is, and the options of its model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from zoo.core.errors import UsageError
from zoo.core.readers import check_path
from zoo.core.run_files import CHECKPOINTS, CONFIG, is_run, no_run, read_whole_config, run_of
from zoo.interop.hf import CONFIG as PUBLISHED
from zoo.interop.hf import read_json
from zoo.models.config import ModelConfig
from zoo.models.families import families
from zoo.training import checkpoints
from zoo.training.checkpoint import is_checkpoint
from zoo.training.saving import MODEL, is_saved, saved_options

Kind = Literal["run", "saved", "published"]


def kind_of(path: str | Path) -> Kind:
    """Whether a folder is that of a run (or a checkpoint of one), of a saved model, or of a published checkpoint.

    Raises:
        UsageError: it is none of them.
    """
    folder = check_path(path)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {str(path)!r}.")
    if is_run(folder) or is_checkpoint(folder):
        return "run"
    if is_saved(folder):
        return "saved"
    if (folder / PUBLISHED).exists():
        return "published"
    if any(is_run(p) for p in folder.iterdir() if p.is_dir()):
        raise UsageError(no_run(folder))
    kinds = f"a run folder, with {CONFIG}, nor a saved model, with {MODEL}, nor a checkpoint folder, with {PUBLISHED}"
    raise UsageError(f"{path} is neither {kinds}.")


def options_of(path: str | Path, which: str = "best") -> dict[str, Any]:
    """The options of the model of a folder.

    Raises:
        UsageError: no such folder, or one that is damaged or of a model that is not supported.
    """
    folder, kind = Path(path), kind_of(path)
    if kind == "run":
        return dict(read_whole_config(run_of(checkpoints.find(folder, which)))["model"])
    if kind == "saved":
        return saved_options(folder)
    config = read_json(folder / PUBLISHED, folder)
    return ModelConfig(**families.of_config(config).model_options(config)).model_dump(mode="json")


def model_section(init: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of the model that a training into a folder starts from; of a training that has begun, its own, where
    the source is gone.

    Raises:
        UsageError: there is no such source.
    """
    which = init.get("which", "best")
    try:
        return options_of(str(init["source"]), str(which))
    except UsageError:
        begun = checkpoints.config_of(folder / CHECKPOINTS) or {}
        if same_source(begun.get("init"), init):
            return dict(begun["model"])
        raise


def same_source(one: Any, other: Any) -> bool:
    """Whether two sections `init` name the same source, whatever else they say."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    return all(one.get(k, default) == other.get(k, default) for k, default in (("source", None), ("which", "best")))


__all__ = ["Kind", "kind_of", "model_section", "options_of", "same_source"]
