"""Tar headers, read quickly: a shard has two members or more a sample, and `tarfile` takes 10 us for each header.

Only those of regular files are read here; every other header, and every one that is not as it should be, is left to
`tarfile`. The fields below are the same as its own; owner, group and mode are not read.
"""

from __future__ import annotations

import tarfile
from typing import IO

_REGULAR = (0x30, 0x00)  # "0", and NUL of older writers
_BASE_256 = 0x80  # the first bit of a number that is no octal text


class Header(tarfile.TarInfo):
    """A member of a tar: `name`, `size`, `mtime`, `chksum`, `type` and the offsets."""

    __slots__ = ()

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:  # type: ignore[override]
        """A header of 512 bytes.

        Raises:
            tarfile.HeaderError: When it is no header.
        """
        plain = len(buf) == tarfile.BLOCKSIZE and buf[257:262] == b"ustar" and buf[156] in _REGULAR
        if plain and (buf[124] | buf[136] | buf[148]) < _BASE_256:
            try:
                size, mtime, checksum = _octal(buf[124:136]), _octal(buf[136:148]), _octal(buf[148:156])
            except ValueError:
                return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]
            name = _text(buf[:100], encoding, errors)
            # A regular file whose name ends in a slash is a folder to tarfile.
            if checksum == sum(buf) - sum(buf[148:156]) + 8 * 0x20 and not name.endswith("/"):
                header = cls(name)
                if buf[345]:
                    header.name = f"{_text(buf[345:500], encoding, errors)}/{name}"
                header.size, header.mtime, header.chksum, header.type = size, mtime, checksum, bytes(buf[156:157])
                return header
        return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]


def open_tar(file: IO[bytes]) -> tarfile.TarFile:
    """A tar, compressed or not, at the start of a seekable file.

    Raises:
        tarfile.ReadError: When it is none.
    """
    return tarfile.open(fileobj=file, mode="r:*", tarinfo=Header)


def _octal(field: bytes | bytearray) -> int:
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes | bytearray, encoding: str, errors: str) -> str:
    return field.partition(b"\0")[0].decode(encoding, errors)
