from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import label_rates, train, train_memory


def test_every_row_is_measured_with_small_students(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["train", "--tiny", "--turns", "1", "--cpu", "--json", str(target)])
    threads = torch.get_num_threads()
    train.main()
    torch.set_num_threads(threads)
    rows = json.loads(target.read_text())
    assert [(r["student"], r["precision"], r["kept"]) for r in rows] == [
        ("convnet3-w8", "float32", "device"), ("convnet3-w8", "bfloat16", "file")
    ]  # fmt: skip
    for row in rows:
        assert row["ratio_to_resident"] == pytest.approx(row["steps_per_s"] / row["resident_steps_per_s"])
        assert row["steps_a_turn"] == 2 and {"hardware", "commit", "command"} <= set(row)


def test_rates_beside_the_teachers_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target, threads = tmp_path / "out.json", torch.get_num_threads()
    words = ["label_rates", "--tiny", "--no-pool", "--cpu", "--seconds", "0.01", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", words)
    label_rates.main()
    torch.set_num_threads(threads)
    rows = json.loads(target.read_text())
    assert [r["how"] for r in rows if r["what"] == "views"] == list(label_rates.WAYS)
    assert [r["what"] for r in rows if r["how"] == "features"] == ["encode", "decode"]
    teacher = next(r["per_s"] for r in rows if r["what"] == "teacher")
    assert all(
        r["of_teacher"] == pytest.approx(r["per_s"] / teacher) for r in rows if r["what"] in ("views", "student")
    )


def test_both_loops_take_steps_of_the_same_student() -> None:
    case = train.TINY[0]
    device = torch.device("cpu")
    made = train.training_of(case, train.keep(case, "", device), device)
    before = [p.detach().clone() for p in made.model.parameters()]
    train.resident_steps(made, case, device)(2)
    assert any(not torch.equal(p, b) for p, b in zip(made.model.parameters(), before, strict=True))
    steps = {group["lr"] for group in made.optimizer.param_groups}
    assert steps == {1e-3} and len(made.optimizer.state) == len(before)


def test_images_in_a_file_are_decoded_and_learnt(tmp_path: Path) -> None:
    real = train_memory.write_shards(tmp_path / "shards", 1100, 16)
    assert real.samples == (1000, 100)
    row = train_memory.train(str(tmp_path), real, 16)
    assert 0 < row["start_bytes"] <= row["peak_bytes"] and [p.name for p in tmp_path.iterdir()] == ["shards"]
