"""The views that a protocol asks for; without torch, so that a driver can tell them too."""

from __future__ import annotations

from ddoq_ray.config.training import ProtocolConfig
from ddoq_ray.core.views.params import ViewSpec


def view_spec(protocol: ProtocolConfig, size: int) -> ViewSpec:
    """The views of a protocol at `size` pixels; labels, students and the online teacher must agree on them."""
    return ViewSpec(
        size=size,
        min_scale=protocol.min_scale,
        flip=protocol.flip,
        cutmix=protocol.cutmix,
        mixup=protocol.mixup,
        patches=protocol.shuffle_patches,
        cutout=protocol.cutout,
    )
