"""Names, strict options and errors: the ground that tasks and zoo both stand on.

Everything a user can name (a mixer, a task, an objective) sits in a `Registry`; everything a user can set is a field
of an `Options` class. Both refuse what they do not know in one line: what was given, what is allowed, the likely slip.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

T = TypeVar("T")
O = TypeVar("O", bound="Options")


class UsageError(ValueError):
    """Wrong input from a person. Its text is one line; the `zoo` command prints it and exits with status 2."""


class UsageWarning(UserWarning):
    """Something that was left aside, and why. Its text is one line; the `zoo` command prints it on standard error."""


def closest(given: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` where a name is near enough, else an empty string."""
    near = difflib.get_close_matches(str(given), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, given: object, allowed: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `allowed`."""
    allowed = list(allowed)
    listing = ", ".join(allowed) or "none"
    return UsageError(f"Unknown {kind} {quoted(given)}.{closest(str(given), allowed)} Available: {listing}.")


def quoted(value: object, most: int = 100) -> str:
    """A value as in Python, for an error message; cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, or a value that holds itself
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else f"{text[:most]}..."


def describe(error: ValidationError, model: type[BaseModel], what: str) -> str:
    """One line for a pydantic error: the first thing that is wrong, with the closest match and the full list."""
    # A name that is not known comes first: what is reported missing beside it is often the one that was meant.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        allowed = list(owner.model_fields) if owner else []
        return str(
            unknown(f"option of {what}" if len(path) < 2 else f"key in {'.'.join(path[:-1])}", path[-1], allowed)
        )
    if first["type"] == "missing":
        return f"{what} needs {where!r}, which was not given."
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, UsageError):  # a validator of ours has already said it all
        return str(cause)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    prefix = f"{what}: {where}={quoted(first['input'])}" if where else f"{what}"
    hint = ""
    if first["type"] == "bool_type":
        message = "a boolean: true or false"
    elif first["type"] in ("model_type", "model_attributes_type") and (nested := _model_at(model, path)):
        message = f"a mapping of the keys {', '.join(nested.model_fields)}"
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = closest(
            first["input"], [w.strip("' ") for w in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        )
    return f"{prefix} is not allowed: it should be {message}.{hint}" if where else f"{what}: {message}"


def _model_at(model: type[BaseModel] | None, path: list[str]) -> type[BaseModel] | None:
    for name in path:
        if model is None or name not in model.model_fields:
            return None
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return model


MOST = 2**24
"""How large a whole number among options may be where its field names no other bound: above every size and count that a
model or a task of this kind has, and low enough for two of them to be multiplied in 64 bits."""


class Options(BaseModel):
    """Strict, frozen options: an unknown name, a wrong type or a number beyond any use is a `UsageError` at
    construction. A number of numpy's is taken as the Python number that it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    _most: ClassVar[int] = MOST

    def __init__(self, **data: Any):
        try:
            super().__init__(**{name: _of_python(value) for name, value in data.items()})
        except ValidationError as error:
            what = getattr(type(self), "_label", type(self).__name__)
            raise UsageError(describe(error, type(self), what)) from None

    @model_validator(mode="after")
    def _is_within_reach(self) -> Any:
        bounded = _bounded(type(self))
        for name in type(self).model_fields:
            for value in _scalars(getattr(self, name)):
                told = ""
                if isinstance(value, str):
                    told = "hold no character NUL" if "\0" in value else ""
                elif abs(value) > self._most and name not in bounded:
                    told = f"be at most {self._most:,}"
                if told:
                    what = getattr(type(self), "_label", type(self).__name__)
                    raise UsageError(f"{what}: {name}={quoted(value)} is not allowed: it should {told}.")
        return self

    @classmethod
    def of(cls, value: Any) -> Any:
        """The options that a mapping spells; any other value as it is, for validation to judge."""
        return cls(**{str(k): v for k, v in value.items()}) if isinstance(value, Mapping) else value

    def given(self) -> dict[str, Any]:
        """The options that were named at construction, defaults or not, in order of declaration."""
        return {k: getattr(self, k) for k in type(self).model_fields if k in self.model_fields_set}

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, in order of declaration."""
        fields = type(self).model_fields
        return {
            k: getattr(self, k)
            for k, f in fields.items()
            if getattr(self, k) != f.get_default(call_default_factory=True)
        }


@functools.cache
def _bounded(options: type[Options]) -> frozenset[str]:
    """The fields that say themselves how large they may be."""
    fields = options.model_fields.items()
    return frozenset(name for name, field in fields if _has_upper_bound([*field.metadata, field.annotation]))


def _has_upper_bound(parts: Iterable[Any]) -> bool:
    inner = [part for part in parts if not isinstance(part, str | int | float)]
    return any(
        getattr(part, "le", getattr(part, "lt", None)) is not None
        or _has_upper_bound([*getattr(part, "metadata", ()), *getattr(part, "__metadata__", ()), *get_args(part)])
        for part in inner
    )


def _scalars(value: Any) -> Iterator[int | str]:
    """The whole numbers and texts of an option's value; those in mappings are options of something else."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _scalars(part)
    elif isinstance(value, int | str) and not isinstance(value, bool):
        yield value


def _of_python(value: Any) -> Any:
    """A value, or those of a list, without numpy's types of number."""
    if type(value) in (tuple, list):
        return type(value)(part.item() if isinstance(part, np.generic) else part for part in value)
    return value.item() if isinstance(value, np.generic) else value


IMPORTS = "ZOO_IMPORT"
"""The environment variable that names files and modules for every registry to import, separated by `os.pathsep`."""

_OWN = ("zoo", "tasks", "benchmarks")
# One lock for all registries, as one file may fill several and ask any of them; its holder may take it again.
_lock = threading.RLock()
_collecting: ContextVar[bool] = ContextVar("collecting", default=False)


class Origin(NamedTuple):
    """A file, or a module by its name, that registers words: as it was given, and the digest of what it held then."""

    path: str
    sha256: str | None


_origins: dict[str, Origin] = {}  # by the name of the module
_failed: dict[str, tuple[Any, str]] = {}  # what ZOO_IMPORT names and cannot be imported: its stamp, and why


def discover(package: str) -> list[str]:
    """Import every module of a package, so that each can enter itself where it belongs; what is wrong with those that
    cannot be imported, a line each."""
    root = importlib.import_module(package)
    problems = []
    for module in pkgutil.iter_modules(root.__path__, package + "."):
        try:
            with _collected():
                importlib.import_module(module.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problems.append(f"{module.name} failed: {_why(error)}.")
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
    with _lock, _collected():
        try:
            if source.endswith(".py"):
                _import_file(source)
            elif os.path.exists(source) and not source.isidentifier():
                raise UsageError("it is no file that ends in .py, nor a module's name")
            else:
                module = importlib.import_module(source)
                _origins[source] = Origin(source, _digest(getattr(module, "__file__", None)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UsageError(f"{given_as} {source!r} failed: {_why(error)}.") from None


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
    _origins[name] = Origin(source, _digest(path))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


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
    """An import's error in one line."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, UsageError):
        return text
    if isinstance(error, SystemExit):
        return f"it ends the process (sys.exit({error.code!r}))"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Within it, a word that cannot be registered is left out with a warning instead of an error."""
    token = _collecting.set(True)
    try:
        yield
    finally:
        _collecting.reset(token)


def _warn(problem: str) -> None:
    warnings.warn(problem, UsageWarning, stacklevel=3)


def _stamp(source: str) -> Any:
    """What changes when a file does, so that one that failed is tried again."""
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _import_all(named: str) -> None:
    """Import what the environment variable names; what fails is left out, once with a warning."""
    sources = [source for source in named.split(os.pathsep) if source]
    for source in [source for source in _failed if source not in sources]:
        del _failed[source]
    for source in sources:
        stamp = _stamp(source)
        if source in _failed and _failed[source][0] == stamp:
            continue
        try:
            import_source(source, IMPORTS)
            _failed.pop(source, None)
        except UsageError as error:
            _failed[source] = stamp, str(error)
            _warn(str(error))


def failed_imports() -> list[str]:
    """What `ZOO_IMPORT` names and could not be imported so far: a line each."""
    return [problem for _, problem in _failed.values()]


class Registry(Generic[T]):
    """Things by name, classes mostly. Every module of the given packages is imported on first use, so a new file
    registers itself; files elsewhere do where the environment variable `ZOO_IMPORT` names them.

    A class that does not keep the contract is refused when it registers, alone: in a file that a registry imports,
    with a `UsageWarning`; anywhere else with a `UsageError`. Any thread may ask first.

    Args:
        kind: what the things are, for messages.
        packages: whose modules register some.
        base: the class that they all subclass: its abstract methods, and the signatures of all its methods, are the
            contract, and so is a nested class `Config` of options.
        settings: class attributes of a few values.
    """

    def __init__(
        self, kind: str, *packages: str, base: type | None = None, settings: Mapping[str, Collection[Any]] = {}
    ):
        self.kind = kind
        self._packages, self._base, self._settings = packages, base, settings
        self._classes: dict[str, T] = {}
        self._modules: dict[str, str] = {}  # where each was registered from
        self._refused: dict[str, str] = {}
        self._problems: list[str] = []  # of the packages
        self._looked = self._looking = False
        self._imported: str | None = None

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: enter the class as `name`; it becomes `cls.name`.

        Raises:
            UsageError: the name is taken, or the class does not keep the contract.
        """

        def enter(cls: T) -> T:
            self.enter(name, cls, getattr(cls, "__module__", ""), self._lacks)
            return cls

        return enter

    def enter(self, name: str, thing: T, module: str, lacks: Callable[[T], str | None]) -> None:
        """Enter a thing, unless it `lacks` something, in a few words.

        Args:
            name: letters, digits and underscores.
            thing: what is entered.
            module: the name of the module that it is from.
            lacks: what is wrong with a thing, or None.
        """
        problem = self._taken(name, thing, module)
        if problem is None and (why := lacks(thing) if _is_word(name) else "its name is no word") is not None:
            problem = f"The {self.kind} {name!r}{self._place(module)} is refused: {why}."
            self._refused[str(name)] = problem
        if problem is not None:
            if not _collecting.get():
                raise UsageError(problem)
            _warn(problem)
            return
        if isinstance(thing, type):
            if "Config" not in vars(thing) and hasattr(thing, "Config"):  # each has one of its own, to be known by
                body = {"__module__": module, "__qualname__": f"{thing.__qualname__}.Config"}
                thing.Config = type("Config", (thing.Config,), body | {"__doc__": thing.Config.__doc__})  # type: ignore[attr-defined]
            if "Config" in vars(thing):
                thing.Config._label = name  # type: ignore[attr-defined]
            thing.name = name  # type: ignore[attr-defined]
        self._refused.pop(name, None)
        self._modules[name] = module
        self._classes[name] = thing

    def _taken(self, name: str, thing: T, module: str) -> str | None:
        other = self._classes.get(name)
        if other is None:
            double = next((n for n, c in self._classes.items() if c is thing), None)
            return None if double is None else f"The {self.kind} {name!r} is {double!r} already: one class, one name."
        where = self._modules.get(name, "")
        same = getattr(other, "__qualname__", name) == getattr(thing, "__qualname__", name)
        if same and (where == module or _file_of(where) == _file_of(module) is not None):
            return None  # the same lines once more
        return f"The {self.kind} name {name!r} is taken by {getattr(other, '__qualname__', name)}{self._place(where)}."

    def _place(self, module: str) -> str:
        origin = origin_of(module)
        return "" if origin is None else f" of {origin.path}"

    def _lacks(self, cls: T) -> str | None:
        """What of the contract a class does not keep, in a few words."""
        base = self._base
        if not isinstance(cls, type):
            return "it is no class"
        if base is None:
            return None
        if not issubclass(cls, base):
            return f"it is no subclass of {base.__name__}"
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            return f"it lacks {', '.join(missing)}"
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, Options)):
            return "it lacks class Config(Options)" if config is None else "its Config is no subclass of Options"
        for setting, allowed in self._settings.items():
            if not hasattr(cls, setting) or getattr(cls, setting) not in allowed:
                found = repr(getattr(cls, setting)) if hasattr(cls, setting) else "missing"
                return f"its {setting} is {found}; it should be one of {', '.join(map(repr, allowed))}"
        for method in ("__init__", *(m for m in vars(base) if not m.startswith("_"))):
            if wanted := _unlike(getattr(cls, method), getattr(base, method)):
                return f"its {method} does not take {wanted}"
        return None

    def _discover(self) -> None:
        """Import what there is to be imported, unless that is done; others wait while one does."""
        named = os.environ.get(IMPORTS, "")
        if self._imported == named and all(stamp == _stamp(source) for source, (stamp, _) in list(_failed.items())):
            return
        with _lock:
            if self._looking:  # a module that is being imported asks
                return
            self._looking = True
            try:
                if not self._looked:
                    found = [problem for package in self._packages for problem in discover(package)]
                    for problem in found:
                        _warn(problem)
                    self._problems, self._looked = found, True
                _import_all(named)
                self._imported = named
            finally:
                self._looking = False

    def __getitem__(self, name: str) -> T:
        self._discover()
        found = self._classes.get(name) if isinstance(name, str) else None
        if found is None:
            raise self.unknown(name)
        return found

    def unknown(self, name: object, allowed: Iterable[str] | None = None, kind: str | None = None) -> UsageError:
        """The error for a name that is not one of `allowed`, by default those registered."""
        if refused := self._refused.get(str(name)):
            return UsageError(refused)
        error = unknown(kind or self.kind, name, self.names() if allowed is None else allowed)
        return UsageError(f"{error} {self.hint()}")

    def hint(self) -> str:
        """What could not be imported, or else where files of one's own are named; for a name that is not known."""
        if problems := [*self._problems, *failed_imports()]:
            return " ".join(problems)
        named = os.environ.get(IMPORTS)
        return f"{IMPORTS}={named} adds no more." if named else f"{IMPORTS} adds files of your own."

    def left_out(self, name: str) -> str | None:
        """Why a name is not registered, where that is known."""
        return self._refused.get(name) or " ".join([*self._problems, *failed_imports()]) or None

    def origin(self, name: str) -> Origin | None:
        """The file that registered a name, or None where the package itself did."""
        return origin_of(self._modules.get(name, _OWN[0]))

    def __contains__(self, name: object) -> bool:
        self._discover()
        return isinstance(name, str) and name in self._classes

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell pattern, sorted."""
        self._discover()
        return sorted(fnmatch.filter(list(self._classes), pattern))


def origin_of(module: str) -> Origin | None:
    """The file or module that a module came from, or None where it is the package's own."""
    if module.partition(".")[0] in _OWN:
        return None
    if module in _origins:
        return _origins[module]
    parent = next((name for name in _origins if module.startswith(name + ".")), None)  # of a package
    if parent is not None:
        return _origins[parent]
    file = getattr(sys.modules.get(module), "__file__", None)
    return Origin(file or module, _digest(file))


def _file_of(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def _is_word(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name))


def _unlike(method: Any, like: Any) -> str | None:
    """The parameters with which `like` is called, where `method` does not take them."""
    if method is like or not callable(like):
        return None
    try:
        called = inspect.signature(like).parameters.values()
        taken = inspect.signature(method)
    except (TypeError, ValueError):
        return None if callable(method) else "a call"
    named = {p.name: None for p in called if p.kind is p.KEYWORD_ONLY}
    positional = [p.name for p in called if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    try:
        taken.bind(*positional, **named)
    except TypeError:
        return ", ".join(name for name in (*positional, *named) if name != "self")
    return None


def split_spec(spec: str | Mapping[str, Any], options: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """`("name", {...})` from a name or a mapping with a `name` key, joined with keyword options.

    Raises:
        UsageError: the mapping has no `name`, or is not one.
    """
    if isinstance(spec, str):
        return spec, dict(options)
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise UsageError(f"A {kind} is given by a name or a mapping with the key 'name', not {spec!r}.")
    rest = {str(k): v for k, v in spec.items() if k != "name"}
    return str(spec["name"]), {**rest, **options}
