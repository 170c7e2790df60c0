"""Tars whose bytes depend on names and contents only: no times, owners or modes of this machine."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import IO


def tar_to(file: IO[bytes]) -> tarfile.TarFile:
    """A tar that is written to a file member by member (`add_member`); it ends when its `with` block does."""
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))


def write_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content), in memory."""
    out = io.BytesIO()
    with tar_to(out) as tar:
        for name, data in members:
            add_member(tar, name, data)
    return out.getvalue()
