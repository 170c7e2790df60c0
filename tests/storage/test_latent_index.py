"""Whole classes of a log, label units, counts and lists of shards: read and gone through once, counted at n and 2n."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.latent_logs import DIM, write_log

from ddoq_ray.config.compose import load_config
from ddoq_ray.core.pooling import Pooling
from ddoq_ray.data.picked_samples import PassedOver
from ddoq_ray.data.shard_index import train_and_val
from ddoq_ray.execution.class_tasks import readings
from ddoq_ray.stages.quantize.memory import Census, log_readings
from ddoq_ray.stages.quantize.step import _say_readings
from ddoq_ray.stages.quantize.worker import shards_of
from ddoq_ray.stages.select import images as select
from ddoq_ray.storage import class_latents as whole
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_index import LEAST_PASSES, LatentIndex, latent_index
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassCounts, LabelsOutside, ShardInfo, read_shards, shard_lines, total_counts

MANY = [1 << 40]  # memory of a node where it is no limit


class Counted(Folder):
    """A folder that counts what is read from it."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.read_files: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.read_files[name.rpartition("/")[2].partition("-")[0].partition(".")[0]] += 1
        return super().read(name)


def sorted_log(classes: int) -> list[list[list[int]]]:
    """A shard for each two classes, each with six latents."""
    return [[[c, c + 1] * 3, [c, c + 1] * 3] for c in range(0, classes, 2)]


def mixed_log(classes: int) -> list[list[list[int]]]:
    """As many latents, and every class in every shard."""
    return [[list(range(classes))] for _ in range(6)]


def looked_at(tmp_path: Path, classes: int, log: list[list[list[int]]], most: int) -> Counter[str]:
    """What is read when every class is looked at, in parts of four classes, with memory for `most` bytes of latents."""
    write_log(tmp_path, classes, log)
    latents = Counted(str(tmp_path / "latents"))
    Artifact(latents, "encode").finish({"log": classes})
    latents.read_files.clear()
    parts = [list(range(c, min(c + 4, classes))) for c in range(0, classes, 4)]
    index = latent_index(latents, len(log))
    assert latents.read_files.pop("done") == len(log)
    assert latent_index(latents, len(log)) is index and "done" not in latents.read_files
    seen = []
    for reading in readings(index, parts, DIM, nodes=[4 * most]):
        wanted = [c for part in reading.parts for c in parts[part]]
        seen += [c for c, _ in whole.class_latents(latents, reading.shards, wanted)]
    assert seen == list(range(classes))
    return latents.read_files


