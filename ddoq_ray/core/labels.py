"""Soft-label codecs: a teacher's output for a view in a fixed number of bytes.

- `logits`: fp16, 2 C bytes. Exact to fp16 rounding.
- `logits_int8`: uint8 with an affine scale for each row, C + 4 bytes. The coarsest, for a budget that asks for it.
- `features`: the penultimate features as uint8 with an affine scale for each row, d + 4 bytes; the teacher's
  linear head is kept once beside them. At 1,000 classes 3.9 times smaller for a ResNet-18 (d = 512), and
  larger for a ResNet-50 (d = 2048), so the choice is by size.

A codec is a class that answers to `Codec` and a row of `CODECS`; labeller, student and plan go by that table.

Shapes: B views, C classes, d penultimate features.

torch is imported where tensors are touched, not with the module: the driver, which only plans, asks for names and
sizes and never loads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Packed = npt.NDArray[np.uint8]

_FP16_MAX = float(np.finfo(np.float16).max)
_LEVELS = 255


class Head(Protocol):
    """The teacher's last layer; `torch.nn.Linear` is one.

    Attributes:
        weight: float32 [C, d].
        bias: float32 [C] or None.
    """

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def bias(self) -> torch.Tensor | None: ...


class Codec(Protocol):
    """What packs a teacher's output for a view, and unpacks it to logits.

    Attributes:
        name: its key in `CODECS`, in configurations and in the metadata of label files.
        packs_features: True where `encode` takes the penultimate features [B, d], and the teacher's head is stored
            beside the labels for `decode`; False where `encode` takes the logits [B, C].
    """

    name: ClassVar[str]
    packs_features: ClassVar[bool]

    @classmethod
    def of(cls, num_classes: int, feature_dim: int | None) -> Codec:
        """The codec for a teacher of C classes and d penultimate features (None: it has no linear head).

        Raises:
            ValueError: a size that the codec needs is missing or below 1.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes a label."""
        ...

    def encode(self, output: torch.Tensor) -> Packed:
        """uint8 [B, nbytes] of what the codec packs, on any device."""
        ...

    def decode(
        self, packed: Packed | torch.Tensor, head: Head | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """float32 [B, C] logits of uint8 [B, nbytes]."""
        ...


@dataclass(frozen=True)
class LogitsCodec:
    """Logits as little-endian fp16."""

    num_classes: int
    name: ClassVar[str] = "logits"
    packs_features: ClassVar[bool] = False

    @classmethod
    def of(cls, num_classes: int, feature_dim: int | None) -> LogitsCodec:
        """The codec of C classes; it asks for no features.

        Raises:
            ValueError: a number of classes below 1.
        """
        return cls(_counted(num_classes))

    @property
    def nbytes(self) -> int:
        """Bytes a label."""
        return 2 * self.num_classes

    def encode(self, output: torch.Tensor) -> Packed:
        """Pack logits.

        Args:
            output: float [B, C] logits, any device.

        Returns:
            uint8 [B, 2 C].

        Raises:
            ValueError: another shape, or a value that is not finite or does not fit fp16.
        """
        values = _checked(output, self.num_classes, "logits", "num_classes")
        return values.astype("<f2").view(np.uint8)

    def decode(
        self, packed: Packed | torch.Tensor, head: Head | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Unpack logits.

        Args:
            packed: uint8 [B, 2 C], numpy or torch.
            head: not needed; taken so that all codecs are called alike.
            device: where the logits are wanted; by default where `packed` is. The packed bytes go there, which are
                half as many.

        Returns:
            float32 [B, C].

        Raises:
            ValueError: another shape or dtype.
        """
        import torch

        return _as_torch(packed, self.nbytes, device).view(torch.float16).float()


