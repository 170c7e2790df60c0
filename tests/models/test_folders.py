"""Files of a model's folder that are not what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddoq_ray.models.folders import read_json


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (None, "found none"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "config.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"prior: .*{words}") as caught:
        read_json(path, "prior")
    assert "config.json" in str(caught.value) and type(caught.value) is ValueError
    if data is None:
        path.mkdir()
        with pytest.raises(ValueError, match="cannot be read: Is a directory"):
            read_json(path, "prior")
