"""Class-conditional latent diffusion: an autoencoder + UNet2DModel or DiTTransformer2DModel + a scheduler.

Shape suffixes: B batch, C latent channels, h w latent size, H W image size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel, UNet2DModel
from torch import Tensor

from ddoq_ray.models.autoencoder import DTYPES, cast, encoder_digest, identity_of, load_network, network_kind
from ddoq_ray.models.folders import content_digest, read_json, write_json
from ddoq_ray.models.priors.base import field_of
from ddoq_ray.models.priors.loading import PLAIN, Loading
from ddoq_ray.models.priors.sampling import DiffusionPrior, Sampler
from ddoq_ray.models.priors.schedulers import LEARNED, check_variance, make_scheduler
from ddoq_ray.storage.records import ClassInfo

PRIOR_JSON = "ddoq_prior.json"
# DiT's published folders were saved before the class had its own name.
_DENOISERS = {
    "UNet2DModel": UNet2DModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
    "Transformer2DModel": DiTTransformer2DModel,
}


class ClassConditionalPrior(DiffusionPrior):
    """See `Prior`. The null label of classifier-free guidance is num_classes, DiT's convention."""

    needs = ("prior_label",)

    # Seven parameters: a folder's parts and how they run, by name.
    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        denoiser: UNet2DModel | DiTTransformer2DModel,
        scheduler: Any,
        *,
        classes: list[str] | None = None,
        num_classes: int | None = None,
        how: Loading = PLAIN,
        id: str | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            vae: the autoencoder; its config holds scaling_factor and perhaps shift_factor.
            denoiser: class-conditional, latents in, noise (or noise and variance) out.
            scheduler: any diffusers scheduler with add_noise and step.
            classes: names in label order.
            num_classes: their number where no names tell it.
            how: how the networks run.
            id: the content digest if known; computed otherwise.

        Raises:
            ValueError: the parts do not fit together.
        """
        self.latent_shape = _latent_shape(vae, denoiser)
        self.sampler = Sampler(scheduler, torch.device(how.device))
        check_variance(scheduler, denoiser.config["out_channels"] == 2 * self.latent_shape[0])
        self.num_classes, self.has_null = _class_count(denoiser, classes, num_classes)
        self.classes = classes
        configs = {
            "vae": identity_of(dict(vae.config)),
            "denoiser": dict(denoiser.config),
            "scheduler": dict(scheduler.config),
        }
        self.id = id or content_digest(configs, _tensors(vae, denoiser))
        self.dtype = DTYPES[how.dtype]
        self.autoencoder = how.autoencoder(vae)
        self.vae = self.autoencoder.network
        self.image_size = self.latent_shape[1] * self.autoencoder.factor
        if how.image_size not in (None, self.image_size):
            raise ValueError(
                f"prior.image_size={how.image_size}: this prior is made for {self.image_size} px; leave it out"
            )
        if how.negative_prompt:
            raise ValueError("prior.negative_prompt: this prior takes labels, no text; leave it out")
        self.denoiser = how.denoiser(denoiser)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        index: dict[str, Any],
        how: Loading,
    ) -> ClassConditionalPrior:
        """Read a folder as `load_prior` describes it; `index` is its model_index.json."""
        part = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), None)
        if part is None:
            raise ValueError(f"prior: expected a subfolder unet/ or transformer/ in {folder}, found neither")
        raw = {name: read_json(folder / name / "config.json", "prior") for name in ("vae", part)}
        raw["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json", "prior")
        kind = raw[part].get("_class_name")
        if kind not in _DENOISERS:
            raise ValueError(f"prior: expected a denoiser of {sorted(_DENOISERS)}, got {kind} in {folder}")
        vae = load_network(network_kind(raw["vae"], folder), folder, "vae")
        denoiser = load_network(_DENOISERS[kind], folder, part)
        scheduler = make_scheduler(raw["scheduler"], how.scheduler)
        # The digest covers the files' own configs: a newer diffusers adds defaults to the loaded ones.
        digest = content_digest(
            {"vae": identity_of(raw["vae"]), "denoiser": raw[part], "scheduler": raw["scheduler"]},
            _tensors(vae, denoiser),
        )
        extra = read_json(folder / PRIOR_JSON, "prior") if (folder / PRIOR_JSON).is_file() else {}
        latents_id = _latents_of(extra, vae, folder)  # before the networks are cast
        prior = cls(
            vae,
            denoiser,
            scheduler,
            classes=_class_names(index, extra),
            num_classes=extra.get("num_classes"),
            how=how,
            id=digest,
        )
        prior._latents_id = latents_id or prior._latents_id
        if extra.get("image_size", prior.image_size) != prior.image_size:
            raise ValueError(
                f"prior: {PRIOR_JSON} says image_size {extra['image_size']}, but the networks in {folder} "
                f"make {prior.image_size} px images"
            )
        return prior

    def conditioning(self, classes: Sequence[ClassInfo]) -> Tensor:
        """Their labels, int64 [N]."""
        return torch.tensor(field_of(classes, "prior_label"), dtype=torch.int64)

    def check_condition(self, condition: Tensor | None, rows: int) -> None:
        """Raise a ValueError unless `condition` holds a label of this prior for each row."""
        told = "none" if condition is None else f"{condition.dtype} {tuple(condition.shape)}"
        if condition is None or tuple(condition.shape) != (rows,) or condition.dtype != torch.int64:
            raise ValueError(f"prior: expected int64 labels [{rows}], got {told}")
        if rows and not 0 <= int(condition.min()) <= int(condition.max()) < self.num_classes:
            raise ValueError(
                f"prior: labels must lie in 0 .. {self.num_classes - 1}, got {int(condition.min())} .. "
                f"{int(condition.max())}; check prior_label in classes.json"
            )

    def predict(self, z: Tensor, t: Tensor, condition: Tensor | None, guidance: float) -> Tensor:
        """The denoiser's output at z, guided; more than C channels only for a learned variance."""
        assert condition is not None, "checked by check_condition"
        y = condition
        channels = self.latent_shape[0]
        guided = guidance != 1.0
        if guided:
            z = torch.cat([z, z])
            y = torch.cat([y, torch.full_like(y, self.num_classes)])
        times = t.to(self.device).expand(len(z))
        output = self.denoiser(z.to(self.dtype), timestep=times, class_labels=y).sample.float()
        eps, rest = output[:, :channels], output[:, channels:]
        if guided:
            conditional, unconditional = eps.chunk(2)
            eps = unconditional + guidance * (conditional - unconditional)
            rest = rest.chunk(2)[0]
        if rest.shape[1] and self.scheduler.config.get("variance_type") in LEARNED:
            return torch.cat([eps, rest], dim=1)
        return eps

    def save(self, out: Path, extra: dict[str, Any], *, dtype: str = "float32") -> None:
        """Write the parts into the folder `out` in diffusers' format; `extra` goes into ddoq_prior.json."""
        part = "unet" if isinstance(self.denoiser, UNet2DModel) else "transformer"
        index: dict[str, Any] = {
            # diffusers has no pipeline of these parts with a class-conditional UNet; they load one by one.
            "_class_name": "DiTPipeline" if part == "transformer" else "DiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            part: ["diffusers", type(self.denoiser).__name__],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "vae": ["diffusers", type(self.vae).__name__],
        }
        if self.classes is not None and part == "transformer":
            index["id2label"] = {str(label): name for label, name in enumerate(self.classes)}
        write_json(out / "model_index.json", index)
        for name, network in (("vae", self.vae), (part, self.denoiser)):
            stored = copy.deepcopy(network)  # not cast in place: this prior stays what it was
            cast(stored, self.device, DTYPES[dtype]).save_pretrained(out / name)
        self.scheduler.save_pretrained(out / "scheduler")
        write_json(
            out / PRIOR_JSON,
            {"kind": "class_conditional", "classes": self.classes, "image_size": self.image_size, **extra},
        )