@dataclass(frozen=True)
class FeaturesCodec:
    """Penultimate features, affine-quantised row by row (`_affine_bytes`): d + 4 bytes."""

    num_classes: int
    feature_dim: int
    name: ClassVar[str] = "features"
    packs_features: ClassVar[bool] = True

    @classmethod
    def of(cls, num_classes: int, feature_dim: int | None) -> FeaturesCodec:
        """The codec of C classes and d features.

        Raises:
            ValueError: a size that is missing or below 1.
        """
        if feature_dim is None or feature_dim < 1:
            raise ValueError(f"the features codec needs the number of penultimate features, got {feature_dim}")
        return cls(_counted(num_classes), feature_dim)

    @property
    def nbytes(self) -> int:
        """Bytes a label."""
        return self.feature_dim + 4

    def encode(self, output: torch.Tensor) -> Packed:
        """Pack features.

        Args:
            output: float [B, d], the input of the teacher's head, any device.

        Returns:
            uint8 [B, d + 4].

        Raises:
            ValueError: another shape, or a value that is not finite or does not fit fp16.
        """
        return _affine_bytes(_checked(output, self.feature_dim, "features", "feature_dim"))

    def features(self, packed: Packed | torch.Tensor) -> torch.Tensor:
        """Unpack features.

        Args:
            packed: uint8 [B, d + 4], numpy or torch; a torch tensor is decoded on its own device.

        Returns:
            float32 [B, d].

        Raises:
            ValueError: another shape or dtype.
        """
        return _affine_values(_as_torch(packed, self.nbytes))

    def decode(
        self, packed: Packed | torch.Tensor, head: Head | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Unpack features and apply the teacher's head, where the head is.

        Args:
            packed: uint8 [B, d + 4], numpy or torch, on any device: the packed bytes go to the head.
            head: the teacher's head, weight [C, d].
            device: where the logits are wanted; by default where the head is.

        Returns:
            float32 [B, C] logits, without gradient.

        Raises:
            ValueError: no head, or shapes that do not fit.
        """
        import torch

        if head is None:
            raise ValueError("the features codec needs the teacher's head to give logits; pass head=")
        if tuple(head.weight.shape) != (self.num_classes, self.feature_dim):
            raise ValueError(
                f"expected a head with weight [{self.num_classes}, {self.feature_dim}], "
                f"got {list(head.weight.shape)}: it is not the head of the teacher that made these labels"
            )
        with torch.no_grad():
            bias = None if head.bias is None else head.bias.float()
            features = self.features(_as_torch(packed, self.nbytes, head.weight.device))
            return torch.nn.functional.linear(features, head.weight.float(), bias).to(device)


@dataclass(frozen=True)
class Int8LogitsCodec:
    """Logits, affine-quantised row by row (`_affine_bytes`): C + 4 bytes."""

    num_classes: int
    name: ClassVar[str] = "logits_int8"
    packs_features: ClassVar[bool] = False

    @classmethod
    def of(cls, num_classes: int, feature_dim: int | None) -> Int8LogitsCodec:
        """The codec of C classes; it asks for no features.

        Raises:
            ValueError: a number of classes below 1.
        """
        return cls(_counted(num_classes))

    @property
    def nbytes(self) -> int:
        """Bytes a label."""
        return self.num_classes + 4

    def encode(self, output: torch.Tensor) -> Packed:
        """uint8 [B, C + 4] of float [B, C] logits on any device; Raises as `LogitsCodec.encode`."""
        return _affine_bytes(_checked(output, self.num_classes, "logits", "num_classes"))

    def decode(
        self, packed: Packed | torch.Tensor, head: Head | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """float32 [B, C] logits, as `LogitsCodec.decode`."""
        return _affine_values(_as_torch(packed, self.nbytes, device))


# Every codec by its name, the most exact first.
CODECS: dict[str, type[Codec]] = {
    "logits": LogitsCodec,
    "features": FeaturesCodec,
    "logits_int8": Int8LogitsCodec,
}
_NEARLY_EXACT = ("logits", "features")  # of which the smaller is taken where nobody gives a budget


def codec_class(name: str) -> type[Codec]:
    """The row of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in CODECS:
        raise ValueError(f"codec must be one of {tuple(CODECS)}, got {name!r}")
    return CODECS[name]


def make_codec(name: str, num_classes: int, feature_dim: int | None) -> Codec:
    """The codec of a name, for a teacher of C classes and d penultimate features (None: no linear head).

    Raises:
        ValueError: unknown codec, or a size that is missing or below 1.

    >>> make_codec("logits", 1000, None).nbytes, make_codec("features", 1000, 512).nbytes
    (2000, 516)
    """
    return codec_class(name).of(num_classes, feature_dim)


def choose_codec(num_classes: int, feature_dim: int | None, most: float | None = None) -> str:
    """Name of the codec for a teacher of C classes.

    Args:
        num_classes: C.
        feature_dim: d, or None for a teacher without a linear head.
        most: bytes that a label may take: the most exact codec within them. None: the smaller of `logits`, which is
            nearly exact and taken where sizes are equal, and `features`.

    Raises:
        ValueError: no codec is as small as that.

    >>> choose_codec(1000, 512), choose_codec(1000, 2048), choose_codec(10, None)
    ('features', 'logits', 'logits')
    >>> choose_codec(1000, 2048, 2000), choose_codec(1000, 2048, 1999), choose_codec(1000, 512, 600)
    ('logits', 'logits_int8', 'features')
    """
    sizes = codec_sizes(num_classes, feature_dim)
    if most is None:
        return min((name for name in _NEARLY_EXACT if name in sizes), key=sizes.__getitem__)
    for name, nbytes in sizes.items():
        if nbytes <= most:
            return name
    raise ValueError(f"a label takes at least {min(sizes.values())} bytes ({sizes}), and {most:.1f} are allowed")


def codec_sizes(num_classes: int, feature_dim: int | None) -> dict[str, int]:
    """Name -> bytes a label, of each codec that such a teacher can have; the most exact first."""
    usable = [codec for codec in CODECS.values() if feature_dim is not None or not codec.packs_features]
    return {codec.name: codec.of(num_classes, feature_dim).nbytes for codec in usable}


def _affine_bytes(rows: npt.NDArray[np.float32]) -> Packed:
    """uint8 [B, n + 4] of float32 [B, n]: fp16 scale, fp16 offset, then n bytes.

    A value is `offset + scale * byte`. The rounded fp16 offset and scale are what the bytes are computed from, with the
    offset rounded down and the scale up, so nothing is clipped and no value is off by more than scale / 2 (about 1/510
    of the row's range).
    """
    values = rows.astype(np.float64)
    down, up = np.float16(-np.inf), np.float16(np.inf)
    low, high = values.min(axis=1), values.max(axis=1)
    offset = low.astype(np.float16)
    offset = np.where(offset > low, np.nextafter(offset, down), offset)
    exact = (high - offset) / _LEVELS
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, up), scale)
    step = np.where(scale > 0, scale, np.float16(1)).astype(np.float64)  # a constant row is all zeros
    levels = np.rint((values - offset.astype(np.float64)[:, None]) / step[:, None]).astype(np.uint8)
    affine = np.stack([scale, offset], axis=1).astype("<f2").view(np.uint8)
    return np.concatenate([affine, levels], axis=1)


