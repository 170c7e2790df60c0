"""The lines of a quarantine file, to the byte: others read them."""

from __future__ import annotations

from pathlib import Path

from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.quarantine import Refusal, publish_refusals, read_refusals, refusal_lines, refused_kinds

SAMPLES = [
    Refusal("s1", "no label (.cls)", offset=512),
    Refusal("", "broken tar: from byte 9 on nothing can be read: cut", 40, 9),
    Refusal("späť\udcff", "latents are not finite"),
]


def test_lines_to_the_byte() -> None:
    assert refusal_lines(SAMPLES, "key") == (
        b'{"key": "s1", "offset": 512, "reason": "no label (.cls)"}\n'
        b'{"key": "", "offset": 9, "reason": "broken tar: from byte 9 on nothing can be read: cut", "samples": 40}\n'
        b'{"key": "sp\\u00e4\\u0165\\udcff", "offset": null, "reason": "latents are not finite"}\n'
    )
    assert refusal_lines(SAMPLES[1:], "name") == (
        b'{"name": "", "reason": "broken tar: from byte 9 on nothing can be read: cut", "samples": 40}\n'
        + '{"name": "späť'.encode() + b'\xff", "reason": "latents are not finite"}\n'
    )  # fmt: skip
    assert refusal_lines(SAMPLES[:1], "shard") == b'{"shard": "s1", "reason": "no label (.cls)", "samples": 1}\n'


def test_read_back_and_counted(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    publish_refusals(folder, "shard-000000.jsonl", SAMPLES[:2], "key")
    publish_refusals(folder, "shard-000001.jsonl", SAMPLES[2:], "key")
    publish_refusals(folder, "shard-000002.jsonl", [], "key")
    assert folder.names("*") == ["shard-000000.jsonl", "shard-000001.jsonl"]
    found = list(read_refusals(folder, "shard-*.jsonl"))
    assert [r for _, r in found] == SAMPLES and found[2][0] == "shard-000001.jsonl"
    kinds = refused_kinds(r for _, r in found)
    assert kinds == {"no label (.cls)": 1, "broken tar": 40, "latents are not finite": 1}
