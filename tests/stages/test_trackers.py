"""What trackers are given: TensorBoard's files read back, and a missing library told before anything starts."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from ddoq_ray.cli import main
from ddoq_ray.config.compose import load_config
from ddoq_ray.stages.report import trackers
from ddoq_ray.storage.folder import Folder

ROW = {"method": "ddoq", "seed": 0, "top1_pct": 61.5}


def events(file: Path) -> list[Event]:
    """The records of a file of TensorBoard: a length and its checksum, the event and its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def test_tensorboard_holds_curves_table_and_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    curve = {"epochs": [1, 2, 3], "train_loss": [3.0, None, 1.0], "top1_pct": [10.0, 40.0, 61.5]}
    results = {
        "name": "run", "config": {"ipc": 2}, "rows": [ROW],
        "curves": [curve | {"method": "ddoq", "seed": 0}, curve | {"method": "random", "seed": 1}],
    }  # fmt: skip
    images = [{"method": "ddoq", "png": png(image)} for image in pixels]
    for _ in range(2):  # a report that is made anew replaces what it handed over before
        where = trackers.hand_over("tensorboard", Folder(str(tmp_path)), results, images)
    files = sorted(Path(where).rglob("events.*"))
    assert [f.parent.name for f in files] == ["ddoq-seed0", "random-seed1", "results"]
    scalars = [(v.tag, e.step, v.simple_value) for e in events(files[0]) for v in e.summary.value]
    assert scalars == [
        ("train_loss", 1, 3.0), ("train_loss", 3, 1.0), ("top1_pct", 1, 10.0), ("top1_pct", 2, 40.0),
        ("top1_pct", 3, 61.5),
    ]  # fmt: skip
    values = {v.tag: v for e in events(files[2]) for v in e.summary.value}
    assert values["results/text_summary"].tensor.string_val[0].decode().splitlines()[-1] == "| ddoq | 0 | 61.5 |"
    for number, image in enumerate(pixels):
        read = Image.open(io.BytesIO(values[f"ddoq/{number:03d}"].image.encoded_image_string))
        np.testing.assert_array_equal(np.asarray(read.convert("RGB")), image)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_library_is_told_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, trackers.TRACKERS[name].package, None)
    assert main([f"run_dir={tmp_path}/run", f"tracking={name}"]) == 2
    told = capsys.readouterr().err
    assert f"tracking={name} needs the package" in told and f'pip install "ddoq_ray[{name}]"' in told
    assert not (tmp_path / "run").exists()


def test_a_tracker_without_a_report_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tracking.*without the stage report"):
        load_config(["tracking=wandb", "stages=[prepare,encode]"])
    with pytest.raises(ValueError, match="tracking=neptune: expected one of tensorboard, wandb, mlflow"):
        load_config(["tracking=neptune"])
