"""The tables of docs/configuration.md, from the models of the configuration.

The page is written by hand, but for the tables: those stand between two comments,

    <!-- fields of ServerSettings -->
    <!-- end of fields -->

Types, bounds and defaults come from the models' JSON schema, the meaning from the docstring below
each field. It is read from the source, so that running the proxy costs nothing more for it.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from website.markdown import Undocumented, slug, table
from xkiproxy.config import models, secrets

_TABLE = re.compile(r"(<!-- fields of (\w+) -->\n).*?(<!-- end of fields -->)", re.DOTALL)
_HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
_COLUMNS = ("key", "value", "default", "meaning")
_FORMATS = {"ipv4network": "CIDR network", "ipv6network": "CIDR network"}
_SECRET = secrets.SecretSource.__name__
_NO_TABLES = {models.Section, models.Config}  # a base, and the file with its sections

Schema = dict[str, Any]
Definitions = dict[str, Schema]


def with_tables(page: str) -> str:
    """The page with every table anew; raises Undocumented for a setting it would not explain."""
    known = sections(models) | sections(secrets)
    for _, name, _ in _TABLE.findall(page):
        if name not in known:
            raise Undocumented(f"docs/configuration.md has a table for {name}, which is no model")
    anchors = dict(_anchors(page))
    shown: set[str] = set()
    rewritten = _TABLE.sub(
        lambda found: found[1] + _table(known[found[2]], anchors, shown) + found[3], page
    )
    if unseen := sorted(known.keys() - shown):
        raise Undocumented(
            f"docs/configuration.md has nothing of {', '.join(unseen)}:"
            f" add <!-- fields of {unseen[0]} --> and <!-- end of fields -->"
        )
    return rewritten


def sections(module: ModuleType) -> dict[str, type[BaseModel]]:
    """The models of a module that stand for a table of xkiproxy.toml, by their names."""
    return {
        name: model
        for name, model in vars(module).items()
        if inspect.isclass(model)
        and issubclass(model, BaseModel)
        and model.__module__ == module.__name__
        and model not in _NO_TABLES
    }


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring below each field; one that is declared again may keep that of its base."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base.__module__.startswith("xkiproxy."):
            found |= dict(_docstrings(ast.parse(inspect.getsource(base)).body[0]))
    return found


def _docstrings(definition: ast.stmt) -> Iterator[tuple[str, str]]:
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    for statement, below in pairwise(body):
        match statement, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.split())


def _anchors(page: str) -> Iterator[tuple[str, str]]:
    """Each model that has a table, with the anchor of the heading that it stands under."""
    for found in _TABLE.finditer(page):
        heading = _HEADING.findall(page, 0, found.start())[-1]
        yield found[2], slug(heading)


def _table(model: type[BaseModel], anchors: dict[str, str], shown: set[str]) -> str:
    rows = list(_rows(model, "", anchors, shown))
    return "\n" + table(_COLUMNS, rows) + "\n"


def _rows(
    model: type[BaseModel], prefix: str, anchors: dict[str, str], shown: set[str]
) -> Iterator[tuple[str, str, str, str]]:
    """A row for each field, and below it the rows of a table within that has none of its own."""
    shown.add(model.__name__)
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    texts = meanings(model)
    elsewhere = {
        field
        for base in model.__mro__[1:]
        if base.__name__ in anchors and issubclass(base, BaseModel)
        for field in base.model_fields
    }
    for name, field in schema["properties"].items():
        if name in elsewhere:
            continue
        if name not in texts:
            raise Undocumented(f"{model.__name__}.{name} has no docstring: write one below it")
        default = "required" if name in schema.get("required", ()) else _default(field)
        value = describe(field, definitions, anchors)
        yield f"`{prefix}{name}`", value, default, texts[name]
        for inner in _tables_in(field, definitions):
            if inner not in anchors:
                below = sections(models)[inner]
                yield from _rows(below, f"{prefix}{name}.", anchors, shown)


def _default(field: Schema) -> str:
    default = field.get("default")
    return "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"


def _alternatives(schema: Schema) -> list[Schema]:
    """What a value may be, where there is a choice of types; none is no type of TOML."""
    choices: list[Schema] = schema.get("anyOf") or schema.get("oneOf") or []
    return [choice for choice in choices if choice.get("type") != "null"]


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _tables_in(schema: Schema, definitions: Definitions) -> Iterator[str]:
    """The names of the models that a field's value is made of."""
    for inner in [*_alternatives(schema), *([schema["items"]] if "items" in schema else [])]:
        yield from _tables_in(inner, definitions)
    name = _name(schema) if "$ref" in schema else _SECRET
    if name != _SECRET and definitions[name]["type"] == "object":
        yield name


def describe(schema: Schema, definitions: Definitions, anchors: dict[str, str]) -> str:
    """What may be written, in words: the type with its bounds, or the choices."""
    if choices := _alternatives(schema):
        described = [describe(choice, definitions, anchors) for choice in choices]
        return " or ".join(dict.fromkeys(described))
    if "$ref" in schema:
        name = _name(schema)
        if name != _SECRET and definitions[name]["type"] != "object":
            return describe(definitions[name], definitions, anchors)
        word = "secret" if name == _SECRET else "table"
        return f"[{word}](#{anchors[name]})" if name in anchors else word
    if schema["type"] == "array":
        items = describe(schema["items"], definitions, anchors)
        return f"list of {_plural(items)}{_bounds(schema)}"
    return _scalar(schema)


def _scalar(schema: Schema) -> str:
    choices = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if choices:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in choices)
    if "pattern" in schema:
        return f"`{schema['pattern']}`{_bounds(schema)}"
    kind = str(schema.get("format", schema["type"]))
    return f"{_FORMATS.get(kind, kind)}{_bounds(schema)}"


def _plural(word: str) -> str:
    if word.startswith("[table]"):
        return word.replace("[table]", "[tables]")
    return f"{word}s" if re.fullmatch(r"[\w ]+", word) else word


def _bounds(schema: Schema) -> str:
    """What is allowed of a number, or of the characters of a string, or of the items of a list."""
    unit = " characters" if schema["type"] == "string" else ""
    least = schema.get("minimum", schema.get("minLength", schema.get("minItems")))
    most = schema.get("maximum", schema.get("maxLength", schema.get("maxItems")))
    if "exclusiveMinimum" in schema:
        return f", over {schema['exclusiveMinimum']}" + (
            "" if most is None else f", at most {most}"
        )
    if least is not None and most is not None:
        return f", {least} to {most}{unit}"
    if least == 1 and unit:
        return ", not empty"
    if least is not None:
        return f", at least {least}{unit}"
    return "" if most is None else f", at most {most}{unit}"
