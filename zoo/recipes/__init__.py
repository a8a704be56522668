"""Recipes and sweeps that come with the package."""

from importlib.resources import files


def list_recipes() -> list[str]:
    """Their names."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of one."""
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def headline(text: str) -> str:
    """The first line of the comment that a YAML text opens with."""
    first = text.split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def list_sweeps() -> list[str]:
    """The names of the sweeps."""
    found = (files(__name__) / "sweeps").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in found if f.name.endswith(".yaml"))


def sweep_text(name: str) -> str:
    """The YAML of a sweep."""
    return (files(__name__) / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8")


__all__ = ["headline", "list_recipes", "list_sweeps", "recipe_text", "sweep_text"]
