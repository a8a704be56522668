"""Importing what registers words: the modules of a package, and the files and modules that `ZOO_IMPORT` names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from zoo.core.errors import UsageError, UsageWarning, closest, raised_at
from zoo.core.moved import moved
from zoo.core.run_files import CHECKPOINTS, is_run

IMPORTS = "ZOO_IMPORT"
"""The environment variable that names files and modules for every registry to import, separated by `os.pathsep`."""

OWN = ("zoo",)
# One lock for all registries, as one file may fill several and ask any of them; its holder may take it again.
lock = threading.RLock()
collecting: ContextVar[bool] = ContextVar("collecting", default=False)
_importing: ContextVar[str | None] = ContextVar("importing", default=None)


class Origin(NamedTuple):
    """A file, or a module by its name, that registers words: its name as given, and the digest of its contents then."""

    path: str
    sha256: str | None


origins: dict[str, Origin] = {}  # by the name of the module
failed: dict[str, tuple[Any, str]] = {}  # what ZOO_IMPORT names and cannot be imported: its stamp, and why
refused: dict[tuple[str, str], str] = {}  # what was left out and why, by the module it is from and a name of it


def discover(package: str) -> list[str]:
    """Import every module of a package, so that each can enter itself where it belongs; what is wrong with those that
    cannot be imported, a line each."""
    root = importlib.import_module(package)
    problems = []
    for module in pkgutil.iter_modules(root.__path__, package + "."):
        try:
            with collected():
                importlib.import_module(module.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            refused[module.name, ""] = f"{module.name} failed: {_why(error)}"
            problems.append(refused[module.name, ""])
    return problems


def import_source(source: str, given_as: str) -> None:
    """Import a Python file, or a module by its name, so that what it registers can be named; a file only once.

    A word that cannot be registered is left out, with a `UsageWarning`; the others are kept.

    Args:
        source: a path that ends in .py, or a module's name.
        given_as: where it was said, for errors.

    Raises:
        UsageError: there is no such file or module, it fails, or it lies in a run folder: code that comes with a run is
            never imported.
    """
    with lock, collected():
        try:
            if source.endswith(".py"):
                _import_file(source)
            elif os.path.exists(source) and not source.isidentifier():
                raise UsageError("it is no file that ends in .py, nor a module's name")
            else:
                module = importlib.import_module(source)
                origins[source] = Origin(source, _digest(getattr(module, "__file__", None)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UsageError(f"{given_as} {source!r} failed: {_why(error)}") from None


def _import_file(source: str) -> None:
    path = Path(source).resolve()
    if any(_is_run(folder) for folder in path.parents):
        raise UsageError("it lies in a run folder, whose code is never imported; copy it elsewhere if you trust it")
    if path.exists() and not path.is_file():
        raise UsageError("it is a folder" if path.is_dir() else "it is no file")  # a pipe would never end
    if any(_is_file(module, path) for module in list(sys.modules.values())):
        return
    # A file called copy.py must not pass for Python's own, nor a-b.py for a_b.py.
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    origins[name] = Origin(source, _digest(path))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    token = _importing.set(name)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _importing.reset(token)


def add_source(path: str | Path) -> None:
    """Make another source of the file that is being imported, such as that of a kernel, part of the file's digest."""
    name = _importing.get()
    if name is not None:
        origin = origins[name]
        both = f"{origin.sha256} {_digest(path)}".encode()
        origins[name] = origin._replace(sha256=hashlib.sha256(both).hexdigest())


def _is_run(folder: Path) -> bool:
    return is_run(folder) and (folder / CHECKPOINTS).is_dir()


def _is_file(module: Any, path: Path) -> bool:
    """Whether a module that is loaded, the running script too, is this file."""
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and os.path.basename(file) == path.name and Path(file).resolve() == path


def _digest(file: Any) -> str | None:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, TypeError, ValueError):
        return None


