"""The sample of validation images is spread, and too lossy an autoencoder is told of with what to do."""

from __future__ import annotations

import pytest

from ddoq_ray.config.compose import load_config
from ddoq_ray.stages.evaluate.validation import Validation
from ddoq_ray.stages.label.autoencoder_check import sample_of, say_kept


def test_the_sample_is_spread_over_shards() -> None:
    many = Validation(tuple(f"{i}.tar" for i in range(100)), (500,) * 100, 1000, 0.875)
    some = sample_of(many, 512)
    assert len(some.urls) == 16 and some.urls[0] == "0.tar" and some.urls[-1] == "93.tar"
    assert set(some.samples) == {32} and some.num_classes == 1000
    few = sample_of(Validation(("a.tar", "b.tar"), (3, 500), 10, 1.0), 64)
    assert few.urls == ("a.tar", "b.tar") and few.samples == (3, 32)


def test_what_is_lost_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"images": 512, "psnr_db": 24.7, "top1_real_pct": 92.0, "top1_reconstructed_pct": 75.0}
    say_kept(load_config([]), facts)
    said = capsys.readouterr().err
    assert "75.0 % on reconstructions of 512" in said and "92.0 %" in said and "loses" not in said
    say_kept(load_config([]), facts | {"top1_reconstructed_pct": 60.0})
    said = capsys.readouterr().err
    assert all(w in said for w in ("65 % of its top-1 is left", "teacher.min_kept=0.8", "perceptual=TEACHER"))
