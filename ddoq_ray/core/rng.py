"""Random generators that are a pure function of a key: no global state, no order of creation."""

from __future__ import annotations

import hashlib
import operator

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


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
    return np.random.Generator(np.random.Philox(key=philox_key(*key)))


def philox_key(*key: int | str) -> UInt64:
    """uint64 [2]: the key of `philox`'s generator, for `philox_words`. Arguments and errors as there."""
    if not key:
        raise ValueError("philox() expects at least one key part (an integer or a string), got none")
    digest = hashlib.blake2b(digest_size=16)
    for part in key:
        if isinstance(part, str):
            tag, payload = b"s", part.encode("utf-8")
        else:
            # bool is an int in Python; True and 1 would silently share a stream.
            if isinstance(part, (bool, np.bool_)) or not hasattr(part, "__index__"):
                raise ValueError(f"a key part must be an integer or a string, got {type(part).__name__}: {part!r}")
            tag, payload = b"i", str(operator.index(part)).encode("ascii")
        digest.update(tag + len(payload).to_bytes(8, "little") + payload)
    return np.frombuffer(digest.digest(), "<u8").astype(np.uint64)


_PHILOX_M: UInt64 = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], dtype=np.uint64).reshape(2, 1, 1)
_PHILOX_W: UInt64 = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64).reshape(2, 1, 1)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_PHILOX_M_LOW, _PHILOX_M_HIGH = _PHILOX_M & _LOW, _PHILOX_M >> _HALF


def philox_words(key: UInt64, ids: Int64, blocks: int) -> UInt64:
    """The streams of many counters, evaluated at once.

    Args:
        key: uint64 [2], or [2, B] where each counter has its own.
        ids: int64 [B], the counters.
        blocks: blocks of four words wanted of each stream.

    Returns:
        uint64 [B, 4 * blocks]; row i is the stream of `np.random.Philox(key=its key, counter=[0, ids[i], 0, 0])`.

    Source: Salmon et al., SC 2011 (Philox4x64-10).
    """
    # Words 0 and 2 of the state are multiplied, words 1 and 3 are mixed in: two stacked arrays [2, B,
    # blocks].
    multiplied = np.zeros((2, ids.size, blocks), dtype=np.uint64)
    multiplied[0] = np.arange(1, blocks + 1, dtype=np.uint64)  # numpy counts up before its first block
    mixed = np.zeros_like(multiplied)
    mixed[0] = ids.astype(np.uint64)[:, None]
    round_key = key.reshape(2, -1, 1)
    for _ in range(10):
        # 64 x 64 -> 128 bits from 32-bit halves; the low 64 bits are numpy's own wrapping product.
        low, high = multiplied & _LOW, multiplied >> _HALF
        cross = high * _PHILOX_M_LOW + ((low * _PHILOX_M_LOW) >> _HALF)
        product_high = high * _PHILOX_M_HIGH + (cross >> _HALF)
        product_high += ((cross & _LOW) + low * _PHILOX_M_HIGH) >> _HALF
        product_low = multiplied * _PHILOX_M
        multiplied = product_high[::-1] ^ mixed ^ round_key
        mixed = product_low[::-1]
        round_key = round_key + _PHILOX_W
    words = np.empty((ids.size, blocks, 4), dtype=np.uint64)
    words[..., 0], words[..., 2] = multiplied
    words[..., 1], words[..., 3] = mixed
    return words.reshape(ids.size, 4 * blocks)


def uniform(words: UInt64) -> Float64:
    """float64 in [0, 1), 53 bits, as numpy's Generator.random."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
