"""Reading and decoding: images a second of the encode stage's readers, against the `webdataset` library alone.

    python -m benchmarks.ingest --json FILE

Shards of JPEGs are made first (smooth random pictures with some noise, 256 px, about 20 KB). Then, in turns:

* `webdataset`: N bare processes, each over its share of the shards: the library reads and decodes (`decode("rgb8")`),
  the pictures are brought to the same size in the same way and stacked into chunks, which are thrown away;
* `ray`: Ray Data with room for N reader tasks (`stages.encode.reader`); the chunks reach the object store, and
  nobody takes them.

Both have read some before the clock starts, so that everything is imported and the object store's pages are there. The
shards are read `--passes` times over: Ray Data 2.60 runs one single task in the first second of any execution, which
in one pass over 20,000 images (5 s) would be a good part of what is measured. The ratio is the median over the turns
of the two rates of one turn. `cpu_us_per_image` is processor time of one process that does the same work without Ray:
it shows what reading costs when other programs take the machine's processors away.

With as many processes as cores, Ray's own (driver, raylet) take from the readers; with two a core, as the configuration
for one machine has it (`cluster.reader.num_cpus=0.5`), they fill each other's gaps.

* `memory`: the whole encode stage with a small encoder on 64 px, over 160 shards of 100 images (`1x`) and over 1,600
  (`10x`), each in a process of its own. The driver's peak is its high-water mark; a worker's is its private memory (the
  object store is shared, and of a fixed size), seen ten times a second.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.provenance import finish, parser, peak_bytes
from ddoq_ray.data.tar_writing import write_tar

SIZE = 256
MEMORY_SIZE, MEMORY_SHARDS = 64, 160  # pixels a side, and shards of 100 images at 1x
CLASSES = 10
STORE_BYTES = 400 << 20  # where memory is measured; elsewhere Ray chooses
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def write_shards(folder: Path, images: int, shards: int, size: int = SIZE) -> None:
    """`images` labelled JPEGs in `shards` tars, and their classes.json. A few hundred different pictures."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(min(images, 256)):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, format="JPEG", quality=85)
        pictures.append(out.getvalue())
    folder.mkdir(parents=True)
    for shard, indices in enumerate(np.array_split(np.arange(images), shards)):
        members = []
        for i in indices.tolist():
            members += [(f"i{i:06d}.jpg", pictures[i % len(pictures)]), (f"i{i:06d}.cls", str(i % CLASSES).encode())]
        (folder / f"made-{shard:04d}.tar").write_bytes(write_tar(members))
    (folder / "classes.json").write_text(json.dumps([f"c{i}" for i in range(CLASSES)]))


def webdataset_process(urls: list[str], chunk: int) -> None:
    """One bare process: ready, go (a line on stdin), and the number of images on stdout."""
    import webdataset  # noqa: F401 (before the clock starts)

    import ddoq_ray.data.pictures  # noqa: F401

    warm = Path(urls[0]).parent / "warm" / "made-0000.tar"
    webdataset_read([str(warm)], chunk)  # it imports and chooses decoders at its first samples
    print("ready", flush=True)
    sys.stdin.readline()
    print(webdataset_read(urls, chunk), flush=True)


def webdataset_read(urls: list[str], chunk: int) -> int:
    """Read, decode, resize and stack; the number of images."""
    import webdataset as wds

    from ddoq_ray.data.pictures import to_square

    count = 0
    for url in urls:
        held: list[np.ndarray] = []
        for _key, pixels, _label in (
            wds.WebDataset([url], shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "cls")
        ):
            square = pixels if pixels.shape[:2] == (SIZE, SIZE) else to_square(Image.fromarray(pixels), SIZE)
            held.append(square)
            count += 1
            if len(held) == chunk:
                np.stack(held)
                held = []
        if held:
            np.stack(held)
    return count


def reader_read(urls: list[str], chunk: int, quarantine: Any) -> int:
    """The same by `read_chunks`, without Ray."""
    from ddoq_ray.stages.encode.reader import read_chunks

    reading = {"quarantine": quarantine, "num_classes": CLASSES, "image_size": SIZE, "chunk_samples": chunk}
    return sum(
        len(row["pixels"][0]) // (3 * SIZE**2)
        for i, url in enumerate(urls)
        for row in read_chunks({"shard": np.array([i]), "url": np.array([url])}, **reading)
    )


