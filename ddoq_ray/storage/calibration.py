"""Measured rates, kept in a JSON file: what `calibrate` writes and `plan` reads."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import plain

TRAINING = ("threads", "precision", "channels_last", "compile", "micro_batch")  # of cluster.trainer

# What is measured, in its order -> the key of its batch.
BATCHES = {
    "decode": "synthesizer.batch, or synthesizer.decode_batch",
    "denoise": "synthesizer.batch",
    "encode": "encoder.batch",
    "label": "teacher.batch",
    "train": "protocol.batch, or cluster.trainer.micro_batch",
}

_ELSEWHERE = "give cluster.calibration=FILE, a file in a folder that can be written"


class Rate(TypedDict):
    """A measured rate.

    Attributes:
        what: encode, decode, denoise, label or train.
        device: The GPU's or processor's name.
        gpu: Whether it is a GPU.
        per_second: Images; of denoise image-steps.
        peak_bytes: Of the GPU's memory, with the network's weights; 0 on a processor, and where an older file has none.
        memory_bytes: What the GPU has; 0 likewise.
        asked: The settings that it depends on.
    """

    what: str
    device: str
    gpu: bool
    per_second: float
    peak_bytes: int
    memory_bytes: int
    asked: dict[str, Any]


def asked_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What of the configuration each rate depends on: a rate that was measured for other settings says nothing."""
    prior, how = {"path": config.prior.path} | config.prior.loading, config.synthesizer
    threads = {"threads": config.cluster.threads}
    batches = {"batch": how.batch} | how.loading | threads
    size = {"size": config.student.image_size}
    encoder = {k: v for k, v in plain(config.encoder).items() if k in ("path", "dtype", "channels_last", "compile")}
    return {
        "encode": {"prior": prior, "encoder": encoder, "batch": config.encoder.batch} | threads,
        "decode": {"prior": prior} | batches,
        "denoise": {"prior": prior, "guidance": how.guidance, "start": how.start} | batches,
        "label": {"teacher": config.teacher.path, "batch": config.teacher.batch} | size | threads,
        "train": {"student": plain(config.student), "batch": config.protocol.batch}
        | {key: getattr(config.cluster.trainer, key) for key in TRAINING},
    }


def default_file() -> str:
    """In the user's cache folder; in the system's for temporary files where a user has no home, as in containers."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if cache.startswith("~"):
        cache = tempfile.gettempdir()
    return str(Path(cache) / "ddoq_ray" / "calibration.json")


def read_rates(path: str) -> list[Rate]:
    """The rates of a calibration file; none where there is no file.

    Raises:
        ValueError: It is no calibration file.
    """
    try:
        rows = json.loads(Path(path).read_text())
        return [
            {
                "what": str(row["what"]),
                "device": str(row["device"]),
                "gpu": bool(row["gpu"]),
                "per_second": float(row["per_second"]),
                "peak_bytes": int(row.get("peak_bytes", 0)),
                "memory_bytes": int(row.get("memory_bytes", 0)),
                "asked": dict(row["asked"]),
            }
            for row in rows
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"cluster.calibration={path} cannot be read: {error.strerror}; {_ELSEWHERE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no calibration file ({type(error).__name__}: {error}); expected what ddoq-ray calibrate writes"
        ) from None


def add_rates(path: str, rates: list[Rate]) -> None:
    """Write rates into a file, in the place of those of the same device and settings; none: see whether it can be.

    Raises:
        ValueError: It cannot be read or written, or is none that this command wrote.
    """
    new = {_key(rate) for rate in rates}
    kept = [rate for rate in read_rates(path) if _key(rate) not in new]
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([*kept, *rates], indent=1) + "\n")
        if rates:
            os.replace(temporary, path)
        else:
            temporary.unlink()
    except OSError as error:
        raise ValueError(f"cluster.calibration={path} cannot be written: {error.strerror}; {_ELSEWHERE}") from None


def rates_for(rates: list[Rate], asked: Mapping[str, Mapping[str, Any]], *, gpu: bool) -> dict[str, dict[str, Rate]]:
    """device -> what -> the rate, of those that were measured with these settings."""
    found: dict[str, dict[str, Rate]] = {}
    for rate in rates:
        if rate["gpu"] == gpu and json.dumps(asked.get(rate["what"]), sort_keys=True) == json.dumps(
            rate["asked"], sort_keys=True
        ):
            found.setdefault(rate["device"], {})[rate["what"]] = rate
    return found


def _key(rate: Rate) -> str:
    return json.dumps([rate["what"], rate["device"], rate["asked"]], sort_keys=True)
