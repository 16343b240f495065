"""The runs that the tests of this folder stop and compare."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from theatre import Theatre


@pytest.fixture(scope="session")
def theatre(tmp_path_factory) -> Iterator[Theatre]:
    """Data, and a process that starts and stops runs."""
    theatre = Theatre(tmp_path_factory.mktemp("theatre"))
    yield theatre
    theatre.close()
