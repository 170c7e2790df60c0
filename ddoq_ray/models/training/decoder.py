"""Tune the decoder of a prior on images, by what a classifier sees; the encoder, and so every latent, stays.

Shape suffixes: N images, B batch, S image size.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
from diffusers import AutoencoderKL

from ddoq_ray.config.network_training import DecoderTuning, PriorTraining
from ddoq_ray.models.autoencoder import cast, encoder_digest, load_autoencoder, load_network, network_kind
from ddoq_ray.models.classifiers import Classifier
from ddoq_ray.models.features import FeatureLevels
from ddoq_ray.models.folders import check_free, published_folder, read_json, resolve_folder, write_json
from ddoq_ray.models.priors.class_conditional import PRIOR_JSON
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.models.training.autoencoder import AutoencoderTraining
from ddoq_ray.models.training.checkpoints import Checkpoints, machine, options
from ddoq_ray.models.training.course import Passes
from ddoq_ray.models.training.data import Destination, Progress, TrainingSet
from ddoq_ray.models.training.phases import Phases
from ddoq_ray.models.training.pictures import Pictures
from ddoq_ray.models.training.ranks import Alone, Part, Ranks, check_parts
from ddoq_ray.models.training.seen_by import Classifiers


def tune_decoder(
    data: TrainingSet,
    out: Destination,
    config: DecoderTuning,
    *,
    source: Tuned,
    ranks: Ranks | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Publish a copy of a prior whose decoder keeps what a classifier sees.

    Args:
        data: images of the prior's size.
        out: the folder. A stopped tuning is kept in `<folder>.training`, and goes on from there.
        config: see `DecoderTuning`.
        source: the prior, and the classifiers.
        ranks: who tunes it, and where: this process alone, or every rank by a call of its own.
        on_progress: called with ("decoder", step, steps, loss) now and then.

    Returns:
        What the copy's ddoq_prior.json records under "tuned": settings, losses, and what the judge sees before and
        after. Rank 0 alone publishes; the others give nothing.

    Raises:
        ValueError: images of another size, a prior of another kind, no classifier, or an existing folder.
    """
    ranks = ranks or Alone()
    check_free(out.folder, overwrite=out.overwrite)
    data.check()
    check_parts(len(data.images), config.batch, ranks.world, "training.batch")
    folder, prior, seen_by = resolve_folder(source.prior, "prior"), load_prior(source.prior), source.seen_by
    if seen_by.perceptual is None:
        raise ValueError("tune-decoder: expected perceptual=CLASSIFIER, whose features the decoder is to keep")
    if data.images.shape[-1] != prior.image_size:
        raise ValueError(
            f"tune-decoder: the prior makes images of {prior.image_size} px, and image_size={data.images.shape[-1]}"
        )
    vae = cast(_autoencoder(folder), torch.device(ranks.device), torch.float32)
    order, digest = data.order()
    identity = {
        "options": options(config), "data": digest, "prior": prior.id, "perceptual": seen_by.perceptual.id,
        "torch": str(torch.__version__), "diffusers": str(diffusers.__version__),
        **machine(ranks),
    }  # fmt: skip
    # Where it is tuned; the prior, whose denoiser has no part in this, stays on the CPU.
    before = seen_by.judged_autoencoder(load_autoencoder(folder, device=ranks.device), data) if ranks.rank == 0 else {}
    checkpoints = Checkpoints(out.folder, identity, overwrite=out.overwrite)
    phases = Phases(checkpoints, config.checkpoint_every, on_progress, ranks)
    phases.open()
    tuned = _train(vae, Pictures(data.images, data.class_ids, order), config, seen_by.perceptual, phases)
    if ranks.rank:
        return {}
    record = {**identity, **phases.facts, "before": before, **out.extra}
    with published_folder(out.folder, overwrite=out.overwrite) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)
        _write(work, tuned, record, prior.latents_id)
        record["after"] = seen_by.judged_autoencoder(load_prior(work, device=ranks.device).autoencoder, data)
        _write(work, tuned, record, prior.latents_id)
    phases.checkpoints.remove()
    return record


@dataclass(frozen=True)
class Tuned:
    """What is tuned, and by whom.

    Attributes:
        prior: folder, shipped:NAME or hub id of a prior with an AutoencoderKL.
        seen_by: `perceptual` must be there.
    """

    prior: str
    seen_by: Classifiers


def _train(
    vae: AutoencoderKL, pictures: Pictures, config: DecoderTuning, perceptual: Classifier, phases: Phases
) -> AutoencoderKL:
    rules = PriorTraining(
        seed=config.seed, flip=config.flip, precision=config.precision, feature_weight=config.feature_weight,
        logit_weight=config.logit_weight,
        autoencoder_ema=config.ema, compile=config.compile,
    )  # fmt: skip
    device = next(vae.parameters()).device
    training = AutoencoderTraining(vae, rules, FeatureLevels(perceptual.to(device)), decoder_only=True)
    passes = Passes(len(pictures), config.batch, (config.seed, "decoder"))

    def step(number: int, rate: float) -> dict[str, float]:
        rows = passes.rows(number)
        part = Part(len(rows), phases.ranks)
        return training.step(pictures.pixels(part.of(rows), device), number, rate, part)

    seconds = None if config.minutes is None else 60 * config.minutes
    phases.run("decoder", training, step, phases.course("decoder", config.steps, seconds), config.lr)
    return training.finish()


def _autoencoder(folder: Path) -> AutoencoderKL:
    part = "vae" if (folder / "vae").is_dir() else None
    kind = network_kind(read_json(folder / (part or "") / "config.json", "prior"), folder)
    if kind is not AutoencoderKL:
        raise ValueError(f"tune-decoder: expected an AutoencoderKL in {folder}, found {kind.__name__}")
    return load_network(kind, folder, part)


def _write(folder: Path, vae: AutoencoderKL, record: dict[str, Any], latents_id: str) -> None:
    place = folder / "vae" if (folder / "vae").is_dir() else folder
    dtype = _stored_dtype(place)
    for old in [*place.glob("*.safetensors"), *place.glob("*.bin"), *place.glob("*.index.json")]:
        old.unlink()
    copy.deepcopy(vae).to(dtype=dtype).save_pretrained(place)
    config = read_json(place / "config.json", "prior")
    config.pop("_name_or_path", None)  # where the source lay on this machine
    write_json(place / "config.json", config)
    file = folder / PRIOR_JSON
    known = read_json(file, "prior") if file.is_file() else {}
    known |= {"tuned": record, "latents": {"prior": latents_id, "encoder": encoder_digest(vae)}}
    write_json(file, known)


def _stored_dtype(place: Path) -> torch.dtype:
    """What the weights there are kept in: a tuned copy is no larger, and its encoder's are the same."""
    for file in sorted(place.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                found: torch.dtype = tensors.get_tensor(name).dtype
                return found
    return torch.float32
