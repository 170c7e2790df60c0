"""Shards with every kind of damage and every kind of picture, with what must come of each: made here, byte by byte."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ddoq_ray.data.samples import encode_png
from ddoq_ray.data.tar_writing import write_tar

NUM_CLASSES = 3
NO_LABEL = "no label (.cls)"
NOT_ADJACENT = "members of one key are not next to each other"
UNDECODABLE = "undecodable image: "


@dataclass
class Shard:
    """The members of a tar, and what reading it must give.

    Attributes:
        good: key -> (class_id, RGB pixels [H, W, 3], largest difference allowed), in the tar's order.
        bad: (byte offset of the first member, key, beginning of the reason).
        data: The tar, where it is not just its members.
    """

    members: list[tuple[str, bytes]] = field(default_factory=list)
    good: dict[str, tuple[int, np.ndarray, int]] = field(default_factory=dict)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    data: bytes | None = None

    @property
    def end(self) -> int:
        """Where the next member's header will be."""
        return sum(512 + -(-len(data) // 512) * 512 for _, data in self.members)

    def tar(self) -> bytes:
        return write_tar(self.members) if self.data is None else self.data

    def take(self, *members: tuple[str, bytes]) -> int:
        """Append members; the byte offset of the first."""
        at = self.end
        self.members += members
        return at

    def sample(self, key: str, class_id: int = 1, **other: bytes) -> None:
        """A good sample with a picture of its own, and other members by extension."""
        grey = np.full((4, 6), (17 * len(self.members)) % 256, np.uint8)
        self.picture(key, class_id, encode_png(grey), np.repeat(grey[..., None], 3, axis=2))
        self.take(*((f"{key}.{extension}", data) for extension, data in other.items()))

    def picture(
        self, key: str, class_id: int, data: bytes, pixels: np.ndarray, bound: int = 0, extension: str = "png"
    ) -> None:
        self.take((f"{key}.{extension}", data), (f"{key}.cls", str(class_id).encode()))
        self.good[key] = (class_id, pixels, bound)

    def refuse(self, key: str, reason: str, *members: tuple[str, bytes]) -> None:
        """Members by extension that are refused under `key` for `reason`."""
        self.bad.append((self.take(*((f"{key}.{extension}", data) for extension, data in members)), key, reason))


def png(value: int = 0) -> bytes:
    return encode_png(np.full((4, 6), value, np.uint8))


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def malformed() -> dict[str, Shard]:
    """Name -> shard. Keys begin with the shard's name, so that they are unique over all of them."""
    made = {
        "labels": _labels(), "pictures": _pictures(), "apart": _apart(), "dots": _dots(), "twice": _twice(),
        "strange": _strange(), "formats": _formats(), "clean": _clean("clean"), **_no_tars(), **_cut(), **_packed(),
    }  # fmt: skip
    for name, shard in made.items():
        assert all(key.removeprefix("folder/").startswith(name) for key in shard.good), name
    return made


def _labels() -> Shard:
    shard = Shard()
    shard.sample("labels-first", 0)
    shard.refuse("labels-none", NO_LABEL, ("png", png()))
    shard.sample("labels-second", 2)
    words = [b"cat", b"1.5", b"1_0", b"1.0e0", b"\xef\xbc\x91", b"0x1", b"1 2", b"9" * 100]
    for i, text in enumerate(words):
        shard.refuse(f"labels-word{i}", "label is not a number: ", ("png", png()), ("cls", text))
    shard.refuse("labels-empty", "no label: the .cls is empty", ("png", png()), ("cls", b" "))
    shard.refuse("labels-minus", "no label: the .cls says -1", ("png", png()), ("cls", b"-1"))
    for i, text in enumerate([b"3", b"-2", b"999999999999"]):
        shard.refuse(f"labels-outside{i}", "label is outside the class list (0 to 2): ", ("png", png()), ("cls", text))
    shard.take(("labels-spaces.png", png(9)), ("labels-spaces.cls", b" +1\r\n"))
    shard.good["labels-spaces"] = (1, np.full((4, 6, 3), 9, np.uint8), 0)
    shard.take(("labels-float.png", png(8)), ("labels-float.cls", b"\xef\xbb\xbf2.0\n"))  # with a byte order mark
    shard.good["labels-float"] = (2, np.full((4, 6, 3), 8, np.uint8), 0)
    shard.refuse("labels-alone", "no image among its members: cls", ("cls", b"1"))
    shard.refuse("labels-text", "no image among its members: cls, txt", ("txt", b"words"), ("cls", b"1"))
    shard.refuse("labels-other", NO_LABEL, ("json", b"{}"))
    return shard


def _pictures() -> Shard:
    shard = Shard()
    jpeg = saved(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3), "JPEG")
    for i, (extension, data) in enumerate([
        ("jpg", b"not a picture"), ("jpg", b""), ("jpg", jpeg[: len(jpeg) // 2]), ("png", png()[:-30]),
        ("webp", b"RIFF\0\0\0\0WEBP"), ("png", b"\x89PNG\r\n\x1a\n"), ("tif", b"II*\0"), ("bmp", b"BM"),
    ]):  # fmt: skip
        shard.refuse(f"pictures-broken{i}", UNDECODABLE, (extension, data), ("cls", b"1"))
        shard.sample(f"pictures-good{i}", i % 3)
    bomb = bytearray(png())
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2  # the size in its header
    shard.refuse("pictures-bomb", UNDECODABLE, ("png", bytes(bomb)), ("cls", b"1"))  # its checksum is wrong too
    huge = saved(Image.new("1", (10_000, 8_001)), "PNG")
    shard.refuse("pictures-huge", "too many pixels: 10000 x 8001", ("png", huge), ("cls", b"1"))
    shard.refuse("pictures-two", "more than one picture: png, jpg", ("png", png()), ("jpg", jpeg), ("cls", b"1"))
    return shard


def _apart() -> Shard:
    """Members of one key with others between them: no half may take another's label, and none may vanish."""
    shard = Shard()
    shard.refuse("apart-a", NOT_ADJACENT, ("png", png()))
    shard.sample("apart-b", 0)
    shard.refuse("apart-a", NOT_ADJACENT, ("cls", b"1"))
    shard.sample("apart-c", 2)
    shard.refuse("apart-b", NOT_ADJACENT, ("cls", b"2"))  # b has its own label, beside it
    shard.refuse("apart-d", NOT_ADJACENT, ("cls", b"2"))
    shard.sample("apart-e", 1)
    shard.refuse("apart-d", NOT_ADJACENT, ("png", png()), ("cls", b"1"))
    shard.refuse("apart-c", "a sample with this key came before", ("png", png()), ("cls", b"0"))
    shard.refuse("apart-d", NOT_ADJACENT, ("json", b"{}"))
    return shard


def _dots() -> Shard:
    shard = Shard()
    for i in range(4):  # keys that agree up to the first dot
        shard.sample(f"dots-a.b_{i}", i % 3)
    for i in range(3):  # as sorted by name: labels first
        shard.take((f"dots-b.{i}.cls", str(i).encode()), (f"dots-b.{i}.png", png(i)))
        shard.good[f"dots-b.{i}"] = (i, np.full((4, 6, 3), i, np.uint8), 0)
    shard.sample("dots-one.more", 2)
    shard.sample("dots-seg", 1, **{"seg.png": png(99), "seg.json": b"{}"})  # further members of dots-seg
    shard.sample("dots-two", 1)
    shard.sample("dots-two.2", 0)  # a picture and a label of its own
    for i in range(40):  # all of one name before the dot, beside one without: not held till the end
        shard.sample("dots-many" if i == 0 else f"dots-many.{i}", i % 3)
    shard.take(("dots-x.seg.png", png(99)), ("dots-x.cls", b"2"), ("dots-x.png", png(5)))
    shard.good["dots-x"] = (2, np.full((4, 6, 3), 5, np.uint8), 0)
    shard.sample("folder/dots-a.b_1", 0)
    shard.sample("dots.dir/with.dots", 1)
    shard.refuse("dots-half.1", NO_LABEL, ("png", png()))
    shard.refuse("dots-other.2", "no image among its members: cls", ("cls", b"1"))
    return shard


def _twice() -> Shard:
    shard = Shard()
    shard.sample("twice-first", 0)
    shard.refuse("twice-picture", "two members named .png", ("png", png()), ("cls", b"1"), ("PNG", png()))
    shard.refuse("twice-label", "two members named .cls", ("png", png()), ("cls", b"1"), ("cls", b"2"))
    shard.refuse("twice-half", "two members named .png", ("png", png()), ("png", png()))
    shard.sample("twice-last", 1)
    return shard


def _strange() -> Shard:
    """Members that are no part of a sample."""
    shard = Shard()
    shard.bad.append((shard.take(("README", b"words")), "README", "member without an extension"))
    shard.sample("strange-a", 0)
    shard.take(("._strange-a.png", b"\0\5\x16\7"), ("folder/.DS_Store", b""))  # hidden: not even refused
    for extension in ("PNG", "Png"):
        shard.picture(f"strange-{extension}", 2, png(7), np.full((4, 6, 3), 7, np.uint8), extension=extension)
    shard.bad.append((shard.take(("folder/strange", b"")), "folder/strange", "member without an extension"))
    shard.sample("strange-z", 1)
    return shard


def _clean(name: str, samples: int = 5) -> Shard:
    shard = Shard()
    for i in range(samples):
        shard.sample(f"{name}-{i}", i % 3)
    return shard


def _no_tars() -> dict[str, Shard]:
    contents = {"empty": b"", "html": b"<html>503</html>" * 100, "garbage": bytes(range(256)) * 40, "short": b"x"}
    shards = {name: Shard(data=data, bad=[(0, "", "not a tar")]) for name, data in contents.items()}
    return shards | {"zeros": Shard(data=bytes(10240))}  # a tar of nothing: nothing is lost


def _cut() -> dict[str, Shard]:
    """Tars that end too early, or hold garbage, in the third of five samples; each of its members takes 1,024 bytes."""
    third = 4 * 1024
    end = "broken tar: from byte "
    lost = "broken tar: "
    cuts = {
        "cut-header": (third + 100, [(third, "", end)], 2),
        "cut-between": (third, [], 2),  # as a tar without its end: whole
        "cut-picture": (third + 512 + 20, [(third, "cut-picture-2", lost), (third, "", end)], 2),
        "cut-label": (third + 1024 + 100, [(third, "cut-label-2", lost), (third + 1024, "", end)], 2),
        "cut-label-data": (third + 1024 + 512, [(third, "cut-label-data-2", lost), (third + 1024, "", end)], 2),
    }
    shards = {}
    for name, (at, bad, whole) in cuts.items():
        shard = _clean(name)
        shard.data = shard.tar()[:at]
        shard.good = dict(list(shard.good.items())[:whole])
        shard.bad = bad
        shards[name] = shard
    shard = _clean("cut-garbage")
    shard.data = shard.tar()[:third] + b"\x37" * 512 + shard.tar()[third + 512 :]
    shard.good = dict(list(shard.good.items())[:2])
    shard.bad = [(third, "", end)]
    return shards | {"cut-garbage": shard}


def _packed() -> dict[str, Shard]:
    """A compressed tar, whole and cut; one of long names, which take headers of their own."""
    whole, cut, long = _clean("packed-whole"), _clean("packed-cut", 40), _clean("packed-long", 3)
    whole.data = gzip.compress(whole.tar(), mtime=0)
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)  # else nothing is left to cut
    cut = Shard()
    for i, pixels in enumerate(noise):
        cut.picture(f"packed-cut-{i:02d}", i % 3, encode_png(pixels), pixels)
    packed = gzip.compress(cut.tar(), mtime=0)
    cut.data = packed[: len(packed) // 2]
    cut.bad = [(-1, "*", "broken tar: ")]  # where, depends on the compression
    out = io.BytesIO()
    name = "packed-long-" + "x" * 120
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in [*long.members, (f"{name}.png", png(3)), (f"{name}.cls", b"2")]:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    long.data = out.getvalue()
    long.good[name] = (2, np.full((4, 6, 3), 3, np.uint8), 0)
    return {"packed-whole": whole, "packed-cut": cut, "packed-long": long}


def _formats() -> Shard:
    """Each format and kind of picture, good: pixels must be right, within what the format itself loses."""
    shard = Shard()
    y, x = np.mgrid[:24, :32]
    rgb = np.stack([8 * x, 10 * y, 255 - 4 * (x + y)], axis=2).clip(0, 255).astype(np.uint8)
    grey = rgb[..., 0]
    greys = np.repeat(grey[..., None], 3, axis=2)

    def add(key: str, extension: str, data: bytes, pixels: np.ndarray, bound: int = 0) -> None:
        shard.picture(f"formats-{key}", len(shard.good) % 3, data, pixels, bound, extension)

    for extension in ("jpg", "jpeg", "JPEG"):
        add(f"rgb-{extension}", extension, saved(rgb, "JPEG", quality=100, subsampling=0), rgb, 6)
    for extension, kind in [("png", "PNG"), ("bmp", "BMP"), ("tif", "TIFF"), ("tiff", "TIFF"), ("ppm", "PPM")]:
        add(f"rgb-{extension}", extension, saved(rgb, kind), rgb)
        add(f"grey-{extension}", extension, saved(grey, kind), greys)
    add("rgb-webp", "webp", saved(rgb, "WEBP", lossless=True), rgb)
    add("grey-jpg", "jpg", saved(grey, "JPEG", quality=100), greys, 4)
    add("misnamed", "jpg", saved(rgb, "PNG"), rgb)

    palette = Image.fromarray((x % 4).astype(np.uint8))
    colours = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0], [90, 90, 90]], np.uint8)
    palette.putpalette(colours.tobytes())
    add("palette", "png", saved(palette, "PNG"), colours[x % 4])
    clear = colours.copy()
    clear[1] = 0
    add("palette-clear", "png", saved(palette, "PNG", transparency=1), clear[x % 4])

    alpha = np.where(x < 16, 255, 0).astype(np.uint8)
    add("rgba", "png", saved(np.dstack([rgb, alpha]), "PNG"), rgb * (alpha[..., None] > 0))
    add("rgba-webp", "webp", saved(np.dstack([rgb, alpha]), "WEBP", lossless=True), rgb * (alpha[..., None] > 0))
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    add("la", "png", saved(la, "PNG"), greys * (alpha[..., None] > 0))

    wide = grey.astype(np.uint16) * 257
    add("wide-png", "png", saved(wide, "PNG"), greys)
    add("wide-tif", "tif", saved(wide, "TIFF"), greys)
    ink = np.dstack([255 - rgb, np.zeros_like(grey)])
    add("cmyk-jpg", "jpg", saved(Image.fromarray(ink, "CMYK"), "JPEG", quality=100), rgb, 6)
    add("cmyk-tif", "tif", saved(Image.fromarray(ink, "CMYK"), "TIFF"), rgb)

    exif = Image.Exif()
    exif[0x0112] = 6
    add("turned-png", "png", saved(rgb, "PNG", exif=exif), np.rot90(rgb, 3))
    add("turned-jpg", "jpg", saved(rgb, "JPEG", quality=100, subsampling=0, exif=exif), np.rot90(rgb, 3), 6)
    return shard
