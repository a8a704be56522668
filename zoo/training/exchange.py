"""Folders of models from one format into another: `zoo export` and `zoo import`."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from pathlib import Path

from zoo.core.errors import UsageError, unknown
from zoo.core.readers import check_path, read_bytes, shown
from zoo.interop import rwkv
from zoo.interop.hf import from_hf, to_hf, weight_maps
from zoo.models.ends import Ends
from zoo.training.saving import TEXT_FILES, save
from zoo.training.sources import kind_of
from zoo.training.starting import open_model

FORMATS = ("hf", "zoo")
MOST_BYTES_OF_TEXT = 2**30


def export_model(source: str | Path, out: str | Path, *, form: str = "hf", which: str = "best") -> Path:
    """Write the model of a folder in a published format, or as `zoo.save` does.

    Args:
        source: a run folder, one of its checkpoints, a folder of `zoo.save`, or a published checkpoint.
        out: a folder that does not exist or is empty; it appears whole or not at all.
        form: "hf", `config.json` and the weights as transformers reads them, for models of families; or "zoo".
        which: checkpoint of a run: "best", "last", or one such as "step_300".

    Raises:
        UsageError: no such source or format, or a model that has no published form, with the reason.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    kind = kind_of(source)
    model, _ = open_model(source, which)
    texts = {} if kind == "run" else _texts(Path(source))
    if form == "zoo":
        return save(model, out, text_files=texts)
    try:
        weight_maps(model.config)
    except UsageError as error:
        told = "--format zoo writes it as zoo.save does"
        raise UsageError(f"{shown(source)} has no published format: {str(error).rstrip('.')}; {told}.") from None
    return _written_whole(model, check_path(out), texts)


def import_model(source: str | Path, out: str | Path) -> Path:
    """Write the model of a published checkpoint as `zoo.save` does.

    Args:
        source: a checkpoint folder as `zoo.from_hf` reads it, or a `.pth` file of the authors of RWKV-7.
        out: a folder that does not exist or is empty.

    Raises:
        UsageError: no such source, a model that is not supported, or a folder that is the zoo's own.
    """
    path = check_path(source)
    if path.is_file():
        if path.suffix != ".pth":
            told = "a checkpoint folder with a config.json, or a .pth file of RWKV-7"
            raise UsageError(f"{shown(path)} cannot be imported: it should be {told}.")
        return save(rwkv.from_authors(path), out)
    if (kind := kind_of(path)) != "published":
        what = "a run" if kind == "run" else "a saved model"
        raise UsageError(f"{shown(path)} is {what} of the zoo already: zoo export {path} {out} --format zoo copies it.")
    return save(from_hf(path), out, text_files=_texts(path))


def _texts(folder: Path) -> dict[str, bytes]:
    """The files of a folder that say how its tokens are read and written."""
    return {n: read_bytes(folder / n, most=MOST_BYTES_OF_TEXT) for n in TEXT_FILES if (folder / n).exists()}


def _written_whole(model: Ends, out: Path, texts: dict[str, bytes]) -> Path:
    """As `to_hf`, under another name first."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{shown(out)} is not empty: nothing was written. Choose another folder, or delete it first.")
    temporary = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        to_hf(model, temporary)
        for name, content in texts.items():
            (temporary / name).write_bytes(content)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UsageError(f"{shown(out)} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


__all__ = ["FORMATS", "export_model", "import_model"]
