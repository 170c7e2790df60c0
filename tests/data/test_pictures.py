"""Pictures of every usual format and kind become the same 8-bit RGB; squares equal torchvision's."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from ddoq_ray.config.latents import EncoderConfig
from ddoq_ray.data.pictures import MAX_MEGAPIXELS, RESIZE_MODES, RefusedPicture, Resize, decode_rgb, reframe, to_square

BICUBIC = InterpolationMode.BICUBIC
RED = np.broadcast_to(np.array([200, 10, 30], np.uint8), (4, 6, 3))
GREY = (np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).astype(np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)


def photo(height: int, width: int) -> np.ndarray:
    """Smooth colours with an edge: what JPEG and resampling both have to work on. uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 2 * y), np.cos(7 * y - 3 * x), np.sin(11 * x * y)], axis=2)
    waves[(x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.03] = (0.9, -0.8, 0.3)
    return (127.5 + 127.5 * waves).round().clip(0, 255).astype(np.uint8)


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def by_torchvision(data: bytes) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_image(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def wide_png(pixels: np.ndarray, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG, which PIL cannot write in colour: uint16 [H, W, channels]; `kind`: 0 L, 2 RGB, 4 LA, 6 RGBA."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    extra = b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# Formats


@pytest.mark.parametrize(
    ("kind", "options", "bound"),
    [
        ("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("TIFF", {"compression": "tiff_lzw"}, 0), ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0), ("WEBP", {"quality": 95}, 6), ("JPEG", {"quality": 95}, 6),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}, 4), ("MPO", {"quality": 95}, 6),
    ],
)  # fmt: skip
def test_every_format_of_colour(kind: str, options: dict[str, Any], bound: float) -> None:
    """Exact where the format is, else near on average; and what torchvision decodes, which has its own decoders."""
    pixels, data = photo(32, 48), saved(photo(32, 48), kind, **options)
    assert np.abs(decoded(data).astype(int) - pixels).mean() <= bound  # most of it is halved chroma
    if kind in ("PNG", "JPEG", "MPO", "WEBP"):
        assert np.abs(decoded(data).astype(int) - by_torchvision(data)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_grey_in_every_format_without_loss(kind: str) -> None:
    assert np.array_equal(decoded(saved(GREY, kind)), GREY_RGB)


def test_grey_jpeg_and_webp() -> None:
    for kind in ("JPEG", "WEBP"):
        assert np.abs(decoded(saved(GREY, kind, quality=100)).astype(int) - GREY_RGB).max() <= 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_black_and_white(kind: str) -> None:
    bits = (np.indices((4, 6)).sum(0) % 2).astype(bool)
    expected = np.repeat(bits[..., None], 3, axis=2) * np.uint8(255)
    assert np.array_equal(decoded(saved(Image.fromarray(bits), kind)), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_palette(kind: str) -> None:
    palette = Image.fromarray(np.tile(np.arange(6, dtype=np.uint8), (4, 1)))
    palette.putpalette([v for i in range(256) for v in (i, 2 * i % 256, 255 - i)])
    assert decoded(saved(palette, kind))[0].tolist() == [[i, 2 * i, 255 - i] for i in range(6)]


# 16 bits


def test_wide_grey() -> None:
    wide = (np.arange(24, dtype=np.uint16).reshape(4, 6) * 2570).astype(np.uint16)  # 10 * 257 a step
    assert np.array_equal(decoded(saved(wide)), GREY_RGB)
    assert np.array_equal(decoded(saved(wide, "TIFF")), GREY_RGB)
    assert np.array_equal(decoded(b"P5 6 4 65535\n" + wide.astype(">u2").tobytes()), GREY_RGB)
    rounded = np.array([[0, 128, 129, 385, 386, 65535 - 128, 65535 - 129, 65535]], np.uint16)
    assert decoded(saved(rounded))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255, 254, 255]


def test_wide_colour_is_at_most_one_away() -> None:
    wide = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    exact = wide / 257
    assert np.abs(decoded(wide_png(wide, 2)) - exact).max() <= 1
    opaque = np.concatenate([wide, np.full((5, 7, 1), 65535, np.uint16)], axis=2)
    assert np.abs(decoded(wide_png(opaque, 6)) - exact).max() <= 1
    assert np.abs(decoded(wide_png(opaque[..., 2:], 4)) - exact[..., 2:]).max() <= 1


def test_wide_grey_with_a_transparent_value() -> None:
    wide = np.array([[[1000], [2570], [65535]]], np.uint16)
    assert decoded(wide_png(wide, 0, (b"tRNS", struct.pack(">H", 65535))))[0, :, 0].tolist() == [4, 10, 0]


@pytest.mark.parametrize(("dtype", "words"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_values_without_a_range_are_refused(dtype: type, words: str) -> None:
    with pytest.raises(RefusedPicture, match=rf"^undecodable image: {words} values"):
        decode_rgb(saved(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


# Transparency


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_resolved_on_black(kind: str) -> None:
    alpha = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]], np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = decoded(saved(alpha, kind, **options))[0]
    assert got[0].tolist() == [200, 100, 50] and got[1].tolist() == [0, 0, 0]
    assert np.abs(got[2] - np.array([200, 100, 50]) * 128 / 255).max() <= 1


def test_grey_alpha_and_transparent_colours() -> None:
    grey = np.array([[[90, 255], [90, 0]]], np.uint8)
    assert decoded(saved(Image.fromarray(grey, "LA")))[0, :, 0].tolist() == [90, 0]

    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
    for kind in ("PNG", "GIF"):
        assert decoded(saved(palette, kind, transparency=1))[0].tolist() == [[10, 20, 30], [0, 0, 0]], kind
    partly = saved(palette, transparency=bytes([255, 128]))
    assert np.abs(decoded(partly)[0] - [[10, 20, 30], [20, 25, 30]]).max() <= 1

    assert decoded(saved(np.array([[7, 9]], np.uint8), transparency=9))[0, :, 0].tolist() == [7, 0]
    colours = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert decoded(saved(colours, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [0, 0, 0]]


# CMYK


def cmyk_jpeg(planes: np.ndarray, transform: int) -> bytes:
    """A JPEG of four planes [H, W, 4]; Adobe's marker says what they are: 0 CMYK, 2 YCCK. Stored inverted, by PIL."""
    data = bytearray(saved(Image.fromarray(planes, "CMYK"), "JPEG", quality=100))
    at = data.index(b"Adobe")
    data[at + 11] = transform
    return bytes(data)


def test_cmyk_and_ycck_jpeg() -> None:
    ink = np.zeros((8, 40, 4), np.uint8)
    for i, colour in enumerate([(0, 0, 0, 255), (0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 100, 0), (50, 60, 70, 80)]):
        ink[:, 8 * i : 8 * i + 8] = colour
    ink_light = 255 - ink.astype(int)
    expected = ink_light[..., :3] * ink_light[..., 3:] / 255
    assert np.abs(decoded(cmyk_jpeg(ink, 0)) - expected).max() <= 3
    assert np.abs(decoded(saved(Image.fromarray(ink, "CMYK"), "TIFF")) - expected).max() <= 1

    # YCCK stores C, M and Y as luminance and chrominance, and K as it is, all inverted.
    ycc = np.asarray(Image.fromarray(ink[..., :3]).convert("YCbCr"))
    ycck = cmyk_jpeg(np.concatenate([255 - ycc, ink[..., 3:]], axis=2), 2)
    assert np.abs(decoded(ycck) - expected).max() <= 4
    for data in (cmyk_jpeg(ink, 0), ycck):
        assert np.abs(decoded(data).astype(int) - by_torchvision(data)).max() <= 1


# Orientation

TURNS = {
    1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 3), 7: lambda p: np.rot90(p, 2).transpose(1, 0, 2), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4, :8] = 255
    pixels[:4, 8:] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    got = decoded(saved(pixels, kind, exif=exif, **options))
    assert np.abs(got.astype(int) - TURNS[orientation](pixels)).max(initial=0) <= 4
    assert got.shape == TURNS[orientation](pixels).shape


def test_orientation_goes_with_a_conversion() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(decoded(saved(GREY, exif=exif)), np.rot90(GREY_RGB, 3))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_damaged_exif_spoils_no_picture(exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of the EXIF
        assert decoded(saved(RED, "JPEG", exif=exif)).shape == (4, 6, 3)


# Refusals


def huge_png(width: int, height: int) -> bytes:
    """The header of a PNG of that size, and nothing to decode."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(("width", "height"), [(10_000, 8_001), (100_000, 100_000)])
def test_too_many_pixels_are_refused_by_the_header(width: int, height: int) -> None:
    with pytest.raises(RefusedPicture, match=rf"^too many pixels: .*{MAX_MEGAPIXELS} megapixels are the limit"):
        decode_rgb(huge_png(width, height))
    with pytest.raises(RefusedPicture, match=r"^undecodable image"):
        decode_rgb(huge_png(10_000, 8_000))  # at the limit it is decoded, and found empty


def test_what_is_no_picture_is_refused_in_the_same_words_each_time() -> None:
    jpeg = saved(photo(32, 32), "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n"  # PIL would start another program for it
    for data in (b"", b"no picture", eps, saved(RED)[:-30], jpeg[: len(jpeg) // 2], jpeg[:100]):
        reasons = set()
        for _ in range(2):
            with pytest.raises(RefusedPicture, match=r"^undecodable image: ") as error:
                decode_rgb(data)
            reasons.add(str(error.value))
        assert len(reasons) == 1


def test_the_content_counts_and_not_the_name() -> None:
    """ImageNet has a PNG named .JPEG; nothing here knows names."""
    assert np.array_equal(decoded(saved(RED, "PNG")), RED)


# Squares

SIZES = [(60, 90), (90, 60), (64, 64), (333, 500), (37, 211), (20, 30), (500, 375), (48, 48), (211, 37)]


def on_pil(image: Image.Image, size: int, mode: Resize) -> np.ndarray:
    """torchvision's own steps on a PIL picture."""
    if mode == "squash":
        out = F.resize(image, [size, size], BICUBIC)
    elif mode == "center-crop":
        out = F.center_crop(F.resize(image, size, BICUBIC), [size, size])
    else:
        longer = max(image.size)
        inner = F.resize(image, [size * image.height // longer, size * image.width // longer], BICUBIC)
        left, top = (size - inner.width) // 2, (size - inner.height) // 2
        out = F.pad(inner, [left, top, size - inner.width - left, size - inner.height - top])
    return np.asarray(out)


def on_tensor(image: Image.Image, size: int, mode: Resize) -> np.ndarray:
    """The same, antialiased, on a tensor of floats: PIL rounds and clips between its two passes, this never."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    if mode == "squash":
        out = F.resize(x, [size, size], BICUBIC, antialias=True)
    elif mode == "center-crop":
        out = F.center_crop(F.resize(x, size, BICUBIC, antialias=True), [size, size])
    else:
        longer = max(image.size)
        inner = F.resize(x, [size * image.height // longer, size * image.width // longer], BICUBIC, antialias=True)
        left, top = (size - inner.shape[2]) // 2, (size - inner.shape[1]) // 2
        out = F.pad(inner, [left, top, size - inner.shape[2] - left, size - inner.shape[1] - top])
    return out.clamp(0, 255).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_squares_equal_torchvisions(mode: Resize, height: int, width: int) -> None:
    """Bit for bit on its PIL path; on tensors within two roundings, where no overshoot is clipped half-way.

    The second rounding's weights amplify the first by at most 1.25, the sum of bicubic weights without their signs.
    """
    image = Image.fromarray(photo(height, width))
    got = to_square(image, 48, mode)
    assert got.shape == (48, 48, 3) and got.dtype == np.uint8
    assert np.array_equal(got, on_pil(image, 48, mode))
    soft = Image.fromarray((photo(height, width) // 2 + 64).astype(np.uint8))  # far from black and white
    assert np.abs(to_square(soft, 48, mode) - on_tensor(soft, 48, mode)).max() <= 0.5 + 0.5 * 1.25 + 0.02
    assert np.abs(got - on_tensor(image, 48, mode)).mean() <= 0.35


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_noise_too(mode: Resize) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (75, 100, 3)).astype(np.uint8))
    assert np.array_equal(to_square(image, 32, mode), on_pil(image, 32, mode))


def test_known_squares() -> None:
    assert to_square(Image.fromarray(RED), 3).tolist() == np.broadcast_to([200, 10, 30], (3, 3, 3)).tolist()
    columns = np.repeat(np.arange(6, dtype=np.uint8)[None, :, None] * 40, 3, axis=2).repeat(4, axis=0)
    assert to_square(Image.fromarray(columns), 4, "center-crop")[..., 0].tolist() == [[40, 80, 120, 160]] * 4
    padded = to_square(Image.fromarray(columns), 6, "pad")[..., 0]
    assert padded[0].tolist() == padded[5].tolist() == [0] * 6
    assert padded[1:5].tolist() == [[0, 40, 80, 120, 160, 200]] * 4
    with pytest.raises(ValueError, match=r"encoder\.resize=stretch: expected one of squash, center-crop, pad"):
        to_square(Image.fromarray(RED), 4, "stretch")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_the_right_size_stays_and_a_line_becomes_a_square(mode: Resize) -> None:
    square = photo(16, 16)
    assert np.array_equal(to_square(Image.fromarray(square), 16, mode), square)
    for shape in ((1, 100_000), (100_000, 1)):  # its whole width at the square's height would be 40 GB
        assert to_square(Image.new("RGB", shape, (9, 9, 9)), 64, mode).max() == 9


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize(("height", "width"), [(30, 44), (44, 30), (30, 45)])
def test_reframe_shows_what_the_square_shows(mode: Resize, height: int, width: int) -> None:
    image = Image.fromarray(photo(height, width))
    framed = reframe(image, mode)
    if mode == "squash":
        assert framed is image
    else:
        edge = min(height, width) if mode == "center-crop" else max(height, width)
        assert framed.size == (edge, edge)
        expected = ImageOps.pad(image, (edge, edge)) if mode == "pad" else None
        if expected is not None and (width - height) % 2 == 0:
            assert np.array_equal(np.asarray(framed), np.asarray(expected))


def test_the_configuration_knows_the_same_modes() -> None:
    assert get_type_hints(EncoderConfig)["resize"] == Resize
