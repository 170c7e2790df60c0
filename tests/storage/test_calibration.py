"""Measured rates: kept by device and settings, found for the same settings only."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddoq_ray.commands import calibrate
from ddoq_ray.commands.plan import Plan, _gpu_memory
from ddoq_ray.config.compose import load_config
from ddoq_ray.models.rates import measured
from ddoq_ray.storage.calibration import BATCHES, Rate, add_rates, asked_of, default_file, rates_for, read_rates


def rates(device: str, per_second: float, *keys: str) -> list[Rate]:
    asked = asked_of(load_config(keys))
    return [
        {
            "what": what,
            "device": device,
            "gpu": True,
            "per_second": per_second,
            "peak_bytes": 5 * 10**9,
            "memory_bytes": 16 * 10**9,
            "asked": asked[what],
        }
        for what in asked
    ]


def test_rates_are_found_for_the_settings_that_they_depend_on(tmp_path: Path) -> None:
    file = str(tmp_path / "new" / "calibration.json")
    assert read_rates(file) == []
    for device, per_second in (("A", 5.0), ("B", 7.0), ("A", 6.0)):  # measured again: the last counts
        add_rates(file, rates(device, per_second))
    add_rates(file, rates("A", 9.0, "synthesizer.batch=7"))
    kept = read_rates(file)
    shared = {"encode": 9.0, "label": 9.0, "train": 9.0}  # which do not depend on the synthesizer's batch

    def found(*keys: str, gpu: bool = True) -> dict[str, dict[str, float]]:
        of = rates_for(kept, asked_of(load_config(keys)), gpu=gpu)
        return {device: {what: rate["per_second"] for what, rate in rates.items()} for device, rates in of.items()}

    assert found() == {"A": shared | {"decode": 6.0, "denoise": 6.0}, "B": dict.fromkeys(found()["A"], 7.0)}
    assert found("ipc=3", "encoder.workers=4", "seed=9") == found(), "rates do not depend on these"
    assert found("synthesizer.batch=7")["A"] == shared | {"decode": 9.0, "denoise": 9.0}
    assert "label" not in found("teacher.batch=3")["A"] and found(gpu=False) == {}
    Path(file).write_text("[1]")
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration file"):
        read_rates(file)


def test_a_place_that_is_none_for_a_file_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    for place, words in ((tmp_path, "cannot be read"), (tmp_path / "flat" / "x.json", "cannot be")):
        (tmp_path / "flat").touch()
        with pytest.raises(ValueError, match=f"cluster.calibration=.*{words}.*give cluster.calibration=FILE"):
            calibrate.main(load_config([f"cluster.calibration={place}"]))
    add_rates(str(tmp_path / "tried.json"), [])
    assert [p.name for p in tmp_path.iterdir()] == ["flat"]


def test_a_user_without_a_home_has_a_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict[int, str]().__getitem__)  # as of a user that no list knows
    assert Path(default_file()).is_absolute()


def test_each_rate_of_the_shipped_networks_is_measured() -> None:
    config = load_config(["synthesizer.batch=4", "teacher.batch=4", "protocol.batch=4", "encoder.batch=4"])
    found = list(measured(config, "cpu", 0.01))
    assert [what for what, _, _ in found] == list(BATCHES) and set(BATCHES) == asked_of(config).keys()
    assert all(rate > 0 and peak == 0 for _, rate, peak in found)
    plain = measured(load_config(["synthesizer.strength=0", "synthesizer.batch=4"]), "cpu", 0.01)
    assert "denoise" not in [what for what, _, _ in plain]


def test_a_plan_says_which_batch_a_gpu_is_too_small_for(tmp_path: Path) -> None:
    """5 GB on a GPU of 16: a whole one holds them, a quarter does not, nor does another kind of 5.5 GB."""
    file = str(tmp_path / "calibration.json")
    add_rates(file, rates("A", 5.0, "cluster=gpu"))

    def problems(*keys: str) -> list[str]:
        config = load_config(["cluster=gpu", f"cluster.calibration={file}", *keys])
        made = Plan()
        _gpu_memory(made, config, rates_for(read_rates(file), asked_of(config), gpu=True))
        assert len(made.lines) == 5
        return made.problems

    assert problems() == []
    (told,) = problems("cluster.teacher.num_gpus=0.25")
    assert told.startswith("label takes 5 GB of a GPU's memory (measured on A)") and "smaller teacher.batch" in told
    assert "cluster.teacher.num_gpus=0.25" in told
    assert len(problems("cluster.gpu_gb=5.5")) == 5
