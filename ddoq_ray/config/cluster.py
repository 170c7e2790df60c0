"""Resources only: where Ray is and what each kind of worker asks of it. No science here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddoq_ray.config.schema import MOST_THREADS, MOST_WORKERS, option, require


@dataclass(frozen=True)
class WorkerResources:
    num_cpus: float = option(1.0, "CPUs that one worker asks of Ray")
    num_gpus: float = option(0.0, "GPUs that one worker asks of Ray; a fraction shares one")


@dataclass(frozen=True)
class TrainerResources:
    workers: int = option(1, "DDP ranks")
    min_workers: int | None = option(
        None, "with max_workers: Ray Train's own elasticity, between so many ranks; null: `workers` at all times"
    )
    max_workers: int | None = option(None, "see min_workers")
    groups: int = option(
        2, "students that are trained side by side, each by `workers` ranks of its own; fewer where there is no room"
    )
    num_cpus: float = option(1.0, "CPUs that one worker asks of Ray")
    num_gpus: float = option(0.0, "GPUs that one worker asks of Ray")
    threads: int = option(1, "torch threads in one worker")
    precision: Literal["float32", "bfloat16"] = option(
        "float32",
        "arithmetic of the student's forward and backward pass, weights and losses stay in float32; "
        "bfloat16 is for a GPU or a processor with AMX (without channels_last AVX512-BF16 too), and slower on others",
    )
    channels_last: bool = option(
        False, "keep the student's filters and pixels in the order that GPUs' tensor cores want"
    )
    compile: bool = option(False, "torch.compile of the student")
    micro_batch: int = option(
        0, "images of a forward pass of a rank, of which as many as protocol.batch needs make a step; 0 = all at once"
    )
    scratch: str | None = option(
        None,
        "folder on each node's own disk for images that fit neither a worker's device nor the node's memory; "
        "null: the system's folder for temporary files",
    )

    def __post_init__(self) -> None:
        for key in ("workers", "groups"):
            value = getattr(self, key)
            require(
                1 <= value <= MOST_WORKERS,
                f"cluster.trainer.{key}={value}: expected 1 or more, at most {MOST_WORKERS:,}",
            )
        require(self.micro_batch >= 0, f"cluster.trainer.micro_batch={self.micro_batch}: expected 0 or more")
        require(
            (self.min_workers is None) == (self.max_workers is None)
            and (self.min_workers is None or 1 <= self.min_workers <= (self.max_workers or 0)),
            f"cluster.trainer.min_workers={self.min_workers}, max_workers={self.max_workers}: give both, "
            "1 <= min_workers <= max_workers, or neither",
        )
        ranks = self.max_workers or self.workers
        require(
            ranks == 1 or self.num_gpus >= 1 or not self.num_gpus,
            f"cluster.trainer.num_gpus={self.num_gpus} with {ranks} workers: NCCL refuses two ranks on one GPU, where "
            "Ray may place them; give each a whole one, or let students share it (workers=1, cluster.trainer.groups)",
        )
        require(
            1 <= self.threads <= MOST_THREADS,
            f"cluster.trainer.threads={self.threads}: expected 1 or more, at most {MOST_THREADS}",
        )


@dataclass(frozen=True)
class ClusterConfig:
    """What runs on this machine has small shares, so that the stages overlap on two cores."""

    address: str | None = option(
        None,
        "local: a Ray of this run's own; auto: the running cluster; HOST:PORT: that one; by default RAY_ADDRESS if it "
        "is set (as in a Ray job), else local",
    )
    num_cpus: int | None = option(None, "CPUs of the local Ray; by default all of this machine's")
    calibration: str | None = option(
        None, "file of measured rates that calibrate writes and plan reads; by default in the user's cache folder"
    )
    gpu_gb: float | None = option(
        None, "memory of one of the cluster's GPUs in GB, for plan; by default that of the GPU that was calibrated"
    )
    wait_s: float = option(30.0, "after so long without a worker (or with fewer than its least) a pool says why")
    give_up_s: float | None = option(
        None,
        "after so long without a worker the run ends; by default 120 on this machine's own Ray, never on a cluster",
    )
    log: Literal["text", "json"] = option("text", "the lines on stderr: words, or json, an object a line without bars")
    threads: int = option(1, "torch threads in an actor; part of what makes outputs the same bytes")
    reader: WorkerResources = option(WorkerResources(0.5), "tasks that read and decode shards")
    encoder: WorkerResources = option(WorkerResources(0.2), "encoder actors")
    quantizer: WorkerResources = option(WorkerResources(0.0), "quantizer actors")
    decoder: WorkerResources = option(WorkerResources, "decoder actors")
    teacher: WorkerResources = option(WorkerResources, "teacher actors")
    trainer: TrainerResources = option(TrainerResources, "Ray Train workers")
    evaluator: WorkerResources = option(WorkerResources, "tasks that score trained students")

    def __post_init__(self) -> None:
        require(
            self.address is None or self.address in ("local", "auto") or ":" in self.address,
            f"cluster.address={self.address}: expected local, auto or HOST:PORT",
        )
        require(
            1 <= self.threads <= MOST_THREADS,
            f"cluster.threads={self.threads}: expected 1 or more, at most {MOST_THREADS}",
        )
        require(self.gpu_gb is None or self.gpu_gb > 0, f"cluster.gpu_gb={self.gpu_gb}: expected more than 0, or null")
        require(self.wait_s > 0, f"cluster.wait_s={self.wait_s}: expected more than 0 seconds")
        require(
            self.give_up_s is None or self.give_up_s > 0,
            f"cluster.give_up_s={self.give_up_s}: expected more than 0 seconds, or null",
        )
        require(self.num_cpus is None or self.num_cpus >= 1, f"cluster.num_cpus={self.num_cpus}: expected 1 or more")
        for worker in ("reader", "encoder", "quantizer", "decoder", "teacher", "trainer", "evaluator"):
            for key in ("num_cpus", "num_gpus"):
                value = getattr(getattr(self, worker), key)
                require(value >= 0, f"cluster.{worker}.{key}={value}: expected 0 or more")
                # What Ray refuses in words of its own, once the run is under way.
                require(
                    round(value, 4) == value,
                    f"cluster.{worker}.{key}={value}: expected steps of 0.0001, Ray's smallest share",
                )
            gpus = getattr(self, worker).num_gpus
            require(
                gpus <= 1 or gpus == int(gpus),
                f"cluster.{worker}.num_gpus={gpus}: expected a part of one GPU (0 to 1), or a whole number of them",
            )