def _latent_shape(
    vae: AutoencoderKL | AutoencoderTiny, denoiser: UNet2DModel | DiTTransformer2DModel
) -> tuple[int, int, int]:
    """(C, h, w) of the latents that both work on; a ValueError where there are none such."""
    size = denoiser.config["sample_size"]
    if size is None:
        raise ValueError("prior: the denoiser's config has no sample_size, so the latents' size is unknown")
    height, width = (size, size) if isinstance(size, int) else size
    channels = denoiser.config["in_channels"]
    if vae.config["latent_channels"] != channels:
        raise ValueError(
            f"prior: the autoencoder makes {vae.config['latent_channels']} latent channels, "
            f"the denoiser expects {channels}; the two folders belong to different models"
        )
    out_channels = denoiser.config["out_channels"] or channels
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"prior: expected {channels} or {2 * channels} output channels, got {out_channels}")
    if height != width:
        raise ValueError(f"prior: expected square latents, got {height} x {width}")
    return channels, height, width


def _tensors(vae: AutoencoderKL | AutoencoderTiny, denoiser: UNet2DModel | DiTTransformer2DModel) -> dict[str, Tensor]:
    networks = {"vae": vae, "denoiser": denoiser}
    return {f"{part}.{name}": t for part, net in networks.items() for name, t in net.state_dict().items()}


