"""docs/commands.md, from the commands as Typer has them.

Nothing in it comes from the machine that it is made on: no terminal's width, no value of the
environment, no default but what is written in the code.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from website.markdown import Undocumented, table
from xkiproxy.cli import app

INTRODUCTION = """\
# Commands

<!-- Written by `make references` from xkiproxy/cli. What is changed here is lost. -->

Every command takes `--help`. It prints tables for people, and JSON for programs with `--json`. Its
exit status is 0 when it is done, 1 when it failed, 2 when it was called wrongly; what went wrong is
said on standard error. The configuration is `xkiproxy.toml` in the current folder, else
`--config FILE` or `$XKIPROXY_CONFIG`: [what is in it](configuration.md).

`xkiproxy --version` prints the version.
"""

_EXAMPLES = re.compile(r"\bExamples?: ")
_CONTINUED = " \\\n    "
_WORDS = {int: "integer", float: "number", str: "TEXT"}


@dataclass(frozen=True, slots=True)
class Command:
    """A command or a group of commands: its full name, and what Typer made of it."""

    name: str
    definition: Any
    is_group: bool


def page() -> str:
    """The whole page; raises Undocumented for a command or an option without its words."""
    return INTRODUCTION + "".join(_section(command) for command in commands())


def commands() -> Iterator[Command]:
    """All commands, each group before what is in it, in the order of `--help`."""
    yield from _below(typer.main.get_command(app.make_app(*app.COMMANDS)), "xkiproxy")


def _below(group: Any, name: str) -> Iterator[Command]:
    for word, definition in group.commands.items():
        is_group = hasattr(definition, "commands")
        yield Command(f"{name} {word}", definition, is_group)
        if is_group:
            yield from _below(definition, f"{name} {word}")


def _section(command: Command) -> str:
    prose, examples = _split(command)
    level = "##" if command.name.count(" ") == 1 else "###"
    parts = [f"{level} `{command.name}`", *prose]
    if not command.is_group:
        parts += [_fence(_usage(command)), *_tables(command), _fence(examples)]
    return "\n" + "\n\n".join(parts) + "\n"


def _fence(text: str) -> str:
    return f"```sh\n{text}\n```"


def _split(command: Command) -> tuple[list[str], str]:
    """The paragraphs of the help, and its examples as lines of a shell."""
    text = inspect.cleandoc(command.definition.help or "")
    if command.definition.epilog:
        text += "\n\n" + inspect.cleandoc(command.definition.epilog)
    begin = _EXAMPLES.search(text)
    prose = text[: begin.start()] if begin else text
    paragraphs = [_plain(part) for part in prose.split("\n\n") if part.strip()]
    if not paragraphs:
        raise Undocumented(f"{command.name} has no help: write a docstring")
    if begin is None and not command.is_group:
        raise Undocumented(f"{command.name} has no example: add one to its docstring or epilog")
    return paragraphs, _shell(text[begin.end() :] if begin else "")


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _shell(text: str) -> str:
    """`COMMAND; what for: COMMAND` as lines: what is said of a command is a comment above it."""
    lines = []
    for part in re.split(r"\n\n|;\s", text):
        said, name, rest = " ".join(part.split()).partition("xkiproxy ")
        lines += [f"# {said.rstrip(': ')}"] if said else []
        lines += [_CONTINUED.join(_wrap(name + rest))]
    return "\n".join(lines)


def _wrap(command: str) -> list[str]:
    return textwrap.wrap(command, 84, break_long_words=False, break_on_hyphens=False)


def _usage(command: Command) -> str:
    words = [command.name, "[OPTIONS]"]
    for parameter in command.definition.params:
        if parameter.param_type_name == "argument":
            name = _name_of_argument(parameter)
            words.append(name if parameter.required else f"[{name}]")
    return " ".join(words)


def _name_of_argument(parameter: Any) -> str:
    given = parameter.metavar or parameter.name.upper()
    dots = "..." if parameter.nargs == -1 else ""
    return str(given).strip("[].") + dots


def _tables(command: Command) -> Iterator[str]:
    hints = get_type_hints(inspect.unwrap(command.definition.callback), include_extras=True)
    shown = [p for p in command.definition.params if not p.hidden and p.name != "help"]
    for kind in ("argument", "option"):
        rows = [_row(command, p, hints[p.name]) for p in shown if p.param_type_name == kind]
        if rows:
            yield table((kind, "value", "default", "meaning"), rows).rstrip("\n")


def _row(command: Command, parameter: Any, hint: Any) -> tuple[str, str, str, str]:
    if not parameter.help:
        raise Undocumented(f"{command.name} {parameter.opts[-1]} has no help")
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else []
    name = ", ".join(f"`{n}`" for n in names) or f"`{_name_of_argument(parameter)}`"
    return name, _value(parameter, hint), _default(parameter), _plain(parameter.help)


def _value(parameter: Any, hint: Any) -> str:
    """The choices, else the metavar, else the type; with bounds."""
    kind, told = _kind(hint)
    if getattr(parameter, "is_flag", False):
        return ""
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    word = parameter.metavar or _WORDS.get(kind, "PATH")
    if parameter.param_type_name == "argument":
        word = _WORDS.get(kind, "PATH")
    least, most = getattr(told, "min", None), getattr(told, "max", None)
    if least is not None and most is not None:
        return f"{word}, {least} to {most}"
    return word if least is None else f"{word}, at least {least}"


def _kind(hint: Any) -> tuple[Any, Any]:
    """The bare type of an annotation (of an item, where it is a list), and Typer's part of it."""
    kind, told = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
    while get_origin(kind) in {Union, UnionType, list}:
        kind = next(inner for inner in get_args(kind) if inner is not type(None))
    return kind, told


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if isinstance(default, Enum):
        default = default.value
    is_shown = default is not None and default is not False and default not in ("", [], ())
    written = f"`{default}`" if is_shown else ""
    variable = f"`${parameter.envvar}`" if isinstance(parameter.envvar, str) else ""
    return ", else ".join(part for part in (variable, written) if part)
