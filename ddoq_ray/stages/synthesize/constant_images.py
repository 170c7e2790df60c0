"""Synthesized images that are one constant colour: counted, named, refused where a set holds nothing else.

A damaged prior often gives them (black, or the grey of a decoder that answers nothing), and each is a valid picture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.execution.workers import say

Key = tuple[int, int]  # class_id, centroid_id
NAMED = 5  # of them in a message, the first of a shard each


def constant_facts(pictures: Iterable[tuple[Key, npt.NDArray[np.uint8]]]) -> dict[str, Any]:
    """What a shard's record says of its images uint8 [H, W, 3] of one colour: how many, and which is the first."""
    found = [key for key, picture in pictures if bool((picture == picture[0, 0]).all())]
    return {"constant": len(found), "first_constant": list(found[0]) if found else None}


def check_constant(place: str, shards: Collection[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """The facts of a whole set; said in a line where some of its images are constant.

    Args:
        place: What the user knows the set by.
        shards: Records of its image shards, in order.
        classes: Names of the classes.

    Raises:
        ValueError: When all of them are.
    """
    images, constant, retried = (sum(s.get(key, 0) for s in shards) for key in ("images", "constant", "retried"))
    if retried:
        say(f"synthesize {retried:,} of {images:,} images of {place} were made anew from other noise")
    named = [s["first_constant"] for s in shards if s["constant"]]
    if not named:
        return {"constant": 0, "first_constant": None, "retried": retried}
    which = "; ".join(f"class {c} ({classes[c]}), centroid {k}" for c, k in named[:NAMED])
    if constant == images:
        raise ValueError(
            f"synthesize: all {images:,} images of {place} are one constant colour each, such as {which}; "
            "the prior cannot make images of these centroids: check prior.path (its decoder's weights, its "
            "scaling_factor and the scheduler's settings), or lower synthesizer.strength and synthesizer.guidance; "
            "then go on with overwrite=true"
        )
    say(
        f"synthesize {constant:,} of {images:,} images of {place} are one constant colour, such as {which}; "
        "check them, and the prior"
    )
    return {"constant": constant, "first_constant": named[0], "retried": retried}
