"""Records that cross a stage's border."""

from __future__ import annotations

import pickle

import numpy as np

from ddoq_ray.storage.records import ClassCounts


def test_class_counts_travel_whole_and_hold_on_to_nothing_else() -> None:
    """Ray keeps a message in memory as long as a buffer of it is in use; there is one for each of 14,000 shards."""
    counts = ClassCounts({7: 3, 0: 1 << 40, 21_840: 2})
    apart: list[pickle.PickleBuffer] = []
    message = pickle.dumps(counts, protocol=5, buffer_callback=apart.append)
    assert not apart
    back = pickle.loads(message)
    assert list(back.items()) == [(0, 1 << 40), (7, 3), (21_840, 2)] and back.total == counts.total
    assert (back.class_ids.dtype, back.counts.dtype) == (np.int32, np.int64)
    assert len(pickle.loads(pickle.dumps(ClassCounts({})))) == 0
