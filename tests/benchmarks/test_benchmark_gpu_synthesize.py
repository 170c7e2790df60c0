from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_synthesize


def run(monkeypatch: pytest.MonkeyPatch, target: Path, *words: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["gpu_synthesize", *words, "--json", str(target)])
    gpu_synthesize.main()
    return json.loads(target.read_text())


def test_every_row_is_measured_with_small_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("--tiny", "--seconds", "0", "--matrix", "32", "--form", "eager", "channels_last", "--dtype", "bfloat16")
    rows = run(monkeypatch, tmp_path / "out.json", *words)
    for model in gpu_synthesize.models(tiny=True):
        own = [row for row in rows if row["model"] == model.name]
        assert [row["form"] for row in own[:5]] == ["d4m-loop", "eager", "eager", "channels_last", "channels_last"]
        assert [row["scheduler"] for row in own[5:]] == list(gpu_synthesize.SCHEDULES)
        calls = {row["scheduler"]: row["calls"] for row in own}
        assert (calls["ddim"], calls["pndm"], calls["dpm++2m"], calls["dpm++2m, 20 steps"]) == (
            7,
            8,
            7,
            2,
        )  # a fifth of the steps of the whole
    assert all(row["images_per_s"] > 0 and row["of_peak"] > 0 and row["ratio_to_d4m"] > 0 for row in rows)
    assert {"hardware", "commit", "command", "gpu", "tiny"} <= set(rows[0])


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_synthesize.torch.cuda, "is_available", lambda: False)
    rows = run(monkeypatch, tmp_path / "out.json", "--model", "dit-xl-2-256")
    assert len(rows) == 7 and {row["images_per_s"] for row in rows} == {"not measured"}


def test_the_networks_are_the_published_ones() -> None:
    """Operations of a call and of a decoding, as counted elsewhere for SD 1.5 at 512 px and DiT-XL/2 at 256 px."""
    sd, dit = gpu_synthesize.models(tiny=False)
    assert [round(n / 1e12, 3) for n in sd.operations] == [0.803, 2.515]
    assert [round(n / 1e12, 3) for n in dit.operations] == [0.237, 0.622]
    assert (sd.size, dit.size) == (512, 256)
    with torch.device("meta"):
        parameters = [sum(p.numel() for p in model.denoiser().parameters()) for model in (sd, dit)]
    assert [round(n / 1e6) for n in parameters] == [
        860,
        750,
    ]  # diffusers' DiT holds the table of labels in each of 28 blocks; published: 675