def _affine_values(rows: torch.Tensor) -> torch.Tensor:
    """Inverse of `_affine_bytes`: float32 [B, n] of uint8 [B, n + 4], on its device."""
    import torch

    affine = rows[:, :4].contiguous().view(torch.float16).float()
    return affine[:, 1:] + affine[:, :1] * rows[:, 4:].float()


def _counted(num_classes: int) -> int:
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return num_classes


def _checked(values: torch.Tensor, columns: int, what: str, setting: str) -> npt.NDArray[np.float32]:
    if values.ndim != 2 or values.shape[1] != columns:
        raise ValueError(f"expected {what} [B, {columns}] ({setting}={columns}), got shape {list(values.shape)}")
    array: npt.NDArray[np.float32] = values.detach().float().cpu().numpy()
    if not (np.abs(array) <= _FP16_MAX).all():  # false for NaN too
        raise ValueError(
            f"{what} must be finite and within fp16 (at most {_FP16_MAX:g}), got a largest magnitude of "
            f"{np.abs(array).max():g}: check the teacher and its input normalisation"
        )
    return array


def _as_torch(packed: Packed | torch.Tensor, nbytes: int, device: torch.device | str | None = None) -> torch.Tensor:
    """uint8 [B, nbytes] on the device, or where they are."""
    import torch

    from ddoq_ray.core.transfers import on_device

    if packed.dtype not in (np.uint8, torch.uint8) or packed.ndim != 2 or packed.shape[1] != nbytes:
        raise ValueError(f"expected labels uint8 [B, {nbytes}], got {packed.dtype} {list(packed.shape)}")
    if isinstance(packed, torch.Tensor):
        return packed.to(device).contiguous()
    return on_device(np.require(packed, requirements=["C", "W"]), device or "cpu")
