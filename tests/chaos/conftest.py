"""One cluster of this machine for all tests of this folder that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.cells import Lab, lab


@pytest.fixture(scope="package")
def here(tmp_path_factory: pytest.TempPathFactory, cache_folder: None) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("chaos")) as made:
        yield made
