"""Labelled samples in the members of a tar: grouped by key as they pass, refused with a reason. No picture is decoded.

A sample is a run of adjacent members with one key; the key of ``a/b.jpg`` is ``a/b``, what follows is the extension,
in any case of letters. A key ends at its file name's first dot, so that ``x.seg.png`` belongs to sample ``x``, as in
the webdataset library. But what stands between that dot and the extension is part of the key where it must be:
``x.2.jpg`` with ``x.2.cls`` is sample ``x.2``, beside ``x.jpg`` and ``x.cls`` or without them. Hidden files are no
samples. Tars that were put one behind another (``cat a.tar b.tar``) are read to the last.
"""

from __future__ import annotations

import errno
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from ddoq_ray.data.picture_kinds import UNREAD, unread_words
from ddoq_ray.data.pictures import IMAGE_EXTENSIONS
from ddoq_ray.data.tar_headers import Header, open_tar
from ddoq_ray.storage.quarantine import Refusal

NOT_ADJACENT = "members of one key are not next to each other in the tar"
NOT_A_TAR = "not a tar"
DAMAGE = (NOT_A_TAR, "broken tar")  # reasons that say nothing of how many samples were lost
AT_ONCE = 16  # dotted parts of one name that are held while more of them may come


OnBad = Callable[[Refusal], None]
OnMember = Callable[[tarfile.TarInfo], None]
Needed = Callable[[str, int], bool]  # whether the content of a member is wanted: by its extension and its size


def all_content(extension: str, size: int) -> bool:
    """The `Needed` of a reader that decodes."""
    return extension == "cls" or extension in IMAGE_EXTENSIONS


@dataclass
class _Group:
    """Adjacent members of one key.

    Attributes:
        members: extension -> content; None for one that nobody needs.
        duplicate: An extension that came twice.
        broken: Why a member could not be read.
        cut: Whether the tar breaks right after it.
    """

    key: str
    offset: int
    members: dict[str, bytes | None] = field(default_factory=dict)
    duplicate: str | None = None
    broken: str | None = None
    cut: bool = False

    @property
    def images(self) -> list[str]:
        return [e for e in IMAGE_EXTENSIONS if e in self.members]

    @property
    def whole(self) -> bool:
        return "cls" in self.members and bool(self.images)


# What a damaged tar, or the decompression around it, raises. An OSError with a number is the disk's: it must surface.
_BROKEN = (tarfile.ReadError, EOFError, zlib.error, lzma.LZMAError, OSError)


