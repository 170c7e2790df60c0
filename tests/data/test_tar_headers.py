"""Tar headers, against Python's own reading of them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from ddoq_ray.data.tar_headers import Header, open_tar

FIELDS = ("name", "size", "mtime", "chksum", "type", "offset", "offset_data")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name in ("a.jpg", "folder/b.jpg", "x" * 90 + "/" + "y" * 90, "n02_ü.JPEG", "with space.cls", "..", "end/"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(name), 1_700_000_000
            tar.addfile(info, io.BytesIO(bytes(len(name))))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.AREGTYPE):
            info = tarfile.TarInfo("kind")
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        if format != tarfile.USTAR_FORMAT:
            info = tarfile.TarInfo("a name of more than two hundred and fifty-five bytes " * 6)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return out.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_every_member_is_as_tarfile_reads_it(format: str) -> None:
    data = archive(FORMATS[format])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = tar.getmembers()
    ours = open_tar(io.BytesIO(data)).getmembers()
    assert len(ours) == len(theirs) >= 12
    for mine, their in zip(ours, theirs, strict=True):
        assert [getattr(mine, f) for f in FIELDS] == [getattr(their, f) for f in FIELDS]


def outcome(kind: type[tarfile.TarInfo], block: bytes) -> list[object]:
    try:
        info = kind.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return [type(error), str(error)]
    return [getattr(info, f) for f in FIELDS]


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_header_is_refused_as_tarfile_does(format: str) -> None:
    """Any byte changed; also with a checksum that fits, where the byte is one of a field that is read."""
    block = archive(FORMATS[format])[:512]
    rng = np.random.default_rng(0)
    read = [*range(100), *range(124, 148), 156, *range(257, 263), *range(345, 500)]
    refused = 0
    for at in range(512):
        changed = bytearray(block)
        changed[at] = int(rng.integers(256))
        mine = outcome(Header, bytes(changed))
        assert mine == outcome(tarfile.TarInfo, bytes(changed))
        refused += isinstance(mine[0], type)
        if at in read:
            total = sum(changed[:148]) + 256 + sum(changed[156:])
            changed[148:156] = f"{total:06o}\0 ".encode()
            assert outcome(Header, bytes(changed)) == outcome(tarfile.TarInfo, bytes(changed))
    assert refused > 450
    for cut in (0, 1, 511):
        assert outcome(Header, block[:cut]) == outcome(tarfile.TarInfo, block[:cut])
    assert outcome(Header, bytes(512)) == outcome(tarfile.TarInfo, bytes(512))


NUMBERS = (b"00000000017\0", b"       17 \0\0\0", b"\x80" + bytes(10) + b"\x07", b"8", b"17\xff")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_is_read_as_tarfile_does(number: bytes) -> None:
    block = bytearray(archive(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = number.ljust(12, b"\0")
    block[148:156] = f"{sum(block[:148]) + 256 + sum(block[156:]):06o}\0 ".encode()
    assert outcome(Header, bytes(block)) == outcome(tarfile.TarInfo, bytes(block))
