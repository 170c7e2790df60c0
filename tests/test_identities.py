"""What a stage's output is known by holds every key of the configuration that its bytes depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.identities import ANYWHERE, DECLARED, MADE_ANEW, MADE_FROM, OF_THEIR_OWN, leaves, left_out
from support.recording import recording

from ddoq_ray import pipeline
from ddoq_ray.config.compose import load_config

STAGES = Path(__file__).resolve().parents[1] / "ddoq_ray/stages"
SMALL = ("ipc=2", "num_seeds=1", "protocol.steps=4", "protocol.eval_every=4", "report.heldout_images=2")

VARIANTS = {
    "teacher's choices": (
        "baselines=[confident,rded,noise-init,stitched,uniform-grid]", "rded.pool=8", "rded.crops=2", "rded.factor=2",
    ),
    "real images": ("baselines=[random,herding,medoids]", "small_class=cap", "latents.keep=false"),
    "gram, noised latents": (
        "quantizer=gram", "quantizer.noise_level=0.2", "synthesizer.strength=0.2", "baselines=[]", "encoder.batch=0",
    ),
    "posterior, features": ("baselines=[]", "encoder.posterior=sample", "labels.mode=features", "quantizer.batch=4"),
    "teacher online": (
        "baselines=[]", "labels.mode=online", "synthesizer.start=noise", "protocol.optimizer=sgd",
        "protocol.schedule=step", "protocol.step_at=[2]",
    ),
    "guided, candidates": (
        "baselines=[]", "synthesizer.start=guided", "synthesizer.candidates=2", "synthesizer.rescale=true",
        "synthesizer.keep=cell", "synthesizer.judge=shipped:digits-teacher",
    ),
    "inversion, epochs": (
        "baselines=[full]", "synthesizer.start=inversion", "protocol.steps=null", "protocol.epochs=2",
        "protocol.full_epochs=1",
    ),
}  # fmt: skip


def test_every_package_of_the_stages_is_known() -> None:
    packages = {p.name for p in STAGES.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert packages | set(OF_THEIR_OWN.values()) == set(MADE_FROM) | MADE_ANEW
    assert all((STAGES / f"{module}.py").is_file() for module in OF_THEIR_OWN)


def test_what_is_declared_is_a_key() -> None:
    keys = {key for key, _ in leaves(load_config([]))}
    assert {key for _, key in DECLARED} | set(ANYWHERE) <= keys


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_stage_reads_is_in_its_identity(name: str, tmp_path: Path, ray_here: None) -> None:
    """The main job's own configuration is looked at in test_main_job."""
    log = tmp_path / "reads"
    log.mkdir()
    config = load_config([*SMALL, *VARIANTS[name], f"run_dir={tmp_path / 'run'}"])
    pipeline.run(recording(config, log))
    unused = ("synthesizer.strength",) if config.synthesizer.start in ("noise", "guided") else ()
    assert left_out(config, log, *unused) == []


@pytest.mark.slow
def test_what_packing_reads_is_in_its_identity(tmp_path: Path, write_corpus, ray_here: None) -> None:
    corpus = write_corpus(tmp_path / "shards", 4, 50)
    log = tmp_path / "reads"
    log.mkdir()
    keys = ("experiment=digits", f"dataset.path={corpus}", "dataset.resort=true", "dataset.heldout=0.2", "baselines=[]")
    config = load_config([*SMALL, *keys, f"run_dir={tmp_path / 'run'}"])
    pipeline.run(recording(config, log))
    assert left_out(config, log) == []
