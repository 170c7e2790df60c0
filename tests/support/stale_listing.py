"""A shared disk whose listings are seconds old, as those of NFS are on a machine that has listed a folder before."""

from __future__ import annotations

import pytest

from ddoq_ray.storage.folder import Folder


def stale_listings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process a pattern's files are those that its first listing saw; a file is found by its name at once."""
    kept: dict[str, list[str]] = {}
    names = Folder.names

    def stale(folder: Folder, pattern: str) -> list[str]:
        return kept.setdefault(folder.path(pattern), names(folder, pattern))

    monkeypatch.setattr(Folder, "names", stale)
