"""Pictures: any file of the usual formats becomes 8-bit RGB, and 8-bit RGB becomes a square of the prior's size."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import get_args

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ddoq_ray.config.latents import Resize as Resize
from ddoq_ray.data.picture_kinds import signature, unread

# As shards usually have them; then the others of the same formats.
IMAGE_EXTENSIONS = (
    "png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "jfif", "jpe", "gif", "pbm", "pnm", "dib", "mpo",
    "apng",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF")  # by content: a name may be wrong
MAX_MEGAPIXELS = 80  # 240 MB decoded; PIL itself warns from 89 on and refuses from 179 on

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it says of a picture is in the refusal's reason

RESIZE_MODES: tuple[Resize, ...] = get_args(Resize)

# Tags of a TIFF.
BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class RefusedPicture(Exception):
    """A picture that is not taken; its text is the reason, ``kind: detail``."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode to 8-bit RGB, upright.

    EXIF orientation is applied; 16-bit values are scaled by 1/257 (grey: rounded; colour: PIL keeps the upper byte,
    at most 1 away), 12-bit ones of a TIFF by their own range, and inverted where its tags say that white is zero;
    transparency is resolved on black; CMYK and YCCK are taken as Adobe writes them (inverted in JPEG) and multiplied
    out. Colour profiles are not applied, as in torchvision. Of several frames the first is taken.

    Raises:
        RefusedPicture: When it is in no known format, is damaged, has more than `MAX_MEGAPIXELS` (told from its
            header, before anything is decoded), or holds values without a range (floating point, 32 bits, signed).
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_MEGAPIXELS * 1_000_000:
            raise RefusedPicture(f"too many pixels: {width} x {height}, and {MAX_MEGAPIXELS} megapixels are the limit")
        if image.format == "TIFF":
            _check_tiff(image)
        image.load()
        return _upright(_rgb(image), image)
    except RefusedPicture:
        raise
    except UnidentifiedImageError:  # its own words hold a memory address, different in every run
        raise RefusedPicture(f"undecodable image: {_why_unknown(data)}") from None
    except Image.DecompressionBombError:
        raise RefusedPicture(f"too many pixels: {MAX_MEGAPIXELS} megapixels are the limit") from None
    except Exception as error:  # PIL raises many kinds; each is one bad picture, never a reason to stop
        raise RefusedPicture(f"undecodable image: {type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_wide_grey(image)
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise RefusedPicture(f"undecodable image: {kind} values have no range that means black to white")
    if image.has_transparency_data:
        image = image.convert("RGBA")  # the colour of a transparent pixel is whatever the editor left there
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    wide = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    top = 2 ** int(tags.get(BITS, (16,))[0]) - 1
    if tags.get(PHOTOMETRIC) == 0:  # PIL inverts 8 bits by itself, wider ones not
        wide = top - wide
    transparent = image.info.get("transparency")
    if transparent is not None:
        wide = np.where(wide == transparent, 0, wide)
    return Image.fromarray(((wide * 510 + top) // (2 * top)).clip(0, 255).astype(np.uint8)).convert("RGB")


def _check_tiff(image: Image.Image) -> None:
    """Refuse what PIL would decode to something else than is meant."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    bits = max(tags.get(BITS, (1,)))
    if 2 in tags.get(SAMPLE_FORMAT, (1,)) and bits < 32:
        raise RefusedPicture(f"undecodable image: signed {bits}-bit values have no range that means black to white")
    if bits > 8 and tags.get(PLANAR, 1) == 2 and len(tags.get(BITS, (1,))) > 1:
        raise RefusedPicture(
            f"undecodable image: a TIFF of {bits}-bit planes, which is not read; write it as 8-bit RGB"
        )


def _why_unknown(data: bytes) -> str:
    """Why PIL knows nothing to do with it: another format by name, or the tags of a TIFF."""
    return tiff_words(data) or unread(data) or "not in any known format"


def tiff_words(data: bytes) -> str | None:
    """What a TIFF that PIL does not read holds, by its tags; None where that cannot be told, or it is none."""
    kind = signature(data)
    if kind in ("TIFF", "BIGTIFF"):
        with contextlib.suppress(Exception):
            directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if kind == "BIGTIFF" else 8])
            stream = io.BytesIO(data)
            stream.seek(directory.next)
            directory.load(stream)
            bits, form = directory.get(BITS, (1,)), max(directory.get(SAMPLE_FORMAT, (1,)))
            samples = {1: "", 2: "signed ", 3: "floating-point "}.get(form, f"format {form} ")
            return (
                f"a TIFF of {len(bits)} x {max(bits)}-bit {samples}samples (photometric "
                f"{directory.get(PHOTOMETRIC)}), which is not read; write it as 8-bit RGB"
            )
    return None


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(source.getexif().get(0x0112, 1))
    except Exception:  # unreadable EXIF says nothing about the pixels, which are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def to_square(image: Image.Image, size: int, resize: Resize = "squash") -> np.ndarray:
    """A picture as size x size by antialiased bicubic resampling.

    Args:
        image: 8-bit RGB.
        size: Edge of the square.
        resize: ``squash``: both edges to `size`, as D4M does. ``center-crop``: the shorter edge to `size`, then the
            middle square, as the DiT priors were trained (they halve large pictures by a box filter first; here one
            antialiased step does it). ``pad``: the longer edge to `size`, the picture in the middle of black.

    Returns:
        uint8 [size, size, 3], bit for bit what torchvision's `resize`, `center_crop` and `pad` make of a PIL picture
        (up to an aspect of 8 : 1; a longer picture loses its ends before it is resized to be cropped).
    """
    if resize not in RESIZE_MODES:
        raise ValueError(f"encoder.resize={resize}: expected one of {', '.join(RESIZE_MODES)}")
    width, height = image.size
    if image.size == (size, size):
        return np.asarray(image, dtype=np.uint8)  # PIL would copy it first
    if resize == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif resize == "center-crop":
        image = _center_crop(image, size)
    else:
        longer = max(width, height)
        inner = (max(1, size * width // longer), max(1, size * height // longer))
        image = image.resize(inner, Image.Resampling.BICUBIC)
        if inner != (size, size):
            left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
            image = ImageOps.expand(image, (left, top, size - inner[0] - left, size - inner[1] - top))
    return np.asarray(image, dtype=np.uint8)


def reframe(image: Image.Image, resize: Resize) -> Image.Image:
    """The part of a picture that `to_square` shows, at its own resolution: `to_square(reframe(x))` squashes no further.

    A picture that is to be squashed stays as it is.
    """
    if resize == "squash" or image.width == image.height:
        return image
    return Image.fromarray(to_square(image, (max if resize == "pad" else min)(image.size), resize))


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    if max(image.size) > 8 * shorter:  # resampled, a very long picture would not fit in memory
        image = _middle(image, min(image.width, 8 * shorter), min(image.height, 8 * shorter))
    resized = (size * image.width // shorter, size * image.height // shorter)
    return _middle(image.resize(resized, Image.Resampling.BICUBIC), size, size)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W, 3] (or [H, W])."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()
