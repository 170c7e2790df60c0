"""Random generators that are a pure function of a key: no global state, no order of creation."""

from __future__ import annotations

import hashlib
import operator

import numpy as np


def philox(*key: int | str) -> np.random.Generator:
    """Returns the generator that belongs to a key.

    Equal keys give equal streams in any process and on any machine; different keys give independent ones.
    Each part is hashed with its type and length, so ("1",) and (1,), or ("ab", "c") and ("a", "bc"), differ.

    Args:
        *key: one or more integers (any size and sign, numpy's included) or strings, e.g. a purpose, the run's
            seed and a class id.

    Returns:
        A numpy Generator on a Philox counter whose 128-bit key is the BLAKE2b hash of the parts.

    Raises:
        ValueError: no part was given, or one is neither an integer nor a string.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).

    >>> int(philox("views", 0, 7).integers(1000)) == int(philox("views", 0, 7).integers(1000))
    True
    """
    if not key:
        raise ValueError("philox() expects at least one key part (an integer or a string), got none")
    digest = hashlib.blake2b(digest_size=16)
    for part in key:
        if isinstance(part, str):
            tag, payload = b"s", part.encode("utf-8")
        else:
            # bool is an int in Python; True and 1 would silently share a stream.
            if isinstance(part, (bool, np.bool_)) or not hasattr(part, "__index__"):
                raise ValueError(
                    f"a key part must be an integer or a string, got {type(part).__name__}: {part!r}"
                )
            tag, payload = b"i", str(operator.index(part)).encode("ascii")
        digest.update(tag + len(payload).to_bytes(8, "little") + payload)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))