def processor_time(urls: list[str], chunk: int, turns: int) -> dict[str, float]:
    """Microseconds of processor an image, in this process: what other work on the machine changes least."""
    from ddoq_ray.storage.folder import Folder

    taken: dict[str, list[float]] = {"webdataset": [], "ray": []}
    for turn in range(turns + 1):
        for side, found in taken.items():
            start = time.process_time()
            folder = Folder(str(Path(urls[0]).parent / "quarantine"))
            count = webdataset_read(urls, chunk) if side == "webdataset" else reader_read(urls, chunk, folder)
            if turn:  # the first one imports
                found.append(1e6 * (time.process_time() - start) / count)
    return {side: statistics.median(found) for side, found in taken.items()}


def start_webdataset(folder: Path, processes: int, chunk: int, passes: int) -> list[subprocess.Popen[str]]:
    urls = sorted(str(p) for p in folder.glob("*.tar")) * passes
    started = []
    for i in range(processes):
        command = [sys.executable, "-m", "benchmarks.ingest", "--one", json.dumps(["wds", urls[i::processes], chunk])]
        started.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | THREADS
            )
        )
    for p in started:
        assert p.stdout is not None and p.stdout.readline().strip() == "ready"
    return started


def webdataset_rate(folder: Path, processes: int, chunk: int, passes: int) -> float:
    """Images a second of bare processes."""
    started = start_webdataset(folder, processes, chunk, passes)

    def go(p: subprocess.Popen[str]) -> int:
        assert p.stdin is not None and p.stdout is not None
        p.stdin.write("go\n")
        p.stdin.flush()
        count = int(p.stdout.readline())
        p.wait()
        return count

    start = time.perf_counter()
    with ThreadPoolExecutor(processes) as pool:
        total = sum(pool.map(go, started))
    return total / (time.perf_counter() - start)


def settings(folder: Path, *more: str) -> Any:
    from ddoq_ray.config.compose import load_config

    source = ["experiment=digits", "dataset=webdataset", f"dataset.path={folder}"]
    return load_config([*source, "stages=[prepare,encode]", *more])


def ray_rate(folder: Path, passes: int) -> float:
    """Images a second through Ray Data, counted where the chunks reach the object store."""
    from ddoq_ray.stages.encode.stream import chunk_stream
    from ddoq_ray.storage.folder import Folder

    config = settings(folder, "cluster.reader.num_cpus=1")
    shards = sorted(folder.glob("*.tar")) * passes
    todo = [{"shard": i, "url": str(path), "bytes": path.stat().st_size} for i, path in enumerate(shards)]
    quarantine = Folder(tempfile.mkdtemp(dir=folder.parent))
    start = time.perf_counter()
    chunks = chunk_stream(config, todo, quarantine, CLASSES, SIZE, config.encoder.batch)
    count = sum(chunk_images(bundle) for bundle in chunks.iter_internal_ref_bundles())
    return count / (time.perf_counter() - start)


def chunk_images(bundle: Any) -> int:
    """Images in the blocks of a bundle, from what Ray Data knows of their size."""
    return round(sum(m.size_bytes for m in bundle.metadata) / (3 * SIZE**2))


class WorkerPeaks(threading.Thread):
    """The largest private memory that any worker of this process's own Ray had."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.ended = threading.Event()

    def run(self) -> None:
        import ray

        node = ray._private.worker._global_node
        assert node is not None, "Ray runs before its workers are watched"
        raylet = node.all_processes["raylet"][0].process.pid
        while not self.ended.wait(0.1):
            for entry in Path(f"/proc/{raylet}/task").glob("*/children"):
                try:
                    for pid in entry.read_text().split():
                        self.peak = max(self.peak, peak_bytes(pid, "RssAnon"))
                except (OSError, StopIteration):
                    continue


def start_ray(processes: int, store_bytes: int | None = None) -> None:
    import ray

    ray.init(
        address="local", num_cpus=processes, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=store_bytes,
    )  # fmt: skip
    from ddoq_ray.execution import quiet

    quiet.ray_data()


def save_encoder(folder: Path, width: int) -> None:
    """An autoencoder of random weights that does next to nothing, with eight times smaller latents."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths, none = (width,) * 4, (0,) * 4
    AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=none,
        num_decoder_blocks=none,
    ).save_pretrained(folder)  # fmt: skip


