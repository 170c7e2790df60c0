"""How centroids become images, and by how many workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ddoq_ray.config.schema import option, require


@dataclass(frozen=True)
class SynthesizerConfig:
    """The defaults of `start` to `guidance` are for the digits' prior, as every prior brings its own (configs/prior).

    Its strength was chosen on the digits' selection split: the best mean over IPC 1, 5 and 10
    (studies/results/strength.json).
    """

    start: Literal["noised", "inversion", "noise", "guided"] = option(
        "noised",
        "noised: centroid noised to the strength, then denoised; inversion: DDIM inversion; noise: baseline; guided: "
        "from noise, pulled towards the centroid while there is much noise",
    )
    strength: float = option(0.1, "part of the diffusion that is run, 0 (plain decoding) to 1")
    steps: int = option(25, "diffusion steps of a whole run, of which the strength's part is done")
    guidance: float | None = option(
        1.0,
        "classifier-free guidance scale; 1 = none; null = the published one: 8 for Stable Diffusion, 4 where there is "
        "a null label, none elsewhere",
    )
    guide_until: float = option(0.5, "start=guided: pull while the noise's share of a latent is above this, 0 to 1")
    guide_scale: float = option(0.3, "start=guided: the part of the way to the centroid that each pull goes, 0 to 1")
    guide_pool: int = option(1, "start=guided: pull the means of squares of this many latent pixels; 1 = every value")
    rescale: bool = option(
        False, "widen the centroids of a class about their mean until they spread as the class's latents do"
    )
    candidates: int = option(1, "images made of each centroid, of which the judge keeps one")
    keep: Literal["confident", "cell"] = option(
        "confident",
        "the candidate that is kept: confident: the one the judge is surest of; cell: the surest of those whose own "
        "latent is nearest to this centroid",
    )
    judge: str | None = option(
        None, "classifier that chooses among candidates, as teacher.path; null = the teacher, of several the first"
    )
    retries: int = option(
        2, "how often an image of one colour, or of NaN or infinite values, is made anew from other noise"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "the arithmetic of denoiser and decoder")
    channels_last: bool = option(False, "channels innermost, which convolutions in half precision want")
    compile: bool = option(False, "run the denoiser through torch.compile")
    batch: int = option(50, "images in one forward pass; part of what makes the images the same bytes")
    decode_batch: int | None = option(
        None, "images that are decoded at once, for less memory than a batch takes; null: the batch; part of the bytes"
    )
    image_size: int | None = option(
        None, "side of the stored images, in pixels; null: as the prior makes them (D4M stores its 512 px at 224)"
    )
    format: Literal["png", "jpeg", "webp"] = option(
        "png", "how images are stored; jpeg and webp take less room, and change the pixels"
    )
    quality: int = option(95, "format=jpeg, webp: 1 to 100, the more the better and the larger")
    shard_images: int = option(50, "images in one tar: the unit of work, and what a death costs")
    min_workers: int = option(1, "decoder actors to start with")
    max_workers: int = option(2, "decoder actors to grow to when there is room")

    def __post_init__(self) -> None:
        require(0 <= self.strength <= 1, f"synthesizer.strength={self.strength}: expected 0 to 1")
        require(self.steps >= 1, f"synthesizer.steps={self.steps}: expected 1 or more")
        require(
            self.guidance is None or self.guidance >= 0, f"synthesizer.guidance={self.guidance}: expected 0 or more"
        )
        for key in ("guide_until", "guide_scale"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"synthesizer.{key}={value}: expected 0 to 1")
        for key in ("guide_pool", "candidates"):
            value = getattr(self, key)
            require(value >= 1, f"synthesizer.{key}={value}: expected 1 or more")
        require(self.batch >= 1, f"synthesizer.batch={self.batch}: expected 1 or more")
        require(
            self.decode_batch is None or self.decode_batch >= 1,
            f"synthesizer.decode_batch={self.decode_batch}: expected 1 or more, or null",
        )
        require(
            self.image_size is None or self.image_size >= 1,
            f"synthesizer.image_size={self.image_size}: expected 1 or more, or null",
        )
        require(self.retries >= 0, f"synthesizer.retries={self.retries}: expected 0 or more")
        require(1 <= self.quality <= 100, f"synthesizer.quality={self.quality}: expected 1 to 100")
        require(self.shard_images >= 1, f"synthesizer.shard_images={self.shard_images}: expected 1 or more")
        require(self.min_workers >= 1, f"synthesizer.min_workers={self.min_workers}: expected 1 or more")
        require(
            self.max_workers >= self.min_workers,
            f"synthesizer.max_workers={self.max_workers}: expected synthesizer.min_workers={self.min_workers} or more",
        )

    @property
    def noiseless(self) -> bool:
        """Whether centroids are decoded as they are: there is no noise that could be other."""
        return self.strength == 0 and self.start not in ("noise", "guided")

    @property
    def loading(self) -> dict[str, Any]:
        """How the prior's networks run: what `load_prior` is told beside what it loads."""
        return {key: getattr(self, key) for key in ("dtype", "channels_last", "compile", "decode_batch")}
