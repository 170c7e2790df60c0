"""Synthesized images that are one constant colour: counted, told, and refused where a set holds nothing else.

A damaged prior often gives them (black, or the grey of a decoder that answers nothing), and each is a valid picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.execution.workers import say

Key = tuple[int, int]  # class_id, centroid_id


def constant_facts(pictures: Iterable[tuple[Key, npt.NDArray[np.uint8]]]) -> dict[str, Any]:
    """What a shard's record says of its images uint8 [H, W, 3] of one colour: how many, and which is the first."""
    found = [key for key, picture in pictures if bool((picture == picture[0, 0]).all())]
    return {"constant": len(found), "first_constant": list(found[0]) if found else None}


def check_constant(place: str, shards: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """The facts of a whole set; said in a line where some of its images are constant.

    Args:
        place: What the user knows the set by.
        shards: Records of its image shards, in order.
        classes: Names of the classes.

    Raises:
        ValueError: When all of them are.
    """
    images, constant = (sum(s[key] for s in shards) for key in ("images", "constant"))
    first = next((s["first_constant"] for s in shards if s["constant"]), None)
    if first is None:
        return {"constant": 0, "first_constant": None}
    which = f"class {first[0]} ({classes[first[0]]}), centroid {first[1]}"
    if constant == images:
        raise ValueError(
            f"synthesize: all {images:,} images of {place} are one constant colour each, the first that of {which}; "
            "the prior cannot make images of these centroids: check prior.path (its decoder's weights, its "
            "scaling_factor and the scheduler's settings), or lower synthesizer.strength and synthesizer.guidance; "
            "then go on with overwrite=true"
        )
    say(
        f"synthesize {constant:,} of {images:,} images of {place} are one constant colour, the first that of {which}; "
        "check them, and the prior"
    )
    return {"constant": constant, "first_constant": first}