def _why_broken(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error
    return str(error)


def _split(name: str) -> tuple[str, str, str] | None:
    """(key up to the first dot, what stands between it and the extension, extension); None without an extension."""
    folder, slash, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    if not key or not dot:
        return None
    stem, _, extension = rest.rpartition(".")
    return folder + slash + key, stem, extension.lower()


def _samples_of(parts: dict[str, _Group]) -> list[_Group]:
    """The samples among adjacent members whose names agree up to the first dot; `parts` by what follows that dot."""
    bare = parts.get("")
    if bare is None or not ("cls" in bare.members or bare.images):
        return list(parts.values())
    own = []
    for stem, part in parts.items():
        if stem and part.whole:  # x.2.jpg with x.2.cls, beside x.jpg and x.cls
            own.append(part)
        elif stem:  # x.seg.png, beside x.jpg and x.cls
            bare.members |= {f"{stem}.{extension}": None for extension in part.members}
            bare.offset = min(bare.offset, part.offset)
    return sorted([bare, *own], key=lambda group: group.offset)


class _Parts:
    """The members of the name up to the first dot that is being read, by what stands between that dot and the rest."""

    def __init__(self) -> None:
        self.prefix = ""
        self.parts: dict[str, _Group] = {}

    def add(self, name: str, stem: str, offset: int) -> tuple[_Group, list[_Group]]:
        """The group of a member, and the groups that are complete now that it comes."""
        complete: list[_Group] = []
        if name != self.prefix:
            complete = self.close()
            self.prefix = name
        elif stem not in self.parts:
            complete = self._let_go()
        if stem not in self.parts:
            self.parts[stem] = _Group(f"{name}.{stem}" if stem else name, offset)
        return self.parts[stem], complete

    def close(self) -> list[_Group]:
        complete, self.parts = _samples_of(self.parts), {}
        return complete

    def _let_go(self) -> list[_Group]:
        """What need not be held when a new dotted part begins: all images of a shard may share one name before the dot.

        Two labels after different stems, none before: the dots belong to the keys.
        """
        if "" not in self.parts and sum("cls" in p.members for p in self.parts.values()) > 1:
            return self.close()
        if len(self.parts) < AT_ONCE:
            return []
        whole = [stem for stem, part in self.parts.items() if stem and part.whole]
        return [self.parts.pop(stem) for stem in whole] if whole else self.close()


def members_of(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """(tar, member) of all tars that lie one behind another in the file.

    Raises:
        tarfile.ReadError: Where bytes follow that are no member and not the zeros that end a tar; its `at` says where.
    """
    while True:
        for info in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # else the table of a long shard stays in memory
            yield tar, info
        # tarfile takes any block that is no header for the end; only zeros, or the end of the file, are one.
        file: Any = tar.fileobj
        assert file is not None
        at = tar.offset
        file.seek(at)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            return
        if block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE:
            raise _Damaged("no member header there", at)
        behind = _past_zeros(file, at + tarfile.BLOCKSIZE)
        if behind is None:
            return
        file.seek(behind)
        try:
            tar = tarfile.TarFile(fileobj=file, mode="r", tarinfo=Header)  # type: ignore[arg-type]
        except tarfile.ReadError as error:
            raise _Damaged("bytes that are no member follow the end marker", behind) from error


class _Damaged(tarfile.ReadError):
    def __init__(self, why: str, at: int) -> None:
        super().__init__(why)
        self.at = at


def _past_zeros(file: IO[bytes], at: int) -> int | None:
    """Where the first block that is not all zeros begins, from `at` on; None when there is none."""
    while data := file.read(1 << 16):
        if data.strip(b"\0"):
            first = len(data) - len(data.lstrip(b"\0"))
            return at + first - first % tarfile.BLOCKSIZE
        at += len(data)
    return None


def _groups(tar: tarfile.TarFile, on_bad: OnBad, needed: Needed, on_member: OnMember) -> Iterator[_Group]:
    """Runs of adjacent members, with the content of those that are `needed`.

    It is read as it passes: going back costs a request to the store, or the decompression of all that lies before.
    """
    position = 0
    parts = _Parts()
    try:
        for part, info in members_of(tar):
            position = info.offset
            name = info.name.rpartition("/")[2]
            if info.isdir() or name.startswith("."):
                continue
            on_member(info)
            split = _split(info.name)
            if split is None:
                on_bad(Refusal(info.name, "member without an extension", offset=info.offset))
                continue
            if not info.isreg():
                on_bad(Refusal(info.name, "member is a link or device, not a file", offset=info.offset))
                continue
            key, stem, extension = split
            group, complete = parts.add(key, stem, info.offset)
            yield from complete
            if extension in group.members:
                group.duplicate = extension
            try:
                wanted = needed(extension, info.size)
                group.members[extension] = _read(part, info) if wanted else None
            except tarfile.ReadError as error:
                group.members[extension], group.broken = None, str(error)
    except _BROKEN as error:
        why = _why_broken(error)
        position = getattr(error, "at", position)
        for group in parts.close():
            group.cut = True
            yield group
        on_bad(Refusal("", f"broken tar: from byte {position} on nothing can be read: {why}", offset=position))
        return
    yield from parts.close()


def labelled(
    tar: tarfile.TarFile, on_bad: OnBad, needed: Needed = all_content, on_member: OnMember = lambda info: None
) -> Iterator[tuple[_Group, int]]:
    """Samples that have one label and one picture; whether the label is a class's is not looked at.

    A key that comes again is refused there. What a key lacks may still come, so that its refusal waits for the end.
    """
    came: dict[str, bool] = {}  # key -> whether it came with a picture and a label
    again: set[str] = set()
    lacking: list[_Group] = []
    for group in _groups(tar, on_bad, needed, on_member):
        if group.key in came:
            again.add(group.key)
            twice = group.whole and came[group.key]
            reason = "a sample with this key came before in the shard" if twice else NOT_ADJACENT
            on_bad(Refusal(group.key, reason, offset=group.offset))
            continue
        came[group.key] = group.whole
        if not group.whole and not group.cut and group.duplicate is None:
            group.members = dict.fromkeys(group.members)  # their content could fill the memory
            lacking.append(group)
            continue
        label = _label(group)
        if isinstance(label, str):
            on_bad(Refusal(group.key, label, offset=group.offset))
        else:
            yield group, label
    for group in lacking:
        names = ", ".join(sorted(group.members))
        unread = [UNREAD[e] for e in sorted(group.members) if e in UNREAD]
        lack = unread_words(unread[0]) if unread else f"no image among its members: {names}"
        if "cls" not in group.members:
            lack = f"no label (.cls): labels are read from .cls, and its members are {names}"
        on_bad(Refusal(group.key, NOT_ADJACENT if group.key in again else lack, offset=group.offset))


def _label(group: _Group) -> int | str:
    """The label of a group, or the reason why it is refused."""
    if group.broken is not None:
        return f"broken tar: {group.broken}"
    if group.duplicate is not None:
        return f"two members named .{group.duplicate}"
    if not group.whole:
        return "broken tar: it ends before the sample's last member"
    if len(group.images) > 1:
        return f"more than one picture: {', '.join(group.images)}"
    label = group.members["cls"]
    assert label is not None
    text = label.decode("utf-8-sig", "replace").strip()
    number = re.fullmatch(r"([+-]?[0-9]{1,18})(\.0*)?", text)
    if number is None:
        return f"label is not a number: {text[:40]!r}" if text else "no label: the .cls is empty"
    value = int(number[1])
    return "no label: the .cls says -1" if value == -1 else value


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    try:
        member = tar.extractfile(info)
        assert member is not None
        data = member.read()
    except _BROKEN as error:
        raise tarfile.ReadError(f"{info.name}: {_why_broken(error)}") from error
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name}: {len(data)} of {info.size} bytes")
    return data


def open_samples(file: IO[bytes], on_bad: OnBad) -> tarfile.TarFile | None:
    """The tar in a file; None, told to `on_bad`, when it is none: its own words are those of four compressions."""
    try:
        return open_tar(file)
    except _BROKEN as error:
        _why_broken(error)
        on_bad(Refusal("", f"{NOT_A_TAR}: {_looks_like(file)}", offset=0))
        return None


def _looks_like(file: IO[bytes]) -> str:
    """What a file that is no tar is, as far as its first bytes tell."""
    file.seek(0)
    head = file.read(200)
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the file itself; fetch it with git lfs pull"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a page of a web server, as a failed download leaves"
    if head.startswith(b"PK"):
        return "a zip archive"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "compressed by zstd, which is not read; decompress it (unzstd)"
    return "its first bytes are no member"
