"""What a draw of real images reads and decodes: the chosen ones alone, or every shard up to its last chosen one.

    python -m benchmarks.chosen_images --json benchmarks/results/chosen_images.json

Class-sorted shards of JPEG noise at the size of photographs; a draw of `ipc` images a class. `positions` finds them by
headers and labels and reads these pictures alone (`data.picked_samples`), `decoding` reads and decodes samples until
the last is found, as a draw did before. Of each: pictures decoded, bytes that were asked of the files, and seconds of
the median of `repeats`, with files in the page cache, without Ray and without the encoding as PNG that both have.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.provenance import finish, parser
from ddoq_ray.core.rng import philox
from ddoq_ray.data.picked_samples import Position, picked_pictures
from ddoq_ray.data.samples import decode_rgb, read_samples
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage import transport

COLUMNS = ["what", "images", "classes", "ipc", "chosen", "decoded", "read_mb", "of_all_bytes", "seconds"]
Shards = list[tuple[str, list[Position]]]  # a shard, and what is chosen of it


def write_shards(folder: Path, classes: int, per_class: int, side: int, ipc: int) -> Shards:
    """A shard a class."""
    rng = np.random.default_rng(0)
    grain = [
        Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8)).resize((side, side))
        for _ in range(8)
    ]
    files = []
    for picture in grain:
        out = io.BytesIO()
        picture.save(out, format="JPEG", quality=90)
        files.append(out.getvalue())
    made: Shards = []
    for c in range(classes):
        members = []
        for i in range(per_class):
            members += [(f"s{i:06d}.jpg", files[i % len(files)]), (f"s{i:06d}.cls", str(c).encode())]
        path = folder / f"shard-{c:03d}.tar"
        path.write_bytes(write_tar(members))
        rows = philox("draw", c).choice(per_class, size=ipc, replace=False)
        made.append((str(path), [(c, int(i)) for i in np.sort(rows)]))
    return made


def by_positions(shards: Shards, classes: int) -> int:
    """Pictures decoded by a draw as it is now."""
    decoded = 0
    for shard, wanted in shards:
        for _, data in picked_pictures(shard, classes, wanted):
            decode_rgb(data)
            decoded += 1
    return decoded


def by_decoding(shards: Shards, classes: int) -> int:
    """Pictures decoded by a draw as it was."""
    decoded = 0
    for shard, wanted in shards:
        left, seen = set(wanted), Counter[int]()
        for sample in read_samples(shard, classes, lambda bad: None):
            decoded += 1
            left.discard((sample.class_id, seen[sample.class_id]))
            seen[sample.class_id] += 1
            if not left:
                break
    return decoded


def read_bytes(call: Callable[[], int]) -> int:
    """Bytes that a call asks of its files."""
    total = 0

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal total
            count = super().readinto(buffer) or 0
            total += count
            return count

    def opened(url: str, buffer: int = -1) -> io.BufferedReader:
        return io.BufferedReader(Counted(url), buffer if buffer > 0 else io.DEFAULT_BUFFER_SIZE)

    with mock.patch.object(transport, "open_file", opened):
        call()
    return total


def measure(classes: int, per_class: int, side: int, ipc: int, repeats: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        shards = write_shards(Path(place), classes, per_class, side, ipc)
        whole = sum(Path(shard).stat().st_size for shard, _ in shards)
        rows = []
        for what, draw in (("decoding", by_decoding), ("positions", by_positions)):
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                decoded = draw(shards, classes)
                seconds.append(time.perf_counter() - start)
            read = read_bytes(lambda draw=draw: draw(shards, classes))  # type: ignore[misc]
            rows.append(
                {
                    "what": what,
                    "images": classes * per_class,
                    "classes": classes,
                    "side": side,
                    "ipc": ipc,
                    "chosen": classes * ipc,
                    "decoded": decoded,
                    "read_mb": read / 1e6,
                    "of_all_bytes": read / whole,
                    "seconds": statistics.median(seconds),
                    "repeats": repeats,
                }
            )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--classes", type=int, default=4)
    options.add_argument("--per-class", type=int, default=500)
    options.add_argument("--side", type=int, default=256)
    options.add_argument("--ipc", type=int, default=10)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    rows = measure(given.classes, given.per_class, given.side, given.ipc, given.repeats)
    finish(rows, COLUMNS, given.json)


if __name__ == "__main__":
    main()