def _latents_of(extra: dict[str, Any], vae: Any, folder: Path) -> str | None:
    """Whose latents those of a copy with another decoder are, where the folder says so of this encoder."""
    known = extra.get("latents")
    if known is None:
        return None
    if not isinstance(known, dict) or not {"encoder", "prior"} <= set(known):
        raise ValueError(f'prior: {PRIOR_JSON} in {folder}: expected "latents" to hold encoder and prior, got {known}')
    if known["encoder"] != encoder_digest(vae):
        raise ValueError(
            f"prior: {folder} says that its latents are those of the prior {known['prior']}, but its encoder "
            f'is another by now; take "latents" out of {PRIOR_JSON}, and encode anew'
        )
    return str(known["prior"])


def _class_names(index: dict[str, Any], extra: dict[str, Any]) -> list[str] | None:
    """Names from ddoq_prior.json, else from DiTPipeline's id2label."""
    given = extra.get("classes")
    if given is not None:
        if not isinstance(given, list):
            raise ValueError(
                f'prior: {PRIOR_JSON}: expected "classes" to be a list of names in label order, got {str(given)[:80]}'
            )
        return [str(name) for name in given]
    id2label = index.get("id2label")
    if not id2label:
        return None
    labels = list(map(str, range(len(id2label))))
    if not isinstance(id2label, dict) or sorted(id2label) != sorted(labels):
        raise ValueError(
            'prior: model_index.json: expected "id2label" to name the labels "0", "1", "2", ... without a gap, got '
            f"{str(id2label)[:80]}"
        )
    return [str(id2label[label]) for label in labels]


def _class_count(
    denoiser: UNet2DModel | DiTTransformer2DModel, classes: list[str] | None, given: int | None
) -> tuple[int, bool]:
    """(num_classes, has a null label). A UNet's table does not tell if its last row is the null."""
    if isinstance(denoiser, DiTTransformer2DModel):
        labels = int(denoiser.config["num_embeds_ada_norm"])
        if classes is not None and len(classes) != labels:
            raise ValueError(f"prior: {len(classes)} class names for a transformer of {labels} classes")
        return labels, True
    rows = denoiser.config["num_class_embeds"]
    if not rows or denoiser.config["class_embed_type"] is not None:
        raise ValueError(
            "prior: the UNet has no table of class embeddings (num_class_embeds); it is not class-conditional"
        )
    count = len(classes) if classes is not None else given
    if count is not None and type(count) is not int:
        raise ValueError(f'prior: {PRIOR_JSON}: expected "num_classes" to be a whole number, got {count!r}')
    if count is None:
        raise ValueError(
            f"prior: the UNet has {rows} class embeddings and nothing says whether the last is the null label: {rows} "
            f'classes or {rows - 1}? Write {{"num_classes": {rows - 1}}} (or {rows}), or the names as '
            f'{{"classes": [...]}}, into {PRIOR_JSON} in its folder'
        )
    if rows - count not in (0, 1):
        raise ValueError(
            f"prior: {count} classes for a UNet with {rows} class embeddings; expected {rows - 1} "
            f"(and the null label) or {rows}"
        )
    return count, rows == count + 1
