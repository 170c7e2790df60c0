"""scikit-learn's digits: the collection that comes with the package."""

from __future__ import annotations

import numpy as np

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A fixed split of the 1,797 digits: sizes by split, stratified. The noise strength and every other choice is
# made on `selection`; `val` is only ever reported.
DIGIT_SPLITS = {"train": 1000, "selection": 297, "val": 500}


def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits (1,797 real scanned 8x8 digits, shipped in that package), split once and for all.

    Returns:
        Split name -> (images uint8 [N, 8, 8], class_ids int64 [N]); splits train, selection and val.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    targets = bunch.target.astype(np.int64)
    order = np.arange(len(targets))
    train, rest = train_test_split(order, train_size=DIGIT_SPLITS["train"], random_state=0, stratify=targets)
    selection, val = train_test_split(
        rest, train_size=DIGIT_SPLITS["selection"], random_state=0, stratify=targets[rest]
    )
    return {
        name: (images[np.sort(index)], targets[np.sort(index)])
        for name, index in (("train", train), ("selection", selection), ("val", val))
    }
