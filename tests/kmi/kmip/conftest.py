"""One PyKMIP server for all tests that do not hurt it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pykmip import PyKmip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PyKmip]:
    made = PyKmip(tmp_path_factory.mktemp("kmip") / "server")
    made.start()
    yield made
    made.stop()