def _why(error: BaseException) -> str:
    """An import's error in one line, with the file and the line that raised it."""
    text = " ".join(str(error).split()).rstrip(".")
    where = _line(error)
    if isinstance(error, UsageError):
        return f"{text}{where}."
    if isinstance(error, SystemExit):
        return f"it ends the process (sys.exit({error.code!r})){where}."
    if type(error).__module__.startswith("pydantic"):  # which says how pydantic itself could be changed
        text = re.split(r"; if | Set `| For further ", text)[0].rstrip(".")
    now: str | None = None
    likely = ""
    if isinstance(error, ImportError) and (found := re.match(r"(cannot import name '(\w+)' from '([\w.]+)')", text)):
        text, name, module = found.groups()  # without the path of the module
        now, likely = moved(f"{module}.{name}"), closest(name, dir(sys.modules.get(module)))
    elif isinstance(error, ModuleNotFoundError):
        now = moved(str(error.name))
    elif isinstance(error, AttributeError) and error.name is not None:
        likely = closest(error.name, dir(error.obj))
    text = (f"{type(error).__name__}: {text}" if text else type(error).__name__) + where
    return f"{text}; {now}." if now else f"{text}.{likely}"


def _line(error: BaseException) -> str:
    """` (own.py, line 3)`: the line of the imported file, or of one beside it, at which the import failed.

    Empty where no line of it was reached, and for a SyntaxError, whose text says the same.
    """
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    machinery = (__file__, importlib.__file__)
    imported = next((file for file in files if not file.startswith("<") and file not in machinery), None)
    return "" if imported is None or isinstance(error, SyntaxError) else raised_at(error, Path(imported).parent)


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Within it, a word that cannot be registered is left out with a warning instead of an error."""
    token = collecting.set(True)
    try:
        yield
    finally:
        collecting.reset(token)


def leave_out(module: str, name: str, problem: str) -> None:
    """Note, with a warning, that a thing of a module is not registered."""
    refused[module, name] = problem
    warn(problem)


def has_problems(known: Collection[tuple[str, str]] = ()) -> bool:
    """Whether something could not be imported or registered, of the package or of what `ZOO_IMPORT` names; of other
    files, whether something that is not `known` could not."""
    named = os.environ.get(IMPORTS, "").split(os.pathsep)
    files = {module: origin_of(module) for module, _ in refused}
    return bool(failed_imports()) or any(
        (module, name) not in known or (origin := files[module]) is None or origin.path in named
        for module, name in refused
    )


def warn(problem: str) -> None:
    warnings.warn(problem, UsageWarning, stacklevel=3)


def stamp(source: str) -> Any:
    """What changes when a file does, so that one that failed is tried again."""
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def import_all(named: str) -> None:
    """Import what the environment variable names; what fails is left out, once with a warning."""
    sources = [source for source in named.split(os.pathsep) if source]
    for source in [source for source in failed if source not in sources]:
        del failed[source]
    for source in sources:
        now = stamp(source)
        if source in failed and failed[source][0] == now:
            continue
        try:
            import_source(source, IMPORTS)
            failed.pop(source, None)
        except UsageError as error:
            failed[source] = now, str(error)
            warn(str(error))


def failed_imports() -> list[str]:
    """What `ZOO_IMPORT` names and could not be imported so far: a line each."""
    named = os.environ.get(IMPORTS, "").split(os.pathsep)
    return [problem for source, (_, problem) in failed.items() if source in named]


def origin_of(module: str) -> Origin | None:
    """The file or module that a module came from, or None where it is the package's own."""
    if module.partition(".")[0] in OWN:
        return None
    if module in origins:
        return origins[module]
    parent = next((name for name in origins if module.startswith(name + ".")), None)  # of a package
    if parent is not None:
        return origins[parent]
    file = getattr(sys.modules.get(module), "__file__", None)
    return Origin(file or module, _digest(file))


def file_of(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None
