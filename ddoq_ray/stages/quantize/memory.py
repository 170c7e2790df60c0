"""What quantizer actors need of memory: planned from the index of the data, refused before anything starts.

An actor needs

    240 MiB + 12 bytes x (class, shard) pairs + 6 D x rows of the largest chunk file + working set

    streaming:  sum over the open classes of 4 D max(min(n, buffer), min(n, K)) + 24 K + 6 KiB, where they are most
                (a class is open from its first shard until its part is written: in a class-mixed log all classes are
                open at the end), and one class's seeding
    exact:      160 MiB of libraries (1.5 GiB with a GPU); 512 MiB of latents, or the largest class; and what the
                algorithm needs for the class that needs most (`sizing.gram_bytes` in Gram space; on a GPU that is the
                device's memory, and the host holds a second copy of 256 MiB of latents, or of the largest class)
    pooled:     D of both is that of pooled latents, and the means of whole ones add 12 D min(n, K) for each class that
                gets them at one time: the open ones, or the one of an exact algorithm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.quantizer import BalancedConfig, ClvqConfig, QuantizerConfig
from ddoq_ray.core.clvq import Clvq
from ddoq_ray.core.pooling import Pooling
from ddoq_ray.core.sizing import GIB, clvq_bytes, clvq_seeding_bytes, gram_bytes
from ddoq_ray.stages.quantize.class_quantizers import BATCH_BYTES, READ_BYTES, algorithm_of
from ddoq_ray.stages.quantize.worker import Pending, enough_to_finish, shards_of
from ddoq_ray.storage.prepared import Data

BASE_BYTES = 240 << 20  # of a worker process that has done nothing yet
LIBRARY_BYTES = 160 << 20  # scikit-learn, faiss
GPU_LIBRARY_BYTES = 1536 << 20  # torch and what CUDA keeps on the host


@dataclass(frozen=True)
class ActorDemand:
    """What one quantizer actor asks of Ray, from its start to the end of its codebook."""

    num_cpus: float
    num_gpus: float
    memory: int


def together(config: RunConfig) -> bool:
    """Whether classes of the Gram space go to a GPU together."""
    return config.cluster.quantizer.num_gpus > 0


def plan_memory(
    config: RunConfig,
    algorithm: QuantizerConfig,
    census: Census,
    pooling: Pooling,
    chunk_rows: int,
    actors: Sequence[dict[int, list[int]]],
) -> list[int]:
    """Bytes that each actor needs where it needs most, by the formula above.

    Args:
        pooling: Of latents of their shape.
        chunk_rows: Rows of the largest file of the latent log.
        actors: For each actor its parts: part -> class ids.
    """
    whole_dim, dim = int(np.prod(pooling.shape)), pooling.dim
    chunk = 6 * whole_dim * min(chunk_rows, int(census.samples.max(initial=0)))
    ahead = 0 if config.latents.path else 2 * config.encoder.pool[1]
    lifted = 12.0 * whole_dim * np.minimum(census.images, config.ipc) * (pooling.side > 1)
    needs = []
    for parts in actors:
        mine = np.array(sorted(c for classes in parts.values() for c in classes), np.int64)
        base = BASE_BYTES
        if isinstance(algorithm, ClvqConfig):
            buffer = algorithm.buffer or Clvq.default_buffer(config.ipc)
            size = clvq_bytes(census.images, config.ipc, dim, buffer) + lifted
            work = census.peak(parts, size, len(actors), ahead)
            work += clvq_seeding_bytes(config.ipc, dim, buffer)
        else:
            sizes = census.images[mine].tolist()
            gpu = together(config)
            whole = (n for n in sizes if algorithm_of(algorithm, n, dim, config.ipc, together=gpu) != "clvq")
            latents = [2.0 * n * dim for n in whole]
            work = min(sum(latents), max(READ_BYTES, max(latents, default=0.0)))
            if gpu:
                work += min(sum(latents), max(BATCH_BYTES, max(latents, default=0.0)))
            work += max((_class_bytes(algorithm, n, config.ipc, dim, gpu) for n in set(sizes)), default=0.0)
            work += float(lifted[mine].max(initial=0.0))
            base += GPU_LIBRARY_BYTES if gpu else LIBRARY_BYTES
        pairs = sum(len(census.shards[c]) for c in mine.tolist())
        needs.append(int(base + 12 * pairs + chunk + work))
    return needs


def log_readings(census: Census, pooling: Pooling, actors: Sequence[dict[int, list[int]]]) -> float:
    """How often the actors of an exact algorithm read the log, in sum: each 512 MiB of their latents by itself.

    In a class-sorted log that is about once. In a class-mixed one it grows with the square of the data: such a run
    should be told of the ways that do not.
    """
    dim, read = pooling.dim, 0
    for parts in actors:
        pending = Pending(census.samples)
        for part, classes in parts.items():
            for c in classes:
                if pending.parts and 2 * dim * (pending.own + int(census.images[c])) > READ_BYTES:
                    read += pending.held
                    pending.clear()
                pending.add(part, int(census.images[c]), [census.shards[c]])
        read += pending.held
    return read / max(1, int(census.samples.sum()))


def _class_bytes(algorithm: QuantizerConfig, n: int, k: int, dim: int, gpu: bool) -> float:
    """Working memory, beside its fp16 latents, of a class of n images that an exact algorithm was asked for."""
    kind = algorithm_of(algorithm, n, dim, k, together=gpu)
    if kind == "gram" and not gpu:
        return float(gram_bytes(n, dim, k))
    if kind == "clvq":  # too large to be whole in memory: it is streamed
        buffer = Clvq.default_buffer(k)
        return float(clvq_bytes(n, k, dim, buffer)) + clvq_seeding_bytes(k, dim, buffer)
    plan = 40.0 * n * k if kind == BalancedConfig.name else 0.0  # costs, the plan and the solver's copies
    return 16.0 * n * dim + plan  # scikit-learn and faiss copy what they get


class Census:
    """What plans ask of the index of the data, which for a class-mixed ImageNet-21K takes seconds to turn over.

    Attributes:
        images: int64 [C], labelled images of each class.
        samples: int64 [S], of each shard.
        shards: For each class the shards that hold it, ascending.
    """

    def __init__(self, data: Data) -> None:
        self.images = np.array(list(data.counts.values()), np.int64)
        self.samples = np.array([s.samples for s in data.train], np.int64)
        self.shards = shards_of([s.images.class_ids for s in data.train], np.arange(len(data.classes)))

    def peak(self, parts: dict[int, list[int]], size: npt.NDArray[np.float64], num_actors: int, ahead: int) -> float:
        """Largest sum of `size` (float64 [C]) over the classes of `parts` that are open at one time.

        Args:
            num_actors: How many share the log.
            ahead: How many shards encoders may be ahead of the oldest unfinished one.
        """
        opens: dict[int, list[int]] = {}
        closes: dict[int, list[int]] = {}
        part_of = {c: p for p, classes in parts.items() for c in classes if len(self.shards[c])}
        left = {p: sum(c in part_of for c in classes) for p, classes in parts.items()}
        for c in part_of:
            opens.setdefault(max(0, int(self.shards[c][0]) - ahead), []).append(c)
            closes.setdefault(int(self.shards[c][-1]), []).append(c)
        most = now = 0.0
        pending, waiting = Pending(self.samples), 0.0
        for shard in sorted(opens.keys() | closes.keys()):  # between these nothing changes
            now += float(size[opens.get(shard, [])].sum())
            most = max(most, now)
            for c in closes.get(shard, []):
                left[part_of[c]] -= 1
                if left[part_of[c]] == 0:
                    mine = [other for other in parts[part_of[c]] if other in part_of]
                    pending.add(part_of[c], int(self.images[mine].sum()), (self.shards[other] for other in mine))
                    waiting += float(size[mine].sum())
            if pending.parts and enough_to_finish(pending.own, pending.held, num_actors):
                now -= waiting
                waiting = 0.0
                pending.clear()
        return most


def check_memory(needs: Sequence[int], *, cpus: float = 0.0, may_grow: bool = False) -> str:
    """Refuse what the cluster's nodes cannot hold, naming the formula; where nodes may join, only say it.

    Args:
        needs: Bytes of every actor, of all codebooks.
        cpus: That each of them asks for: a node that has fewer, as a cluster's head may, takes none.
        may_grow: A pending actor is the demand that an autoscaler sees, and starts when a node joins.

    Returns:
        What will be waited for; empty where there is room for all.

    Raises:
        ValueError: When the actors do not fit the memory of the nodes that are there, and none will join.
    """
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [room.get("memory", 0.0) for room in there if room.get("CPU", 0.0) >= cpus]
    free = sorted(nodes, reverse=True)
    for need in sorted(needs, reverse=True):
        at = next((i for i, room in enumerate(free) if room >= need), None)
        if at is None:
            break
        free[at] -= need
    else:
        return ""
    most = ", ".join(f"{n / GIB:.1f}" for n in sorted(needs, reverse=True)[:8])
    offer = f"offer {', '.join(f'{n / GIB:.1f}' for n in nodes)} GiB" if nodes else "have no CPUs for them"
    words = (
        f"{len(needs)} quantizer actors need {most}{', ...' if len(needs) > 8 else ''} GiB of memory, and the nodes "
        f"{offer}. An actor needs 240 MiB + one chunk + (clvq) 4 x D x max(buffer, ipc) bytes for each class that is "
        "open at one time - all of its classes when the shards are class-mixed - or (exact algorithms) 512 MiB of "
        "latents and one class. Choose more quantizer.num_shards on more nodes, class-sorted shards, "
        "quantizer.buffer=ipc, or a smaller ipc"
    )
    if not may_grow:
        raise ValueError(words)
    return words
