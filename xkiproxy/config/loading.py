"""Loading xkiproxy.toml: every mistake of the file is found in one run and named by its path.

Sections are validated one by one, so that a mistake in the first does not hide one in the last;
what ties them together (names, prefixes, addresses) is checked over all of them afterwards.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from xkiproxy.config.models import (
    KMI_SETTINGS,
    AuditSettings,
    CatalogSettings,
    Config,
    KeystoreSettings,
    KmiSettings,
    LogSettings,
    ServerSettings,
    TracingSettings,
)

_Model = TypeVar("_Model", bound=BaseModel)

_TABLES: dict[str, type[BaseModel]] = {
    "server": ServerSettings,
    "catalog": CatalogSettings,
    "audit": AuditSettings,
    "log": LogSettings,
    "tracing": TracingSettings,
}
_OPTIONAL = ("tracing",)
_ARRAYS = ("kmi", "keystore")
_SINK_TYPES = ("syslog", "stdout")


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it stands (`keystore[0].kmi`) and what is wrong."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has every reason that was found."""

    def __init__(self, path: Path, problems: Iterable[Problem]) -> None:
        self.path = path
        self.problems = list(problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{path}: {len(self.problems)} problem(s)\n{lines}")


def load_config(path: Path) -> Config:
    """Read and validate the file; raises ConfigError with every problem in it."""
    return parse_config(path, read_document(path))


def parse_config(path: Path, text: str) -> Config:
    """Validate what `read_document` has read from a file; raises ConfigError like `load_config`."""
    document = _parse(path, text)
    problems: list[Problem] = []
    context = {"directory": path.resolve().parent}
    for key in document.keys() - _TABLES.keys() - set(_ARRAYS):
        known = ", ".join([*_TABLES, *(f"[{name}]" for name in _ARRAYS)])
        problems.append(Problem(key, f"unknown section; known are {known}"))

    def section(model: type[_Model], data: Any, where: str) -> _Model | None:
        try:
            return model.model_validate(data, context=context)
        except ValidationError as error:
            problems.extend(_explain(error, where))
            return None

    tables = {
        name: section(model, document.get(name, {}), name)
        for name, model in _TABLES.items()
        if name in document or name not in _OPTIONAL
    }
    kmis = [
        section(_kmi_model(data, where, problems), data, where)
        for where, data in _array(document, "kmi", problems)
    ]
    stores = [
        section(KeystoreSettings, data, where)
        for where, data in _array(document, "keystore", problems)
    ]
    problems.extend(_check_ties(document))
    if problems:
        raise ConfigError(path, problems)
    fields: dict[str, Any] = {**tables, "kmi": tuple(kmis), "keystore": tuple(stores)}
    return Config.model_construct(path=path, **fields)


def read_document(path: Path) -> str:
    """The text of the file; raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        hint = (
            "; make one with: xkiproxy init, or name it with --config or XKIPROXY_CONFIG"
            if isinstance(error, FileNotFoundError)
            else ""
        )
        raise ConfigError(path, [Problem("", f"{error.strerror}{hint}")]) from None
    except UnicodeDecodeError as error:
        raise _no_toml(path, error) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _no_toml(path, error) from None


def _no_toml(path: Path, error: ValueError) -> ConfigError:
    return ConfigError(path, [Problem("", f"not valid TOML: {error}")])


def _array(
    document: dict[str, Any], name: str, problems: list[Problem]
) -> Iterator[tuple[str, dict[str, Any]]]:
    value = document.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        problems.append(Problem(name, f"must be an array of tables, written [[{name}]]"))
        return
    if not value:
        problems.append(Problem(name, f"at least one [[{name}]] is needed"))
    for index, item in enumerate(value):
        yield f"{name}[{index}]", item


def _kmi_model(data: dict[str, Any], where: str, problems: list[Problem]) -> type[KmiSettings]:
    kind = data.get("type")
    model = KMI_SETTINGS.get(kind) if isinstance(kind, str) else None
    if model is None and "type" in data:
        known = ", ".join(KMI_SETTINGS)
        problems.append(Problem(f"{where}.type", f"unknown type {kind!r}; known are: {known}"))
    return model or _AnyKmi


class _AnyKmi(KmiSettings, extra="ignore"):
    """Stands in for a section of unknown type, so that its other mistakes are still found."""


def _explain(error: ValidationError, where: str) -> Iterator[Problem]:
    for item in error.errors(include_url=False, include_input=False):
        place = where
        for part in item["loc"]:
            if place.endswith("]") and part in _SINK_TYPES:
                continue  # which model was chosen: no key of the file
            place += f"[{part}]" if isinstance(part, int) else f".{part}"
        yield Problem(place, _sentence(item["type"], item["msg"]))


def _sentence(kind: str, message: str) -> str:
    match kind:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "is missing"
        case _:
            return message.removeprefix("Value error, ")


def _check_ties(document: dict[str, Any]) -> Iterator[Problem]:
    """What ties sections together, read from the raw file: broken sections are checked too."""
    stores = _tables(document, "keystore")
    kmi_names = [str(kmi.get("name")) for kmi in _tables(document, "kmi")]
    yield from _repeated("kmi", "name", kmi_names)
    yield from _repeated("keystore", "name", [str(store.get("name")) for store in stores])
    paths = [f"{store.get('path_prefix')} of {store.get('protocol')}" for store in stores]
    yield from _repeated("keystore", "path_prefix", paths)
    yield from _check_lanes(document)
    yield from _check_stdout(document)
    yield from _check_bearers(document)
    for index, store in enumerate(stores):
        names = store.get("kmi")
        for position, name in enumerate(names if isinstance(names, list) else ()):
            if name not in kmi_names:
                known = ", ".join(sorted(kmi_names)) or "none"
                where = f"keystore[{index}].kmi[{position}]"
                yield Problem(where, f"there is no [[kmi]] named {name!r}; there are: {known}")


def _check_lanes(document: dict[str, Any]) -> Iterator[Problem]:
    server = document.get("server", {})
    workers = server.get("workers", 1) if isinstance(server, dict) else 1
    for index, kmi in enumerate(_tables(document, "kmi")):
        default = getattr(KMI_SETTINGS.get(str(kmi.get("type"))), "model_fields", {}).get("lanes")
        lanes = kmi.get("lanes", default and default.default)
        if isinstance(lanes, int) and isinstance(workers, int) and lanes < workers:
            what = f"must be at least server.workers ({workers}): each worker needs a lane"
            yield Problem(f"kmi[{index}].lanes", what)


def _check_stdout(document: dict[str, Any]) -> Iterator[Problem]:
    server, audit = document.get("server"), document.get("audit")
    workers = server.get("workers", 1) if isinstance(server, dict) else 1
    if workers == 1 or not isinstance(audit, dict):
        return
    for index, sink in enumerate(_tables(audit, "sink")):
        if sink.get("type") == "stdout":
            what = "is one stream, but each worker has a chain of its own: use workers = 1"
            yield Problem(f"audit.sink[{index}]", f"standard output {what}, or syslog")


def _check_bearers(document: dict[str, Any]) -> Iterator[Problem]:
    server = document.get("server")
    if not isinstance(server, dict) or not server.get("plaintext"):
        return
    for index, store in enumerate(_tables(document, "keystore")):
        if store.get("protocol") == "ekm":
            what = "needs [server.tls]: a request carries a token, which is good for whoever reads"
            yield Problem(f"keystore[{index}].protocol", f"ekm {what} it")


def _tables(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = document.get(name, [])
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _repeated(section: str, key: str, values: list[str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if value.startswith("None"):
            continue  # missing: said where the section is validated
        if value in first:
            earlier = f"{section}[{first[value]}].{key}"
            yield Problem(f"{section}[{index}].{key}", f"{value!r} is taken by {earlier}")
        first.setdefault(value, index)
