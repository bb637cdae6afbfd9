"""Paths in the configuration are relative to the file they stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


def _against_config_directory(path: Path, info: ValidationInfo) -> Path:
    directory = (info.context or {}).get("directory")
    return path if directory is None else Path(directory) / path


ConfigPath = Annotated[Path, AfterValidator(_against_config_directory)]
"""A path, made absolute against the `directory` of the validation context."""
