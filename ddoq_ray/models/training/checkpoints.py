"""Where a training that was stopped goes on: one file beside the folder that it will publish."""

from __future__ import annotations

import contextlib
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ddoq_ray.models.training.ranks import Ranks

CHECKPOINT = "checkpoint.pt"
LATER = ("compile", "logit_weight")  # keys that change nothing while they are off
IMAGES = "images"  # in a training's folder: what it reads images into


def training_folder(out: str | os.PathLike[str]) -> Path:
    """What a training keeps until `out` is published."""
    return Path(f"{os.fspath(out).rstrip('/')}.training")


def options(config: Any) -> dict[str, Any]:
    """Keys and values of a training's configuration, as its identity holds them."""
    values = asdict(config)
    # What was begun before there were these keys goes on.
    return {key: value for key, value in values.items() if value or key not in LATER}


def machine(ranks: Ranks) -> dict[str, Any]:
    """What else the bytes of a training follow from."""
    several = {"workers": ranks.world} if ranks.world > 1 else {}
    return {"device": torch.device(ranks.device).type, "threads": torch.get_num_threads(), **several}


class Checkpoints:
    """The state of one training, in its folder.

    Attributes:
        folder: holds the checkpoint, and whatever else the training keeps until it is done.
        identity: what the training is made of; another one's state is refused.
    """

    def __init__(self, out: str | os.PathLike[str], identity: dict[str, Any], *, overwrite: bool = False) -> None:
        """Name the place; nothing is written yet."""
        self.folder = training_folder(out)
        self.identity = identity
        self.overwrite = overwrite

    def open(self) -> dict[str, Any] | None:
        """The state that was saved last, or None; the folder exists afterwards.

        Raises:
            ValueError: the folder holds the state of another training, or a damaged one.
        """
        file = self.folder / CHECKPOINT
        if file.exists():
            saved = self._read(file)
            if saved is not None and saved["identity"] == self.identity:
                return dict(saved["state"])
            if saved is not None and not self.overwrite:
                theirs, ours = saved["identity"], self.identity
                keys = [key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)]
                raise ValueError(
                    f"{self.folder} holds an unfinished training with other settings ({', '.join(sorted(keys))} "
                    "differ); give the settings it was begun with to go on, or overwrite=true to begin anew"
                )
            self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        return None

    def _read(self, file: Path) -> dict[str, Any] | None:
        """What was saved; None where that is damaged and may be replaced.

        Raises:
            ValueError: it is damaged.
        """
        try:
            # Tensors and plain values only: a checkpoint is no program.
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            if self.overwrite:
                return None
            raise ValueError(
                f"{file} is damaged ({type(error).__name__}): give overwrite=true to begin the training anew"
            ) from error

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state of tensors and plain values; it replaces the last one in one step."""
        file = self.folder / CHECKPOINT
        work = file.with_suffix(".tmp")
        with open(work, "wb") as f:
            torch.save({"identity": self.identity, "state": state}, f)
            f.flush()
            os.fsync(f.fileno())  # else a machine that goes down may keep the new name and no bytes
        os.replace(work, file)

    def remove(self) -> None:
        """Nothing is kept of a training that is published, but what others have put into its folder."""
        self._clear()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_file():  # images, in a folder of their own, follow from the data alone
                entry.unlink()
