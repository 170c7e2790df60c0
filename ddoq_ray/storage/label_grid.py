"""How the labels of an image set lie in files: a range of epochs of a range of images each, from counts alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from ddoq_ray.storage import layout

GROUP_BYTES = 8 << 20  # of labels that are written, and read, at a time
GROUP_LABELS = 16_384  # the same in labels: drawing their views takes memory too


@dataclass(frozen=True)
class LabelFile:
    """One file: labels of the epochs first_epoch to end_epoch - 1 of the images first_image to end_image - 1."""

    index: int
    first_epoch: int
    end_epoch: int
    first_image: int
    end_image: int

    @property
    def name(self) -> str:
        return layout.label_file(self.index)

    @property
    def record(self) -> str:
        return layout.label_record(self.index)

    @property
    def labels(self) -> int:
        return (self.end_epoch - self.first_epoch) * (self.end_image - self.first_image)

    def __str__(self) -> str:
        return f"epochs {self.first_epoch} to {self.end_epoch - 1} of images {self.first_image} to {self.end_image - 1}"


@dataclass(frozen=True)
class LabelGrid:
    """The files of all labels: whole epochs while one fits a file, else parts of one epoch.

    Every range of images begins at a multiple of the teacher's inner batch, so that a label does not depend on how
    labels lie in files.

    Attributes:
        images: Of the set.
        epochs: That are labelled.
        nbytes: Bytes a label.
        batch: Images that the teacher sees at once.
        images_per_file: Images of a file; the last of an epoch may have fewer.
        epochs_per_file: Epochs of a file; the last may have fewer.
    """

    images: int
    epochs: int
    nbytes: int
    batch: int
    images_per_file: int
    epochs_per_file: int

    @classmethod
    def recorded(cls, facts: Mapping[str, int]) -> LabelGrid:
        """From a manifest's facts, which tell of one that is missing."""
        return cls(**{field.name: facts[field.name] for field in fields(cls)})

    @staticmethod
    def of(counts: tuple[int, int], nbytes: int, *, batch: int, file_bytes: int, file_labels: int) -> LabelGrid:
        """Files of one size, as far as counts allow: more than half of the bound, unless one could hold everything.

        Then there are two, half of the epochs each, so that teachers share even the work of one set.

        Args:
            counts: Images and epochs.
            file_bytes: The most bytes of labels in a file, as long as an inner batch fits.
            file_labels: The most labels in a file: a file is a unit of work, and small labels cost a teacher no less.

        >>> LabelGrid.of((50_000, 300), 516, batch=250, file_bytes=128 << 20, file_labels=1 << 18).files
        60
        >>> LabelGrid.of((100, 400), 20, batch=250, file_bytes=128 << 20, file_labels=1 << 18).files
        2
        """
        images, epochs = counts
        most = min(file_bytes // nbytes, file_labels)
        if images <= max(most, batch):
            cuts = max(min(2, epochs), -(-epochs // max(1, most // images)))
            return LabelGrid(images, epochs, nbytes, batch, images, -(-epochs // cuts))
        cuts = -(-images // (max(most, batch) // batch * batch))
        batches = -(-images // (cuts * batch))
        return LabelGrid(images, epochs, nbytes, batch, batches * batch, 1)

    @property
    def _beside(self) -> int:
        """Files of one epoch."""
        return -(-self.images // self.images_per_file)

    @property
    def files(self) -> int:
        return self._beside * -(-self.epochs // self.epochs_per_file)

    @property
    def labels(self) -> int:
        return self.images * self.epochs

    @property
    def bytes(self) -> int:
        """Of all labels; what Parquet adds is below a hundredth, except for labels of a few bytes."""
        return self.labels * self.nbytes

    def file(self, index: int) -> LabelFile:
        row, column = divmod(index, self._beside)
        epoch, image = row * self.epochs_per_file, column * self.images_per_file
        ends = min(epoch + self.epochs_per_file, self.epochs), min(image + self.images_per_file, self.images)
        return LabelFile(index, epoch, ends[0], image, ends[1])

    def all(self) -> Iterator[LabelFile]:
        return map(self.file, range(self.files))

    def of_epoch(self, epoch: int) -> list[LabelFile]:
        """The files that hold the labels of an epoch, in the order of the images.

        Raises:
            ValueError: No label of that epoch is stored.
        """
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"there are labels of {self.epochs} epochs, 0 to {self.epochs - 1}, and none of {epoch}")
        first = epoch // self.epochs_per_file * self._beside
        return [self.file(index) for index in range(first, first + self._beside)]

    def groups(self, file: LabelFile) -> list[tuple[int, int]]:
        """(first, end) of the images that lie together in a file, the same for each of its epochs."""
        step = max(1, min(GROUP_BYTES // self.nbytes, GROUP_LABELS) // self.batch) * self.batch
        starts = range(file.first_image, file.end_image, step)
        return [(first, min(first + step, file.end_image)) for first in starts]
