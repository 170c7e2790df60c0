"""Resources only: where Ray is and what each kind of worker asks of it. No science here."""

from __future__ import annotations

from dataclasses import dataclass

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class WorkerResources:
    num_cpus: float = option(1.0, "CPUs that one worker asks of Ray")
    num_gpus: float = option(0.0, "GPUs that one worker asks of Ray; a fraction shares one")


@dataclass(frozen=True)
class TrainerResources:
    workers: int = option(1, "DDP ranks")
    num_cpus: float = option(1.0, "CPUs that one worker asks of Ray")
    num_gpus: float = option(0.0, "GPUs that one worker asks of Ray")
    threads: int = option(1, "torch threads in one worker")

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"cluster.trainer.workers={self.workers}: expected 1 or more")
        require(self.threads >= 1, f"cluster.trainer.threads={self.threads}: expected 1 or more")


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
    wait_s: float = option(30.0, "after so long without a worker (or with fewer than its least) a pool says why")
    give_up_s: float | None = option(
        None,
        "after so long without a worker the run ends; by default 120 on this machine's own Ray, never on a cluster",
    )
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
        require(self.threads >= 1, f"cluster.threads={self.threads}: expected 1 or more")
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