def facts(size: int) -> Any:
    from ddoq_ray.execution.networks import Networks

    return Networks("synthetic", (4, size // 8, size // 8), size, None, 0, None, None, None, 0, 0, {}, "random")


def memory(folder: Path, encoder: Path, processes: int) -> dict[str, Any]:
    """The encode stage over a folder of shards: peaks of this process and of the workers."""
    from ddoq_ray.execution.run import Run
    from ddoq_ray.execution.workers import Events
    from ddoq_ray.stages.encode import step as encode
    from ddoq_ray.stages.prepare import step as prepare
    from ddoq_ray.storage.folder import Folder

    start_ray(processes, STORE_BYTES)
    run = Folder(tempfile.mkdtemp(dir=encoder.parent))
    config = settings(folder, f"encoder.path={encoder}", f"run_dir={run.uri}")
    data = prepare.run(config, run, Events(run))
    watch = WorkerPeaks()
    watch.start()
    start = time.perf_counter()
    manifest = encode.run(Run(config, run, data, facts(MEMORY_SIZE), Events(run)), lambda shard: None)
    seconds = time.perf_counter() - start
    watch.ended.set()
    return {
        "shards": len(data.train),
        "images": manifest["items"],
        "images_per_s": manifest["items"] / seconds,
        "driver_peak_bytes": peak_bytes(),
        "worker_peak_bytes": watch.peak,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=20_000)
    options.add_argument("--shards", type=int, default=20)
    options.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options.add_argument("--passes", type=int, default=10, help="how often a turn reads all shards")
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--scratch", help="folder for the shards; removed at the end")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:  # one measurement in a process of its own
        what, *rest = json.loads(given.one)
        if what == "wds":
            webdataset_process(*rest)
        elif what == "save":
            save_encoder(Path(rest[0]), 4)
        else:
            print(json.dumps(memory(Path(rest[0]), Path(rest[1]), rest[2])))
        return
    os.environ.update(THREADS)
    scratch = Path(tempfile.mkdtemp(dir=given.scratch))
    rows: list[dict[str, Any]] = []
    about = {"images": given.images, "shards": given.shards, "passes": given.passes}
    try:
        import ray

        folder = scratch / "shards"
        write_shards(folder, given.images, given.shards)
        write_shards(folder / "warm", 16, 1)
        from ddoq_ray.stages.encode.reader import chunk_rows

        chunk = chunk_rows(settings(folder), SIZE, settings(folder).encoder.batch)
        cpu = processor_time(sorted(str(p) for p in folder.glob("*.tar"))[:1], chunk, 2 * given.turns)
        for processes in given.processes:
            start_ray(processes)
            ray_rate(folder, 1)
            rates: dict[str, list[float]] = {"webdataset": [], "ray": []}
            for turn in range(given.turns):
                for side in sorted(rates, reverse=bool(turn % 2)):
                    if side == "ray":
                        rate = ray_rate(folder, given.passes)
                    else:
                        rate = webdataset_rate(folder, processes, chunk, given.passes)
                    rates[side].append(rate)
                    print(f"{processes} processes, turn {turn}: {side} {rate:,.0f} images/s", flush=True)
            ray.shutdown()
            ratio = statistics.median(r / w for r, w in zip(rates["ray"], rates["webdataset"], strict=True))
            for side, found in rates.items():
                row = about | {"processes": processes, "load": [round(x, 1) for x in os.getloadavg()]}
                row |= {"what": side, "images_per_s": statistics.median(found), "turns": [round(r) for r in found]}
                row["cpu_us_per_image"] = cpu[side]
                if side == "ray":
                    row |= {"ratio_to_webdataset": ratio, "cpu_ratio_to_webdataset": cpu["webdataset"] / cpu["ray"]}
                rows.append(row)
        call = json.dumps(["save", str(scratch / "encoder")])
        subprocess.run([sys.executable, "-m", "benchmarks.ingest", "--one", call], env=os.environ | THREADS, check=True)
        for times in (1, 10):
            what, place = f"memory {times}x", scratch / f"shards-{times}x"
            write_shards(place, 100 * MEMORY_SHARDS * times, MEMORY_SHARDS * times, MEMORY_SIZE)
            call = json.dumps(["memory", str(place), str(scratch / "encoder"), given.processes[0]])
            command = [sys.executable, "-m", "benchmarks.ingest", "--one", call]
            out = subprocess.run(command, env=os.environ | THREADS, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"what": what, "processes": given.processes[0]} | json.loads(out.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(scratch)
    columns = ["what", "images", "shards", "passes", "processes", "images_per_s", "ratio_to_webdataset",
               "cpu_us_per_image", "cpu_ratio_to_webdataset", "driver_peak_bytes", "worker_peak_bytes"]  # fmt: skip
    finish(rows, columns, given.json)


if __name__ == "__main__":
    main()
