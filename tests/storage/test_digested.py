"""A shard whose digest is known is compared with it as it is read."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from support.damage import WAYS

from ddoq_ray.data.samples import encode_png, read_samples
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.digested import Digested


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_that_is_not_the_one_that_was_packed_is_refused_at_its_end(tmp_path: Path, way: str) -> None:
    """Also where every sample can still be read: a label of another digit, a byte that fills a block."""
    tar = write_tar(
        [m for i in range(4) for m in ((f"{i}.png", encode_png(np.full((4, 4), i, np.uint8))), (f"{i}.cls", b"1"))]
    )
    digest, file = hashlib.sha256(tar).hexdigest(), tmp_path / "train-0.tar"
    file.write_bytes(tar)
    whole = [(s.key, s.class_id) for s in read_samples(str(file), 10, pytest.fail, digest)]
    assert whole == [(str(i), 1) for i in range(4)]
    if way == "missing":
        file.unlink()
    else:
        file.write_bytes(WAYS[way](tar))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        list(read_samples(str(file), 10, lambda bad: None, digest))
    for place in (tar.index(b"1", 2 * 512), len(tar) - 1):
        file.write_bytes(tar[:place] + bytes([tar[place] ^ 3]) + tar[place + 1 :])
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is damaged: .*`ddoq-ray verify RUN "):
            list(read_samples(str(file), 10, lambda bad: None, digest))


def test_a_file_is_digested_once_wherever_its_reader_seeks() -> None:
    data = np.random.default_rng(0).bytes(3 << 20)
    rng = np.random.default_rng(1)
    for _ in range(20):
        file = Digested(io.BytesIO(data))
        for _ in range(int(rng.integers(10))):
            at, size = (int(n) for n in rng.integers(len(data) + 9, size=2))
            file.seek(at)
            assert file.read(size) == data[at : at + size] and file.tell() == max(at, min(at + size, len(data)))
        assert file.hexdigest() == hashlib.sha256(data).hexdigest()
