"""Shards of labelled samples: found, read, refused with a reason, indexed, written."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.corpus import NUM_CLASSES, malformed

from ddoq_ray.data.samples import (
    Sample,
    encode_png,
    list_shards,
    load_arrays,
    read_classes,
    read_samples,
)
from ddoq_ray.data.shard_index import Pictures, index_shard, split_of, with_losses
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.quarantine import Refusal
from ddoq_ray.storage.records import LabelsOutside, ShardInfo

RED = np.broadcast_to(np.array([200, 10, 30], np.uint8), (4, 6, 3))


def png(value: int = 0) -> bytes:
    return encode_png(np.full((4, 4), value, np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def read(data: bytes, tmp_path: Path, classes: int = 3) -> tuple[list[Sample], list[Refusal]]:
    shard = tmp_path / "x.tar"
    shard.write_bytes(data)
    bad: list[Refusal] = []
    return list(read_samples(str(shard), classes, bad.append)), bad


# Finding shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("b-01.tar", "b-00.tar", "a-00.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a-00.tar", "b-00.tar", "b-01.tar"]),
        ("/b-*.tar", ["b-00.tar", "b-01.tar"]),
        ("/?-00.tar", ["a-00.tar", "b-00.tar"]),
        ("/b-{00..01}.tar", ["b-00.tar", "b-01.tar"]),
        ("/{a,b}-00.tar", ["a-00.tar", "b-00.tar"]),
        ("/b-01.tar", ["b-01.tar"]),
        ("/{a-*,b-01}.tar", ["a-00.tar", "b-01.tar"]),
    ],
)
def test_list_shards(shards: Path, pattern: str, names: list[str]) -> None:
    assert list_shards(f"{shards}{pattern}") == [str(shards / n) for n in names]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("/missing", ["does not exist", "folder, glob or brace pattern"]),
        ("/b-{00..02}.tar", ["b-02.tar", "does not exist"]),
        ("/c-*.tar", ["no shard matches"]),
        ("/empty", ["holds no *.tar"]),
    ],
)
def test_list_shards_says_what_is_wrong(shards: Path, pattern: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        list_shards(f"{shards}{pattern}", key="dataset.val_path")
    assert all(w in str(error.value) for w in ["dataset.val_path=", *words]), str(error.value)


def test_shards_on_another_file_system() -> None:
    fs = fsspec.filesystem("memory")
    tar = write_tar([("k.png", png()), ("k.cls", b"1")])
    for i in range(2):
        fs.pipe_file(f"/corpus/s-{i}.tar", tar)
    for pattern in ("memory://corpus", "memory://corpus/*.tar", "memory://corpus/s-{0..1}.tar"):
        found = list_shards(pattern)
        assert [f.split("/")[-1] for f in found] == ["s-0.tar", "s-1.tar"]
        assert [s.key for f in found for s in read_samples(f, 2, lambda bad: None)] == ["k", "k"]
        assert index_shard(found[0], 2).images == {1: 1}


# Class lists


def test_read_classes_of_names_and_objects(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(["cat", {"name": "n02", "prompt": "a dog", "teacher_index": 7, "prior_label": 9}]))
    cat, dog = read_classes(str(path))
    assert (cat.class_id, cat.name, cat.prompt, cat.teacher_index, cat.prior_label) == (0, "cat", "cat", None, None)
    assert (dog.class_id, dog.name, dog.prompt, dog.teacher_index, dog.prior_label) == (1, "n02", "a dog", 7, 9)
    path.write_text(json.dumps([c.to_json() for c in (cat, dog)]))
    assert read_classes(str(path)) == [cat, dog]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[", ["not JSON"]),
        (b"\xff\xfe", ["not JSON"]),
        (b"{}", ["non-empty JSON list", "dict"]),
        (b"[]", ["non-empty JSON list", "empty"]),
        (b"[3]", ["class 0 is 3", "a name"]),
        (b'[{"prompt": "x"}]', ["class 0", "a name"]),
        (b'[{"name": "a", "teacher": 3}]', ["class 0", "['teacher']", "teacher_index"]),
        (b'[{"name": "a", "class_id": 1}]', ["class_id 0 to 0", "got 1"]),
        (b'[{"name": "a", "class_id": "0"}]', ["class 0", "class_id='0'", "whole number"]),
        (b'["a", {"name": "b", "prior_label": 1.5}]', ["class 1", "prior_label=1.5", "whole number"]),
        (b'[{"name": "a", "teacher_index": true}]', ["teacher_index=True", "whole number"]),
    ],
)
def test_read_classes_says_what_is_wrong(tmp_path: Path, text: bytes, words: list[str]) -> None:
    path = tmp_path / "classes.json"
    path.write_bytes(text)
    with pytest.raises(ValueError) as error:
        read_classes(str(path))
    assert type(error.value) is ValueError
    assert all(w in str(error.value) for w in [str(path), *words]), str(error.value)


def test_read_classes_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no class list at .*classes.json: expected .*set dataset.classes"):
        read_classes(str(tmp_path / "classes.json"))
    with pytest.raises(ValueError, match="cannot read the class list"):
        read_classes(str(tmp_path))


# Reading samples


def test_every_bad_kind_is_refused_by_name_and_the_good_ones_stay(tmp_path: Path) -> None:
    members = [
        ("good0.png", png(1)), ("good0.cls", b"0\n"),
        ("nolabel.png", png()),
        ("notnumber.png", png()), ("notnumber.cls", b"cat"),
        ("outside.png", png()), ("outside.cls", b"3"),
        ("negative.png", png()), ("negative.cls", b"-1"),
        ("noimage.txt", b"words"), ("noimage.cls", b"1"),
        ("garbage.png", b"not a png"), ("garbage.cls", b"1"),
        ("cut.png", png()[:-30]), ("cut.cls", b"1"),
        ("twice.png", png()), ("twice.cls", b"1"), ("twice.PNG", png()),
        ("empty.png", b""), ("empty.cls", b"1"),
        ("README", b"no extension"),
        ("dir/good1.cls", b"2"), ("dir/good1.png", png(2)), ("dir/good1.json", b"{}"),
        ("good2.jpeg", saved(Image.fromarray(RED), "JPEG")), ("good2.cls", b" 1 "),
    ]  # fmt: skip
    data = write_tar(members)
    good, bad = read(data, tmp_path)
    assert [(s.key, s.class_id) for s in good] == [("good0", 0), ("dir/good1", 2), ("good2", 1)]
    assert np.asarray(good[1].image).tolist() == np.full((4, 4, 3), 2).tolist()

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = {info.name: info.offset for info in tar}
    expected = {
        "nolabel": ("nolabel.png", "no label"), "notnumber": ("notnumber.png", "label is not a number: 'cat'"),
        "outside": ("outside.png", "label is outside the class list (0 to 2): 3"),
        "negative": ("negative.png", "no label: the .cls says -1"),
        "noimage": ("noimage.txt", "no image among its members"),
        "garbage": ("garbage.png", "undecodable image"), "cut": ("cut.png", "undecodable image"),
        "twice": ("twice.png", "two members named .png"), "empty": ("empty.png", "undecodable image"),
        "README": ("README", "without an extension"),
    }  # fmt: skip
    assert sorted(b.name for b in bad) == sorted(expected)
    for b in bad:
        member, reason = expected[b.name]
        assert b.offset == offsets[member], b
        assert reason in b.reason, b
    for sample in good:
        assert sample.offset == offsets[next(n for n in offsets if n.startswith(sample.key))]


def sample_members(n: int) -> list[tuple[str, bytes]]:
    return [m for i in range(n) for m in ((f"s{i}.png", png(i)), (f"s{i}.cls", b"0"))]


@pytest.mark.parametrize("data", [b"", b"hello", b"x" * 2000])
def test_what_is_no_tar_is_one_bad_sample(tmp_path: Path, data: bytes) -> None:
    good, bad = read(data, tmp_path)
    assert (good, len(bad)) == ([], 1)
    assert "not a tar" in bad[0].reason and bad[0].offset == 0
    assert index_shard(str(tmp_path / "x.tar"), 1).samples == 0


@pytest.mark.parametrize("at", [100, 512, 600, 1024 + 100, 2 * 1024 + 300])
def test_a_tar_cut_short_keeps_what_is_whole_and_says_so(tmp_path: Path, at: int) -> None:
    """Members are 1,024 bytes each (a header and a block): cut in a header, at its end, in the data."""
    data = write_tar(sample_members(5))
    good, bad = read(data[: 2 * 2 * 1024 + at], tmp_path)
    assert [s.key for s in good] == [f"s{i}" for i in range(2 + at // 2048)]
    assert any("broken tar" in b.reason for b in bad)


def test_garbage_inside_a_tar_is_not_its_end(tmp_path: Path) -> None:
    data = bytearray(write_tar(sample_members(5)))
    data[4096:4608] = b"\x37" * 512  # the third sample's first header
    good, bad = read(bytes(data), tmp_path)
    assert [s.key for s in good] == ["s0", "s1"]
    assert [(b.offset, b.reason[:10]) for b in bad] == [(4096, "broken tar")]


def test_a_tar_without_end_blocks_is_whole(tmp_path: Path) -> None:
    good, bad = read(write_tar(sample_members(3))[: 3 * 2048], tmp_path)
    assert (len(good), bad) == (3, [])


# Arrays


def test_load_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(write_tar([*sample_members(3), ("bad.png", b""), ("bad.cls", b"0")]))
    bad: list[Refusal] = []
    images, class_ids, keys = load_arrays([str(tmp_path / "a.tar")] * 2, 4, 1, bad.append)
    assert images.shape == (6, 3, 4, 4) and images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2] * 2
    assert (class_ids.tolist(), keys, len(bad)) == ([0] * 6, ["s0", "s1", "s2"] * 2, 2)
    assert load_arrays([], 4, 1)[0].shape == (0, 3, 4, 4)


# Index


def test_index_counts_labelled_images_and_changes_with_the_shard(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    members = [
        ("a.png", png()), ("a.cls", b"0"), ("b.png", b"broken"), ("b.cls", b"2"), ("c.png", png()), ("d.cls", b"1")
    ]  # fmt: skip
    shard.write_bytes(write_tar(members))
    info = index_shard(str(shard), 3)
    assert (info.samples, info.images, info.bytes) == (2, {0: 1, 2: 1}, shard.stat().st_size)
    assert index_shard(str(shard), 3) == info
    for at, change in ((1, ("a.cls", b"1")), (0, ("a.png", png() + b"0" * 600)), (0, ("aa.png", png()))):
        shard.write_bytes(write_tar([*members[:at], change, *members[at + 1 :]]))
        assert index_shard(str(shard), 3).digest != info.digest


def test_the_index_counts_labels_outside_the_class_list_apart(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    wild = [
        ("k7.png", png()),
        ("k7.cls", b"10"),
        ("k8.png", png()),
        ("k8.cls", b"-5"),
        ("k9.png", png()),
        ("k9.cls", b"-1"),
    ]
    shard.write_bytes(write_tar([*sample_members(2), *wild]))
    info = index_shard(str(shard), 10)
    assert (info.samples, info.outside) == (2, LabelsOutside(2, -5, 10))
    assert ShardInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


def test_what_damage_took_is_told_by_the_whole_shards(tmp_path: Path) -> None:
    whole, page = write_tar(sample_members(12)), b"<html>429 Too Many Requests</html>"
    for name, data in {"a": whole, "b": whole, "c": whole[: len(whole) // 4], "d": page, "e": b""}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    infos = with_losses([index_shard(str(tmp_path / f"{n}.tar"), 1) for n in "abcde"])
    assert [i.samples + i.lost for i in infos] == [12] * 5 and [bool(i.damage) for i in infos] == [False] * 2 + [
        True
    ] * 3
    assert "page of a web server" in infos[3].damage and "empty file" in infos[4].damage
    assert with_losses([infos[3]])[0].lost == 1  # nothing to compare with


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress])
def test_tars_one_behind_another_are_read_to_the_last(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """cat a.tar b.tar c.tar, each with its end marker."""
    tars = [write_tar([m for i in range(3) for m in ((f"{n}{i}.png", png(i)), (f"{n}{i}.cls", b"0"))]) for n in "abc"]
    good, bad = read(pack(b"".join(tars)), tmp_path)
    assert ([s.key for s in good], bad) == ([f"{n}{i}" for n in "abc" for i in range(3)], [])
    assert len({s.offset for s in good}) == 9 and index_shard(str(tmp_path / "x.tar"), 1).samples == 9
    good, bad = read(pack(tars[0] + bytes(9 << 10) + b"\x37" * 700), tmp_path)
    assert len(good) == 3 and [b.reason.split(":")[0] for b in bad] == ["broken tar"]
    assert index_shard(str(tmp_path / "x.tar"), 1).damage


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("d/train-0000.tar", "train"), ("d/imagenet_TRAIN.0001.tar", "train"), ("d/validation-00.tar", "val"),
        ("d/val/000.tar", "val"), ("d/dev_3.tar", "val"), ("d/test/x-1.tar", "test"), ("d/trainer-1.tar", None),
        ("d/interval-1.tar", None), ("train/val-1.tar", "val"), ("d/0001.tar", None), ("d/eval-1.tar", "test"),
        ("d/trainval-1.tar", "train"), ("d/development-1.tar", "val"),
    ],
)  # fmt: skip
def test_split_words_in_names_are_noticed(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_the_same_pictures_in_both_splits_are_found(tmp_path: Path) -> None:
    val, train = tmp_path / "v.tar", tmp_path / "t.tar"
    val.write_bytes(write_tar(sample_members(4)))
    train.write_bytes(write_tar([("new.png", png(99)), ("new.cls", b"0"), ("again.png", png(2)), ("again.cls", b"0")]))
    seen = Pictures()
    plain = index_shard(str(val), 1)
    assert index_shard(str(val), 1, seen) == plain and len(seen.found) == 4
    known: dict[int, set[bytes]] = {}
    for size, digest in seen.found:
        known.setdefault(size, set()).add(digest)
    compared = Pictures(known)
    assert index_shard(str(train), 1, compared) == index_shard(str(train), 1)
    assert compared.same == ["again"]


# Writing


def test_write_tar_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    members = [("b.png", b"12"), ("b.cls", b"0"), ("a.png", b"")]
    data = write_tar(members)
    assert write_tar(members) == data
    assert write_tar(members[::-1]) != data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(i.name, i.size, i.mtime, i.uid, i.gid, i.uname, i.mode) for i in tar] == [
            (name, len(body), 0, 0, 0, "", 0o644) for name, body in members
        ]
        assert [tar.extractfile(i).read() for i in tar.getmembers()] == [b for _, b in members]  # type: ignore[union-attr]


# The corpus of malformed shards

CORPUS = malformed()


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(name: str, tmp_path: Path) -> None:
    """All good samples with their labels and pixels, all bad ones with reason and offset, and nothing else."""
    shard = CORPUS[name]
    good, bad = read(shard.tar(), tmp_path, NUM_CLASSES)
    if name == "packed-cut":  # how much is readable is the compression's affair
        assert 0 < len(good) < len(shard.good) and all(b.reason.startswith("broken tar: ") for b in bad)
    else:
        assert sorted(s.key for s in good) == sorted(shard.good)  # one that shares its name may wait for others
        found = sorted(bad, key=lambda b: (b.offset, -len(b.name)))
        assert [(b.offset, b.name) for b in found] == [(offset, key) for offset, key, _ in shard.bad]
        for b, (_, _, reason) in zip(found, shard.bad, strict=True):
            assert b.reason.startswith(reason), b
    for sample in good:
        class_id, pixels, bound = shard.good[sample.key]
        assert sample.class_id == class_id, sample.key
        got = np.asarray(sample.image)
        assert got.shape == pixels.shape and np.abs(got.astype(int) - pixels).max() <= bound, sample.key


@pytest.mark.parametrize("name", [n for n in CORPUS if n not in ("labels", "packed-cut")])
def test_the_index_counts_what_may_be_read(name: str, tmp_path: Path) -> None:
    """At least the good samples: whether a picture can be decoded is seen only later."""
    shard = CORPUS[name]
    (tmp_path / "x.tar").write_bytes(shard.tar())
    info = index_shard(str(tmp_path / "x.tar"), NUM_CLASSES)
    undecodable = [b for b in shard.bad if b[2].startswith(("undecodable", "too many pixels"))]
    counts = Counter(class_id for class_id, _, _ in shard.good.values())
    counts[1] += len(undecodable)
    if name in ("cut-picture", "cut-label-data"):
        assert info.samples >= sum(counts.values())
    else:
        assert dict(info.images) == {c: n for c, n in counts.items() if n}
