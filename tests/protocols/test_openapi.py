"""The published descriptions are those of the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xkiproxy.protocols.openapi import DESCRIPTIONS, text

FOLDER = Path(__file__).parents[2] / "docs" / "openapi"


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_file_is_what_the_code_says(name: str) -> None:
    """If not: python -m xkiproxy.protocols.openapi docs/openapi."""
    assert (FOLDER / f"{name}.json").read_text() == text(DESCRIPTIONS[name])


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_call_is_described_with_its_errors(name: str) -> None:
    description = DESCRIPTIONS[name]
    document = json.loads(text(description))
    operations = {path["post"]["operationId"] for path in document["paths"].values()}
    assert operations == description.calls | description.key_calls | description.key_methods
    for path in document["paths"].values():
        assert set(path["post"]["responses"]) >= {"200", "400", "401", "404", "429", "500", "503"}
