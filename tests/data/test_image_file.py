"""Images of a training in a file: what was written is mapped, whole or not at all, and memory does not grow with it."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ddoq_ray.data.image_file import ImageFile, image_key, order_of


def drawn(n: int, size: int = 8, seed: int = 0) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(3)), rng.integers(0, 256, (3, size, size)).astype(np.uint8)) for _ in range(n)]


def test_what_is_written_is_mapped(tmp_path: Path) -> None:
    pictures = drawn(20)
    file = ImageFile(tmp_path / "new/train", {"shards": ["a.tar"], "side": 8})
    assert file.open() is None and not file.of_another_source()
    assert file.write(iter(pictures), 8) == 20
    found = file.open()
    assert found is not None and isinstance(found.images, np.memmap) and not found.images.flags.writeable
    assert np.array_equal(found.images, np.stack([image for _, image in pictures]))
    assert found.class_ids.tolist() == [class_id for class_id, _ in pictures]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["train.npz", "train.pixels"]
    other = ImageFile(tmp_path / "new/train", {"shards": ["b.tar"], "side": 8})
    assert other.open() is None and other.of_another_source()
    file.pixels.write_bytes(file.pixels.read_bytes()[:-1])
    assert file.open() is None


def test_the_order_is_that_of_classes_then_contents_however_images_came() -> None:
    pictures = drawn(200, size=2)
    pictures += pictures[:50]  # duplicates
    keys = [image_key(image) for _, image in pictures]
    keys[:5] = [bytes(16), b"\xff" * 16, bytes(15) + b"\1", b"\x80" + bytes(15), bytes(8) + b"\xff" * 8]
    class_ids = np.array([class_id for class_id, _ in pictures])
    both = [(int(c), key) for c, key in zip(class_ids, keys, strict=True)]
    rows, digest = order_of(class_ids, b"".join(keys))
    assert rows.tolist() == sorted(range(len(both)), key=both.__getitem__)
    whole = b"".join(c.to_bytes(8, "little") + key for c, key in sorted(both))
    assert digest == hashlib.blake2b(whole, digest_size=8).hexdigest()
    shuffled = np.random.default_rng(1).permutation(len(both))
    assert order_of(class_ids[shuffled], b"".join(keys[i] for i in shuffled))[1] == digest


def test_a_reading_that_fails_leaves_no_images(tmp_path: Path) -> None:
    file = ImageFile(tmp_path / "train", {"side": 8})
    file.write(drawn(5), 8)

    def cut_off():  # type: ignore[no-untyped-def]
        yield from drawn(3)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        file.write(cut_off(), 8)
    assert file.open() is None and not (tmp_path / "train.tmp").exists()
    assert file.write([], 8) == 0 and file.open() is None
    file.write(drawn(5), 8)
    assert file.open() is not None


def test_memory_does_not_hold_the_images(tmp_path: Path) -> None:
    """About 50 bytes an image are kept (label, key, order), whatever its size; these have 3,072."""

    def peak(n: int) -> int:
        rng = np.random.default_rng(0)
        pictures = ((i % 10, rng.integers(0, 256, (3, 32, 32), np.uint8)) for i in range(n))
        file = ImageFile(tmp_path / str(n), {})
        tracemalloc.start()
        try:
            file.write(pictures, 32)
            found = file.open()
            assert found is not None
            for first in range(0, n, 64):
                assert found.images[found.order[first : first + 64]].shape[1:] == (3, 32, 32)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(500), peak(4500)
    assert (large - small) / 4000 < 150, (small, large)