def test_a_sorted_log_is_read_once_whatever_its_parts(tmp_path: Path) -> None:
    for classes in (16, 32):
        read = looked_at(tmp_path / str(classes), classes, sorted_log(classes), most=1 << 40)
        assert (read["chunk"], read["done"]) == (classes, classes // 2)  # two files a shard, each part its own shards


def test_a_mixed_log_is_read_so_often_as_memory_demands_and_not_once_a_part(tmp_path: Path) -> None:
    for classes in (128, 256):
        everything = 2 * DIM * 6 * classes
        read = looked_at(tmp_path / str(classes), classes, mixed_log(classes), most=everything)
        assert read["chunk"] == 6 * LEAST_PASSES  # not 6 x 32 and 6 x 64
    read = looked_at(tmp_path / "little", 256, mixed_log(256), most=everything // 32)
    assert read["chunk"] == 6 * 32


def test_readings_hold_each_part_once_and_ask_for_what_they_hold() -> None:
    rng = np.random.default_rng(0)
    held = [ClassCounts(Counter(rng.integers(0, 90, 40).tolist())) for _ in range(30)]
    index = LatentIndex.of(held)
    parts = [list(range(c, min(c + 7, 100))) for c in range(0, 100, 7)]  # the last classes have no latents
    for memory in (1e5, 1e6, 1e12):
        made = readings(index, parts, 100, nodes=[memory, 2 * memory])
        assert [p for r in made for p in r.parts] == list(range(len(parts)))
        for r in made:
            mine = {c for p in r.parts for c in parts[p]}
            assert r.shards.tolist() == [s for s, each in enumerate(held) if mine & set(each)]
            latents = sum(n for each in held for c, n in each.items() if c in mine)
            assert len(r.parts) == 1 or 200 * latents <= memory / 4
            assert 0 < r.options["memory"] <= memory
    assert readings(index, parts, 100, nodes=[0.0])[0].options == {}


def test_the_index_is_what_the_shards_hold() -> None:
    rng = np.random.default_rng(1)
    held = [ClassCounts(Counter(rng.integers(0, 50, n).tolist())) for n in (0, 30, 1, 200)]
    index = LatentIndex.of(held)
    for c in range(60):
        expected = [(s, each[c]) for s, each in enumerate(held) if c in each]
        assert list(zip(*(a.tolist() for a in index.pairs(c)), strict=True)) == expected
    assert dict(enumerate(index.counts.tolist())) == {
        c: sum(e.get(c, 0) for e in held) for c in range(len(index.counts))
    }
    assert dict(total_counts(held)) == {c: n for c, n in enumerate(index.counts.tolist()) if n}
    assert len(LatentIndex.of([]).counts) == 0 and LatentIndex.of([]).holding([0, 5]).tolist() == []


def test_picked_images_are_found_where_a_walk_through_the_log_finds_them() -> None:
    rng = np.random.default_rng(2)
    held = [ClassCounts(Counter(rng.integers(0, 9, 40).tolist())) for _ in range(12)]
    index = LatentIndex.of(held)
    picks = {c: rng.permutation(n)[: min(n, 5)] for c, n in enumerate(index.counts.tolist())}
    walked: dict[int, set[tuple[int, int, int]]] = {}
    before: Counter[int] = Counter()
    for shard, each in enumerate(held):
        for c, n in each.items():
            for rank, position in enumerate(picks[c].tolist()):
                if before[c] <= position < before[c] + n:
                    walked.setdefault(shard, set()).add((c, position - before[c], rank))
            before[c] += n
    assert {shard: set(rows) for shard, rows in select.where(index, picks).items()} == walked


def test_pictures_that_were_not_encoded_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Folder(str(tmp_path))
    for shard in range(9):
        for chunk in (0, 3):
            line = f'{{"key": "s{shard}c{chunk}", "offset": null, "reason": "non-finite"}}\n'.encode()
            run.publish(f"quarantine/shard-{shard:06d}.latents-{chunk:05d}.jsonl", line)
    run.publish("quarantine/shard-000001.jsonl", b'{"key": "torn", "offset": 512, "reason": "not an image"}\n')
    run.publish("quarantine/shard-000012.jsonl", b'{"key": "", "offset": 1024, "reason": "broken tar"}\n')
    listed = []
    names = Folder.names
    monkeypatch.setattr(Folder, "names", lambda self, pattern: listed.append(pattern) or names(self, pattern))
    found = select.not_encoded(run / "latents")
    lost = {s: PassedOver(keys=frozenset((f"s{s}c0", f"s{s}c3"))) for s in range(9)}
    lost[1] = PassedOver(frozenset([512]), lost[1].keys)  # refused by its content, which its offset tells
    assert found == lost | {12: PassedOver(frozenset([1024]))} and len(listed) == 1


def test_readings_of_an_exact_algorithm_are_told_where_classes_are_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dim = (512 << 20) // (2 * 6 * 4)  # four classes of six latents are all that one reading collects
    for name, log, times in (("sorted", sorted_log(32), 1.0), ("mixed", mixed_log(32), 8.0)):
        write_log(tmp_path / name, 32, log)
        data = Data.load(Folder(str(tmp_path / name)))
        for actors in (1, 2):
            parts = [{p: list(range(4 * p, 4 * p + 4)) for p in range(i, 8, actors)} for i in range(actors)]
            assert log_readings(Census(data), Pooling((dim,)), parts) == times
    algorithm = load_config(["quantizer=gram"]).quantizer
    _say_readings(algorithm, 1.5)
    assert capsys.readouterr().err == ""
    _say_readings(algorithm, 227.2)
    assert "gram" in (said := capsys.readouterr().err) and "about 227 times" in said and "dataset.resort=true" in said


class Asked(ClassCounts):
    """Counts that know how often one class was searched for."""

    searched = 0

    def __getitem__(self, class_id: int) -> int:
        Asked.searched += 1
        return super().__getitem__(class_id)


def test_counts_are_gone_through_without_a_search() -> None:
    counts = Asked({c: c + 1 for c in range(100)})
    assert list(counts.items()) == [(c, c + 1) for c in range(100)] and list(counts.values()) == list(range(1, 101))
    assert (3, 4) in counts.items() and len(counts.items()) == len(counts.values()) == 100
    assert Asked.searched <= 1 and total_counts([counts, counts])[99] == 200


def shard_files(folder: Path, names: Sequence[str]) -> str:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return str(folder)


def test_shard_lists_are_told_apart_in_one_look_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddoq_ray.data import shard_index

    asked: list[str] = []
    real = shard_index.resolved
    monkeypatch.setattr(shard_index, "resolved", lambda shard: asked.append(shard) or real(shard))
    counts = []
    for n in (20, 40):
        train = [f"train-{i:04d}.tar" for i in range(n)]
        both = shard_files(tmp_path / f"both-{n}", train + [f"test-{i:04d}.tar" for i in range(n)])
        val = shard_files(tmp_path / f"val-{n}", [f"val-{i:04d}.tar" for i in range(n)])
        asked.clear()
        told: list[str] = []
        assert [len(shards) for shards in train_and_val(both, val, told)] == [n, n] and f"{n} shards" in told[0]
        counts.append(len(asked))
    assert counts[1] == 2 * counts[0]


@pytest.mark.parametrize("shards", [0, 1, 5])
def test_a_list_of_shards_is_written_row_by_row(shards: int) -> None:
    infos = [ShardInfo(f"/data/{i}.tar", i, 9, ClassCounts({i: i, 7: 1}), f"d{i}") for i in range(shards)]
    rows: list[Any] = list(shard_lines(infos))
    assert len(rows) == max(1, shards + (shards > 0))
    assert list(read_shards(b"".join(rows))) == infos


def test_counts_of_a_list_of_shards_are_read_as_json_reads_them() -> None:
    """Whatever else is in a row, and however the list is laid out."""
    whole = ShardInfo('a"images": {"1": 2}b', 3, 9, ClassCounts({}), "d", "cut", 2, LabelsOutside(1, 2, 3))
    infos = [whole, ShardInfo("b", 3, 9, ClassCounts({21840: 1 << 40, 0: 1}), "d", sha256="s")]
    written = b"".join(shard_lines(infos))
    rows = json.loads(written)
    for data in (written, json.dumps(rows).encode(), json.dumps(rows, indent=1).encode()):
        assert list(read_shards(data)) == infos
    descending = written.replace(b'"0": 1, "21840": 1099511627776', b'"21840": 1099511627776, "0": 1')
    assert descending != written and list(read_shards(descending)) == infos
    for damage in (b'"0": 1, "x": 2', b'"0": 1, "5"', b'"0": 1 "5": 2', b'"0": '):
        with pytest.raises(ValueError):
            list(read_shards(written.replace(b'"0": 1, "21840": 1099511627776', damage)))


def test_shards_of_many_classes_are_found_as_of_few() -> None:
    """Above 65,536 classes they are sorted in another way."""
    rng = np.random.default_rng(0)
    held = [np.unique(rng.integers(70, size=9)).astype(np.int32) for _ in range(40)]
    few, many = np.arange(70), np.arange(70) * 1000
    found = shards_of([mine * 1000 for mine in held], many)
    for c, shards in shards_of(held, few).items():
        assert shards.tolist() == [i for i, mine in enumerate(held) if c in mine] == found[1000 * c].tolist()
