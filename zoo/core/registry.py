"""Registries: everything that a user can name, a mixer, a task, an objective, by its name."""

from __future__ import annotations

import fnmatch
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Generic, TypeVar

from zoo.core import imports
from zoo.core.errors import UsageError, unknown
from zoo.core.imports import IMPORTS, Origin, origin_of
from zoo.core.options import Options

T = TypeVar("T")
NO_WORD = "its name should be of letters, digits and underscores"


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
        optional: parameters of the base's methods that a method of a subclass need not take.
        reserved: names that nothing may have, and what each is.
        check: what else is wrong with a class, in a few words, or None.
    """

    def __init__(
        self,
        kind: str,
        *packages: str,
        base: type | None = None,
        settings: Mapping[str, Collection[Any]] = {},
        optional: Collection[str] = (),
        reserved: Mapping[str, str] = {},
        check: Callable[[Any], str | None] = lambda cls: None,
    ):
        self.kind = kind
        self._packages, self._base, self._settings = packages, base, settings
        self._optional, self._reserved, self._check = optional, reserved, check
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
        if not isinstance(name, str):
            what = getattr(name, "__name__", repr(name))
            raise UsageError(
                f'{what} has no name to be registered by: write @...register("my_{self.kind.split()[0]}").'
            )

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
        if origin_of(module) is not None:  # the package's own names come first, whoever asks in which order
            self._discover_packages()
        problem = self._taken(name, thing, module)
        if problem is None and (why := self._misnamed(name) or lacks(thing)) is not None:
            problem = f"The {self.kind} {name!r}{self._place(module)} is refused: {why}."
            self._refused[str(name)] = problem
        if problem is not None:
            if not imports.collecting.get():
                raise UsageError(problem)
            imports.leave_out(module, str(name), problem)
            return
        if isinstance(thing, type):
            if "Config" not in vars(thing) and hasattr(thing, "Config"):  # each has one of its own, to be known by
                body = {"__module__": module, "__qualname__": f"{thing.__qualname__}.Config"}
                thing.Config = type("Config", (thing.Config,), body | {"__doc__": thing.Config.__doc__})  # type: ignore[attr-defined]
            if "Config" in vars(thing):
                thing.Config._label = name  # type: ignore[attr-defined]
            thing.name = name  # type: ignore[attr-defined]
        self._refused.pop(name, None)
        imports.refused.pop((module, name), None)
        self._modules[name] = module
        self._classes[name] = thing

    def _misnamed(self, name: str) -> str | None:
        """What is wrong with a name, in a few words, or None."""
        if not _is_word(name):
            return NO_WORD
        meant = self._reserved.get(name)
        return None if meant is None else f"its name is that of {meant}: register another name"

    def _taken(self, name: str, thing: T, module: str) -> str | None:
        other = self._classes.get(name)
        if other is None:
            double = next((n for n, c in self._classes.items() if c is thing), None)
            return None if double is None else f"The {self.kind} {name!r} is {double!r} already: one class, one name."
        where = self._modules.get(name, "")
        same = getattr(other, "__qualname__", name) == getattr(thing, "__qualname__", name)
        if same and (where == module or imports.file_of(where) == imports.file_of(module) is not None):
            return None  # the same lines once more
        taken = f"{getattr(other, '__qualname__', name)}{self.place(name)}"
        return f"The {self.kind} name {name!r}{self._place(module)} is taken by {taken}: register another name."

    def place(self, name: str) -> str:
        """` of` the file or the module that a registered name is from."""
        where = self._modules.get(name, "")
        return self._place(where) or f" of {where}" * bool(where)

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
            static = inspect.getattr_static
            if isinstance(static(base, method), classmethod) and not isinstance(static(cls, method), classmethod):
                return f"its {method} is no classmethod"
            if wanted := _unlike(getattr(cls, method), getattr(base, method), self._optional):
                return f"its {method} does not take {wanted}"
        return self._check(cls)

    def _discover(self) -> None:
        """Import what there is to be imported, unless that is done; others wait while one does."""
        named = os.environ.get(IMPORTS, "")
        if self._imported == named and all(
            stamp == imports.stamp(source) for source, (stamp, _) in list(imports.failed.items())
        ):
            return
        with imports.lock:
            if self._looking:  # a module that is being imported asks
                return
            self._looking = True
            try:
                self._discover_packages()
                imports.import_all(named)
                self._imported = named
            finally:
                self._looking = False

    def _discover_packages(self) -> None:
        with imports.lock:
            if self._looked:
                return
            self._looked = True  # at once: a module that is being imported may enter something
            self._problems = [problem for package in self._packages for problem in imports.discover(package)]
            for problem in self._problems:
                imports.warn(problem)

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
        if problems := [*self._problems, *imports.failed_imports()]:
            return " ".join(problems)
        named = os.environ.get(IMPORTS)
        return f"{IMPORTS}={named} adds no more." if named else f"{IMPORTS} adds files of your own."

    def refusal(self, name: str) -> str | None:
        """Why the class that was to be registered as `name` was refused, or None."""
        return self._refused.get(name)

    def left_out(self, name: str) -> str | None:
        """Why a name is not registered, where that is known."""
        return self._refused.get(name) or " ".join([*self._problems, *imports.failed_imports()]) or None

    def origin(self, name: str) -> Origin | None:
        """The file that registered a name, or None where the package itself did."""
        return origin_of(self._modules.get(name, imports.OWN[0]))

    def __contains__(self, name: object) -> bool:
        self._discover()
        return isinstance(name, str) and name in self._classes

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell pattern, sorted."""
        self._discover()
        return sorted(fnmatch.filter(list(self._classes), pattern))


def _is_word(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name))


def _unlike(method: Any, like: Any, optional: Collection[str] = ()) -> str | None:
    """The parameters with which `like` is called, where `method` does not take them; without `optional` ones."""
    if method is like or not callable(like):
        return None
    try:
        called = [p for p in inspect.signature(like).parameters.values() if p.name not in optional]
        taken = inspect.signature(method)
    except (TypeError, ValueError):
        return None if callable(method) else "a call"
    named = {p.name: None for p in called if p.kind is p.KEYWORD_ONLY}
    positional = [p.name for p in called if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    try:
        taken.bind(*positional, **named)
    except TypeError as error:
        return f"{', '.join([*(p for p in positional if p != 'self'), *(f'{p}=' for p in named)])} ({error})"
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
