"""Recipes that come with the package."""

from importlib.resources import files


def list_recipes() -> list[str]:
    """Their names."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of one."""
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_about(name: str) -> str:
    """The first line of the comment that one opens with."""
    first = recipe_text(name).split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


__all__ = ["list_recipes", "recipe_about", "recipe_text"]
