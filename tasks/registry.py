"""Names, strict options and errors: the ground that tasks and zoo both stand on.

Everything a user can name (a mixer, a task, an objective) sits in a `Registry`; everything a user can set is a field
of an `Options` class. Both refuse what they do not know in one line: what was given, what is allowed, the likely slip.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

T = TypeVar("T", bound=type)
O = TypeVar("O", bound="Options")


class UsageError(ValueError):
    """Wrong input from a person. Its text is one line; the `zoo` command prints it and exits with status 2."""


class UsageWarning(UserWarning):
    """Something that was left aside, and why. Its text is one line; the `zoo` command prints it on standard error."""


def closest(given: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` where a name is near enough, else an empty string."""
    near = difflib.get_close_matches(str(given), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(kind: str, given: object, allowed: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `allowed`."""
    allowed = list(allowed)
    listing = ", ".join(allowed) or "none"
    return UsageError(f"Unknown {kind} {given!r}.{closest(str(given), allowed)} Available: {listing}.")


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
    prefix = f"{what}: {where}={first['input']!r}" if where else f"{what}"
    hint = ""
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


class Options(BaseModel):
    """Strict, frozen options: an unknown name or a wrong type is a `UsageError` at construction."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            what = getattr(type(self), "_label", type(self).__name__)
            raise UsageError(describe(error, type(self), what)) from None

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


def discover(package: str) -> None:
    """Import every module of a package, so that each can enter itself where it belongs."""
    root = importlib.import_module(package)
    for module in pkgutil.iter_modules(root.__path__, package + "."):
        importlib.import_module(module.name)


IMPORTS = "ZOO_IMPORT"
"""The environment variable that names files and modules for every registry to import, separated by `os.pathsep`."""


def import_source(source: str, given_as: str) -> None:
    """Import a Python file, or a module by its name, so that what it registers can be named; a file only once.

    Args:
        source: a path that ends in .py, or a module's name.
        given_as: where it was said, for errors.

    Raises:
        UsageError: there is no such file or module, or it fails.
    """
    try:
        if not source.endswith(".py"):
            importlib.import_module(source)
            return
        path = Path(source).resolve()
        name = re.sub(r"\W", "_", str(path.with_suffix("")))  # a file called copy.py must not pass for Python's own
        if name in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{given_as} {source!r} failed: {type(error).__name__}: {error}.") from None


class Registry(Generic[T]):
    """Classes by name. Every module of the given packages is imported on first use, so a new file registers itself;
    files elsewhere do where the environment variable `ZOO_IMPORT` names them."""

    def __init__(self, kind: str, *packages: str):
        self.kind = kind
        self._packages = packages
        self._classes: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: enter the class as `name`; it becomes `cls.name`."""

        def enter(cls: T) -> T:
            if name in self._classes and self._classes[name].__qualname__ != cls.__qualname__:
                raise UsageError(f"The {self.kind} name {name!r} is taken by {self._classes[name].__qualname__}.")
            cls.name = name  # type: ignore[attr-defined]
            if "Config" in vars(cls):
                cls.Config._label = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return enter

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # before the imports, which may ask the registry themselves
        try:
            for package in self._packages:
                discover(package)
            for source in filter(None, os.environ.get(IMPORTS, "").split(os.pathsep)):
                import_source(source, IMPORTS)
        except BaseException:
            self._discovered = False
            raise

    def __getitem__(self, name: str) -> T:
        self._discover()
        if name not in self._classes:
            raise unknown(self.kind, name, self.names())
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._classes

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell pattern, sorted."""
        self._discover()
        return sorted(fnmatch.filter(self._classes, pattern))


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
