"""The whole encode stage against a bare loop of the same encoder, where the encoder is the bottleneck.

    python -m benchmarks.encode --json FILE

One encoder of one thread on both sides (on a machine with a GPU, one GPU): an AutoencoderTiny of random weights, heavy
enough that decoding is far faster. In turns:

* `bare loop`: a bare process encodes float batches that are in memory already, and does nothing with the latents;
* `stage`: `stages.encode.run` on a local Ray, from JPEGs in tars to the published latent log.

A stage's `images_per_s` is counted from its first finished shard to its last, so that the actor's start (importing
torch: seconds, once) is left out; `with_start` is the same with it. A shard is one chunk of two batches: nothing
else is encoded when the first one is finished. The ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ingest import SIZE, THREADS, WorkerPeaks, facts, settings, start_ray, write_shards
from benchmarks.provenance import finish, parser, peak_bytes


def save_encoder(folder: Path, width: int) -> None:
    """An AutoencoderTiny as published, but for its width."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = (width,) * 4
    AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths).save_pretrained(folder)


def bare_loop(encoder: str, images: int, batch: int) -> float:
    """Images a second of the encoder alone."""
    import torch

    from ddoq_ray.models.autoencoder import load_autoencoder

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = load_autoencoder(encoder, device=device)
    inner = torch.rand(batch, 3, SIZE, SIZE).to(device) * 2 - 1
    ours.encode(inner).cpu()
    start = time.perf_counter()
    for _ in range(images // batch):
        latents = ours.encode(inner)
    latents.cpu()
    return images // batch * batch / (time.perf_counter() - start)


def stage(folder: Path, encoder: Path, batch: int) -> dict[str, float]:
    """One run of the encode stage in this process's Ray."""
    import ray

    from ddoq_ray.execution.run import Run
    from ddoq_ray.execution.workers import Events
    from ddoq_ray.stages.encode import step as encode
    from ddoq_ray.stages.prepare import step as prepare
    from ddoq_ray.storage.folder import Folder

    run = Folder(tempfile.mkdtemp(dir=encoder.parent))
    gpu = ["cluster.encoder.num_gpus=1"] if ray.cluster_resources().get("GPU") else []
    chunk = [f"encoder.batch={batch}", f"encoder.chunk_samples={2 * batch}"]
    config = settings(folder, f"encoder.path={encoder}", f"run_dir={run.uri}", *chunk, *gpu)
    data = prepare.run(config, run, Events(run))
    times: list[tuple[float, int]] = []
    start = time.perf_counter()
    manifest = encode.run(
        Run(config, run, data, facts(SIZE), Events(run)),
        lambda shard: times.append((time.perf_counter(), data.train[shard].samples)),
    )
    seconds = time.perf_counter() - start
    steady = sum(n for _, n in times[1:]) / (times[-1][0] - times[0][0])
    shutil.rmtree(run.uri)
    return {"images_per_s": steady, "with_start": manifest["items"] / seconds}


def one(call: list[Any]) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-m", "benchmarks.encode", "--one", json.dumps(call)]
    return subprocess.run(command, env=os.environ | THREADS, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=1920)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--width", type=int, default=16, help="channels of the encoder (64 as published)")
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--scratch", help="folder for shards and latents; removed at the end")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        what, *rest = json.loads(given.one)
        if what == "save":
            save_encoder(Path(rest[0]), rest[1])
        else:
            print(bare_loop(*rest))
        return
    os.environ.update(THREADS)
    shards = given.images // (2 * given.batch)
    scratch = Path(tempfile.mkdtemp(dir=given.scratch))
    rows: list[dict[str, Any]] = []
    try:
        import ray

        write_shards(scratch / "shards", given.images, shards)
        one(["save", str(scratch / "encoder"), given.width])  # the driver itself never loads torch
        start_ray(2)
        watch = WorkerPeaks()
        watch.start()
        rates: dict[str, list[float]] = {"bare loop": [], "stage": []}
        whole = []
        for turn in range(given.turns):
            for side in sorted(rates, reverse=bool(turn % 2)):
                if side == "stage":
                    measured = stage(scratch / "shards", scratch / "encoder", given.batch)
                    rates[side].append(measured["images_per_s"])
                    whole.append(measured["with_start"])
                else:
                    out = one(["bare", str(scratch / "encoder"), given.images, given.batch])
                    rates[side].append(float(out.splitlines()[-1]))
                print(f"turn {turn}: {side} {rates[side][-1]:.1f} images/s", flush=True)
        watch.ended.set()
        ray.shutdown()
    finally:
        shutil.rmtree(scratch)
    about = {"images": given.images, "shards": shards, "batch": given.batch, "width": given.width}
    about["load"] = [round(x, 1) for x in os.getloadavg()]
    for side, found in rates.items():
        row = about | {"what": side, "images_per_s": statistics.median(found), "turns": [round(r, 1) for r in found]}
        if side == "stage":
            row["with_start"] = statistics.median(whole)
            row["ratio_to_bare_loop"] = statistics.median(
                s / b for s, b in zip(rates["stage"], rates["bare loop"], strict=True)
            )
            row["driver_peak_bytes"], row["worker_peak_bytes"] = peak_bytes(), watch.peak
        rows.append(row)
    columns = ["what", "images", "shards", "batch", "images_per_s", "with_start", "ratio_to_bare_loop",
               "driver_peak_bytes", "worker_peak_bytes"]  # fmt: skip
    finish(rows, columns, given.json)


if __name__ == "__main__":
    main()
