"""synthesize: images of one constant colour are counted and told, and refused where a set holds nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddoq_ray.stages.synthesize.constant_images import check_constant, constant_facts

NAMES = ["zero", "one", "two"]


def picture(*spots: tuple[int, int, int], colour: int = 0) -> np.ndarray:
    made = np.full((8, 8, 3), colour, np.uint8)
    for y, x, channel in spots:
        made[y, x, channel] ^= 1
    return made


def shard(*constant: tuple[int, int], images: int = 4) -> dict[str, Any]:
    return {"images": images, "constant": len(constant), "first_constant": list(constant[0]) if constant else None}


def test_a_constant_image_has_one_colour_and_one_other_value_makes_it_a_picture() -> None:
    red = picture()
    red[..., 0] = 200
    pictures = [picture(), picture((0, 0, 0)), picture((7, 7, 2)), picture(colour=255), red, picture((3, 4, 1))]
    facts = constant_facts(((5, k), made) for k, made in enumerate(pictures))
    assert facts == {"constant": 3, "first_constant": [5, 0]}
    assert constant_facts([]) == {"constant": 0, "first_constant": None}


def test_constant_images_are_told_with_the_first_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    facts = check_constant("compare/d4m", [shard(), shard((1, 3), (2, 0))], NAMES)
    assert facts == {"constant": 2, "first_constant": [1, 3], "retried": 0}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(w in said for w in ("2 of 8 images of compare/d4m", "class 1 (one), centroid 3", "prior"))
    assert check_constant("the run", [shard()], NAMES)["constant"] == 0 and not capsys.readouterr().err


def test_a_set_of_constant_images_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all 2 images of the run .* class 0 \(zero\), centroid 0.*check prior\.path"):
        check_constant("the run", [shard((0, 0), images=1), shard((2, 0), images=1)], NAMES)
