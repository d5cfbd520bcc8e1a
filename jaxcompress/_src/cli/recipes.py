"""What `recipes` does: what there is, and one recipe or method explained."""

import tomllib
from typing import Any

from jaxcompress._src.cli.screen import Screen
from jaxcompress._src.recipe.methods import METHODS
from jaxcompress._src.recipe.options import NEEDED, Option, argument_texts
from jaxcompress._src.recipe.recipe import TABLES, packaged_recipes, read_recipe, recipe_text
from jaxcompress._src.recipe.steps import step_options


def list_recipes(screen: Screen) -> None:
    """The recipes of the library, and the methods of every stage."""
    recipes = {name: recipe_text(name).partition("\n")[0].lstrip("# ") for name in packaged_recipes()}
    rows = [(name, text, "yes" if read_recipe(name).needs_texts else "") for name, text in recipes.items()]
    screen.table("Recipes of the library", ("recipe", "what it does", "needs texts"), rows)
    methods = [
        (f"[[{stage}]]", name, method.summary, "yes" if method.trains else "")
        for stage, entries in METHODS.items()
        for name, method in entries.items()
    ]
    screen.table("Methods of a step", ("table", "method", "what it does", "trains"), methods)
    summaries = {
        stage: {name: method.summary for name, method in entries.items()} for stage, entries in METHODS.items()
    }
    hint = "`jaxcompress recipes show NAME` explains a recipe or a method."
    screen.result({"recipes": recipes, "methods": summaries}, lines=[hint])


def show_recipe(screen: Screen, name: str) -> None:
    """The text of a recipe, and what its options mean; or all options of a method."""
    stages = [stage for stage, entries in METHODS.items() if name in entries]
    if stages and name not in packaged_recipes():
        _show_method(screen, name, stages)
        return
    recipe, text = read_recipe(name), recipe_text(name)
    screen.text(text)
    explained: dict[str, dict[str, str]] = {}
    for title, step in recipe.steps:
        options = step_options(step.method)
        given = {key: (value, options[key].help) for key, value in step.table.items() if key != "method"}
        explained[title] = _show_table(screen, f"{title}, {step.name}: {step.method.summary}", given)
    for table, values in tomllib.loads(text).items():
        if table in TABLES:
            texts = argument_texts(TABLES[table])
            explained[table] = _show_table(screen, f"[{table}]", {k: (v, texts[k]) for k, v in values.items()})
    screen.result({"recipe": name, "text": text, "options": explained})


def _show_method(screen: Screen, name: str, stages: list[str]) -> None:
    explained: dict[str, dict[str, str]] = {}
    for stage in stages:
        method = METHODS[stage][name]
        options = step_options(method)
        rows = [(option.name, _default(option), option.help) for option in options.values()]
        screen.table(f"[[{stage}]], {name}: {method.summary}", ("option", "default", "meaning"), rows)
        explained[stage] = {option.name: option.help for option in options.values()}
    screen.result({"method": name, "options": explained})


def _show_table(screen: Screen, title: str, given: dict[str, tuple[Any, str]]) -> dict[str, str]:
    rows = [(key, _written(value), text) for key, (value, text) in given.items()]
    screen.table(title, ("option", "value", "meaning"), rows)
    return {key: text for key, (_, text) in given.items()}


def _default(option: Option) -> str:
    if option.default is NEEDED:
        return "needed"
    return "" if option.default is None else _written(option.default)


def _written(value: Any) -> str:
    """A value about as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return repr(value)
