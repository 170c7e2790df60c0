"""Bytes of a soft label in each codec of `core.labels`, and the smaller codec: plain arithmetic, without torch."""

from __future__ import annotations

CODECS = ("logits", "features")


def bytes_per_label(codec: str, num_classes: int, feature_dim: int | None) -> int:
    """Bytes of one soft label.

    Args:
        codec: "logits" or "features".
        num_classes: C.
        feature_dim: d; needed by "features" only.

    Raises:
        ValueError: unknown codec, or a size that is missing or below 1.

    >>> bytes_per_label("logits", 1000, None), bytes_per_label("features", 1000, 512)
    (2000, 516)
    """
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {CODECS}, got {codec!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if codec == "logits":
        return 2 * num_classes
    if feature_dim is None or feature_dim < 1:
        raise ValueError(f"the features codec needs the number of penultimate features, got {feature_dim}")
    return feature_dim + 4


def choose_codec(num_classes: int, feature_dim: int | None) -> str:
    """Name of the smaller codec; `logits`, which is nearly exact, where sizes are equal or there is no linear
    head.

    Args:
        num_classes: C.
        feature_dim: d, or None for a teacher without a linear head.

    >>> choose_codec(1000, 512), choose_codec(1000, 2048), choose_codec(10, None)
    ('features', 'logits', 'logits')
    """
    if feature_dim is None:
        return "logits"
    smaller = bytes_per_label("features", num_classes, feature_dim) < bytes_per_label("logits", num_classes, None)
    return "features" if smaller else "logits"
