"""Files that are written whole or not at all; an error of the file system is one line."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from zoo.core.errors import RunError, UsageError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system into a `RunError` that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}.") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write and flush to the disk; the file may be torn if this is cut short."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder last through a crash."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path`: a reader sees the old content or the new, whatever happens meanwhile.

    Raises:
        RunError: the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            write_bytes(temporary, data)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_output(path: str | Path, data: bytes) -> Path:
    """Write a file that a person named, with its folders, as `write_atomic` does.

    Raises:
        UsageError: it cannot be written there.
    """
    path = _no_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        raise UsageError(f"{str(path)!r} cannot be written: {getattr(cause, 'strerror', None) or error}.") from None
    return path


PAGES = (".html", ".htm")


def check_page(path: str | Path) -> None:
    """Check that a page can have this name, before any work is done for it.

    Raises:
        UsageError: it is a folder's, or a file's of another kind.
    """
    path = _no_folder(path)
    if path.suffix.lower() not in PAGES:
        raise UsageError(f"{str(path)!r} is not allowed: a report is a page, whose name ends in {' or '.join(PAGES)}.")


def _no_folder(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise UsageError(
            f"{str(path)!r} is a folder: expected the name of a file, such as {str(path / 'report.html')!r}."
        )
    return path


def open_own(path: Path, *, keep: bool = False) -> Any:
    """Open a file of a run for writing, its content kept or gone; never one that a link leads to.

    Raises:
        OSError: the file system refuses, or there is a link in its place.
    """
    if not keep:
        path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if keep else os.O_EXCL)
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(descriptor, "ab" if keep else "wb")


def set_aside(paths: Iterable[Path], trash: Path) -> None:
    """Move files and folders into a new folder, all of them or none.

    Raises:
        RunError: one cannot be moved; then all are where they were.
    """
    moved: list[tuple[Path, Path]] = []
    at = trash
    try:
        trash.mkdir()
        for at in paths:
            at.rename(trash / at.name)
            moved.append((at, trash / at.name))
    except OSError as error:
        for old, new in reversed(moved):
            new.rename(old)
        with contextlib.suppress(OSError):
            trash.rmdir()
        raise RunError(f"Cannot delete {at}: {error.strerror or error}; nothing was deleted.") from None


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure in the format that the file's name asks for.

    Raises:
        UsageError: a format that matplotlib does not write.
        RunError: the file system refuses.
    """
    formats = figure.canvas.get_supported_filetypes()
    suffix = path.suffix.removeprefix(".")
    if suffix not in formats:
        raise UsageError(f"{str(path)!r} has no ending that names a picture format. Available: {', '.join(formats)}.")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=150)
    write_atomic(path, buffer.getvalue())
