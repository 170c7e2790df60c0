"""Some samples of a shard are found without decoding, or reading, the others."""

from __future__ import annotations

import gzip
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddoq_ray.data import samples as samples_module
from ddoq_ray.data.picked_samples import PassedOver, picked_pictures
from ddoq_ray.data.samples import encode_png, read_samples
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage import transport

CLASSES, SAMPLES = 3, 60
BROKEN = (7, 31)  # no pictures


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of noise, which PNG does not make smaller: 12 kB each."""
    rng = np.random.default_rng(0)
    members: list[tuple[str, bytes]] = []
    for i in range(SAMPLES):
        data = b"no picture" if i in BROKEN else encode_png(rng.integers(0, 256, (64, 64, 3), np.uint8))
        members += [(f"folder/s.{i:03d}.PNG", data), (f"folder/s.{i:03d}.cls", str(i % CLASSES).encode())]
        if i % 5 == 0:
            members.append((f"folder/s.{i:03d}.json", b"{}"))
    members += [("twice.png", members[0][1]), ("twice.cls", b"0"), ("twice.png", members[0][1])]
    path = tmp_path_factory.mktemp("picked") / "shard.tar"
    path.write_bytes(write_tar(members))
    return path


def usable(shard: Path) -> tuple[dict[tuple[int, int], bytes], PassedOver]:
    """Position -> pixels of all that can be read, and what was refused, as the encode stage has it."""
    seen: Counter[int] = Counter()
    found, bad = {}, []
    for sample in read_samples(str(shard), CLASSES, bad.append):
        found[sample.class_id, seen[sample.class_id]] = np.asarray(sample.image).tobytes()
        seen[sample.class_id] += 1
    return found, PassedOver(frozenset(r.offset for r in bad if r.offset is not None))


def test_positions_are_those_of_the_samples_that_can_be_read(shard: Path) -> None:
    every, passed_over = usable(shard)
    assert len(every) == SAMPLES - len(BROKEN) and len(passed_over.offsets) == len(BROKEN) + 1
    picked = dict(picked_pictures(str(shard), CLASSES, every, passed_over))
    assert {p: np.asarray(Image.open(io.BytesIO(data))).tobytes() for p, data in picked.items()} == every
    key = next(s.key for s in read_samples(str(shard), CLASSES, lambda bad: None))
    one_less = PassedOver(passed_over.offsets, frozenset([key]))
    ((_, data),) = picked_pictures(str(shard), CLASSES, [(0, 0)], one_less)
    assert data == picked[0, 1]


def test_only_headers_labels_and_the_chosen_pictures_are_read_and_nothing_is_decoded(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, passed_over = usable(shard)
    read = [0]
    plain = io.FileIO.readinto

    class Counted(io.FileIO):
        def readinto(self, buffer: object) -> int:
            n = plain(self, buffer)  # type: ignore[arg-type]
            read[0] += n or 0
            return n or 0

    def opened(url: str, buffer: int = -1) -> io.BufferedReader:
        return io.BufferedReader(Counted(url), buffer if buffer > 0 else io.DEFAULT_BUFFER_SIZE)

    def decoded(data: bytes) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(transport, "open_file", opened)
    monkeypatch.setattr(samples_module, "decode_rgb", decoded)
    wanted = [(0, 1), (2, 9)]
    picked = dict(picked_pictures(str(shard), CLASSES, wanted, passed_over))
    chosen = sum(map(len, picked.values()))
    assert set(picked) == set(wanted) and chosen > 24_000
    assert read[0] < chosen + 0.4 * shard.stat().st_size  # headers and labels, and what is read ahead of each
    read[0] = 0
    list(picked_pictures(str(shard), CLASSES, [(0, 0)], passed_over))
    assert read[0] < 0.06 * shard.stat().st_size  # it stops where nothing is left to be found


def test_a_compressed_shard_and_one_that_was_changed(shard: Path, tmp_path: Path) -> None:
    _, passed_over = usable(shard)
    packed = tmp_path / "shard.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    wanted = [(1, 3), (1, 12)]
    assert dict(picked_pictures(str(packed), CLASSES, wanted, passed_over)) == dict(
        picked_pictures(str(shard), CLASSES, wanted, passed_over)
    )
    with pytest.raises(ValueError, match="image 40 of class 1 cannot be found"):
        list(picked_pictures(str(shard), CLASSES, [(1, 40), (2, 0)], passed_over))
    packed.write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match="is no tar any more"):
        list(picked_pictures(str(packed), CLASSES, wanted, passed_over))
