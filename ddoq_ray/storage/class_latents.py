"""All latents of some classes at once, for what looks at whole classes: W2, herding, medoids."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.noising import NoiseLevel
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import LatentLog


def class_latents(
    latents: Folder,
    shards: int | Sequence[int] | npt.NDArray[np.int32],
    classes: Collection[int],
    noise: NoiseLevel | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """(class_id, its latents float32 [n, D] in the log's order), ascending; a class without latents is left out.

    Every file of the log that holds one of `classes` is read once. Memory: their latents in fp16, one class of them
    in float32 and one file; so `classes` are some parts of a codebook, not all there are.

    Args:
        latents: A latent log.
        shards: The shards that hold them, ascending, as an index knows (`LatentIndex.holding`); or how many there are.
        classes: The classes wanted.
        noise: The level to which they are noised, as for the codebook that they are compared with; None: clean.

    Raises:
        ValueError: When a file of the log is gone or damaged.
    """
    log = LatentLog(latents, noise=noise)
    pieces: dict[int, list[npt.NDArray[np.float16]]] = {c: [] for c in sorted(classes)}
    wanted = np.fromiter(pieces, np.int64, len(pieces))
    for shard in range(shards) if isinstance(shards, int) else list(shards):
        for chunk in log.done(shard).chunks:
            for c, x in log.read(chunk, wanted):
                pieces[c].append(x.copy())  # a view would keep the whole file in memory
    for c in list(pieces):
        mine = pieces.pop(c)
        if mine:
            yield c, np.concatenate(mine).astype(np.float32)
