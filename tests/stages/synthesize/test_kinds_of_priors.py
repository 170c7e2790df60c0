"""A run asks of the class list only what its prior needs, and what the configuration says of the prior reaches it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_networks import save_stable_diffusion, tiny_taesd

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config

SMALL = ("stages=[prepare,encode,quantize,synthesize]", "ipc=1", "synthesizer.max_workers=1", "baselines=[]")


def pictures(run: Path) -> dict[str, np.ndarray]:
    found = {}
    for shard in sorted((run / "images").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member)
                if member.name.endswith(".png") and data is not None:
                    found[member.name] = np.asarray(Image.open(io.BytesIO(data.read())))
    return found


def made(tmp_path: Path, name: str, *keys: str) -> dict[str, np.ndarray]:
    pipeline.run(load_config([*SMALL, *keys, f"run_dir={tmp_path / name}"]))
    classes = json.loads((tmp_path / name / "data/classes.json").read_text())
    assert len(classes) == 10 and all(c["prior_label"] is None and c["prompt"] for c in classes)
    return pictures(tmp_path / name)


@pytest.mark.slow
def test_stable_diffusion_needs_names_and_an_autoencoder_nothing(tmp_path: Path, ray_here: None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd = save_stable_diffusion(tmp_path / "sd")
        tiny_taesd().save_pretrained(tmp_path / "tiny")
    asked = made(tmp_path, "a", f"prior.path={sd}", "prior.scheduler=dpm++2m", "prior.negative_prompt=cartoon",
                 "synthesizer.steps=4", "synthesizer.decode_batch=3", "synthesizer.image_size=6")  # fmt: skip
    assert len(asked) == 10 and all(picture.shape == (6, 6, 3) for picture in asked.values())
    plain = made(tmp_path, "b", f"prior.path={tmp_path / 'tiny'}", "prior.image_size=8")
    assert len(plain) == 10 and all(picture.shape == (8, 8, 3) for picture in plain.values())
    with pytest.raises(ValueError, match=r"denoises nothing; give synthesizer\.strength=0.*synthesizer\.strength=0\.5"):
        made(tmp_path, "c", f"prior.path={tmp_path / 'tiny'}", "prior.image_size=8", "synthesizer.strength=0.5")
