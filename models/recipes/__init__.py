"""Recipes: small Python files, each a docstring (paper, command, cost, expected result) and a `recipe`.

`nestloop train NAME` takes the files of this folder by name, and any other file by its path.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from nestloop.models.errors import RecipeError, UnknownRecipeError
from nestloop.models.recipe import Recipe

__all__ = ["Recipe", "load", "names"]


def names() -> list[str]:
    """The recipes that come with nestloop, as written on the command line."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def load(name: str) -> tuple[str, Recipe, str]:
    """(name, recipe, docstring) of a recipe given by its name or by the path of a .py file."""
    if name.endswith(".py"):
        path = Path(name).expanduser()
        spec = importlib.util.spec_from_file_location(f"nestloop_recipe_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise UnknownRecipeError(f"there is no recipe file {name}", need="the path of a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        stem = path.stem
    else:
        stem = name.replace("-", "_")
        if name.replace("_", "-") not in names():
            raise UnknownRecipeError(
                f"there is no recipe {name!r}",
                need=f"one of {', '.join(names())}, or the path of your own recipe file, NAME.py",
            )
        module = importlib.import_module(f"{__name__}.{stem}")
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{name} defines no recipe",
            given=f"recipe = {recipe!r}",
            need="recipe = Recipe(data=..., model=..., ...)",
            fix="from nestloop.models.recipes import Recipe",
        )
    return stem, recipe, (module.__doc__ or "").strip()
