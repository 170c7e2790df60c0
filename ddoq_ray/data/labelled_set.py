"""A distilled set with its stored soft labels: (view, soft label, weight) of an epoch, and views as plain columns.

Shapes: N images of the set, n of them, C outputs of the teacher, H W stored size, S side of a view.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ddoq_ray.core.views.params import ViewParams, view_params
from ddoq_ray.data.image_set import image_tars, load_image_arrays
from ddoq_ray.data.soft_labels import SoftLabels, check_views, views_of
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_log import LabelStore

if TYPE_CHECKING:
    from torch import Tensor

Index = npt.NDArray[np.int64]


class LabelledDataset:
    """A torch map-style dataset of (view, soft label, weight) at an epoch, for any number of DataLoader's workers.

    The epoch lies in memory that the workers share, so that those of `persistent_workers=True` follow it, too.

    `view` is float32 [3, S, S] in [0, 1], exactly the pixels that the teacher saw; `soft label` float32 [C], its logits
    (of an ensemble T log of the mean probability); `weight` K times the mass of the image's Voronoi cell: mean 1 in a
    class. Images are decoded once, in memory: 3 H W bytes each.

    Attributes:
        images: uint8 [N, 3, H, W].
        class_ids: int64 [N].
        weights: float64 [N].
        teacher_index: int64, the output of the teacher that means each class_id.
        epochs: How many have labels; a longer training begins again with the first.
        epoch: The one that items are of; see `set_epoch`.
    """

    def __init__(self, folder: Folder, name: str | None = None) -> None:
        """Open the labels `name` (labels/<name>; by default the only ones) of a folder that has images/ and labels/.

        Raises:
            ValueError: There are none, or several; they are of other images than those beside them, or of other views
                than are drawn now.
        """
        import torch

        self.folder = folder / f"labels/{name or _only(folder)}"
        store = LabelStore(self.folder)
        store.check_images(Artifact(folder / "images", "synthesize").require()["digest"])
        check_views(store)
        self.spec, self.seed, stored = views_of(store.manifest)
        side = store.manifest["identity"]["views"]["stored"]
        arrays = load_image_arrays(image_tars(folder.path("images")), self.spec.size, side)
        self.images, self.class_ids = arrays.images, arrays.class_ids
        counts = np.bincount(self.class_ids)
        self.weights = arrays.weights * counts[self.class_ids]
        self.stored: tuple[int, int, int] = (len(self.images), *self.images.shape[2:])
        if self.stored != stored:
            raise ValueError(f"{folder.path('images')} has images {self.stored} (N, H, W), and labels are of {stored}")
        self.teacher_index = np.asarray(store.manifest["teacher_index"])
        self.epochs, self._epoch = store.grid.epochs, torch.zeros(1, dtype=torch.int64).share_memory_()
        self._soft: tuple[int, SoftLabels] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Items are of this epoch from now on; before an iteration of a DataLoader is begun."""
        self._epoch[0] = epoch % self.epochs

    @property
    def epoch(self) -> int:
        """The epoch that items are of."""
        return int(self._epoch[0])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, float]:
        # As a list's, so that iteration ends: negative from the end, an IndexError beyond.
        views, labels, weights = self.batch(np.array([range(len(self))[index]]))
        return views[0], labels[0], float(weights[0])

    def batch(self, index: Index) -> tuple[Tensor, Tensor, npt.NDArray[np.float64]]:
        """Items int64 [n] at once: views float32 [n, 3, S, S], logits float32 [n, C], weights float64 [n].

        Raises:
            ValueError: A label file is gone or damaged.
        """
        import torch

        from ddoq_ray.core.views.render import batch_views

        index = np.asarray(index, np.int64)
        views, _, _ = batch_views(torch.from_numpy(self.images), index, self.spec, self.seed, self.epoch)
        return views, self.soft.decode(self.soft.epoch(self.epoch)[index]), self.weights[index]

    def columns(self, epoch: int) -> dict[str, npt.NDArray[Any]]:
        """The views of an epoch in plain numbers, for other frameworks; one value an image, in the set's order.

        Returns:
            image_id; crop_top, crop_left, crop_height, crop_width in pixels of the stored image; flip; partner, the
            image_id of which a box is pasted (-1: none), with its own crop and flip of that epoch; box_top, box_left,
            box_bottom, box_right in pixels of the view, ends excluded (an empty box: the partner's view is blended
            in); lambda, the share of the view that the image itself keeps; weight; class_id; and label, what the
            codec packed, uint8 [N, bytes]. Where the views have them: patches, as `ViewParams.patches`, [N, 2, P];
            cutout_top, cutout_left, cutout_bottom, cutout_right, cutout_red, cutout_green, cutout_blue.
        """
        index = np.arange(len(self))
        params: ViewParams = view_params(self.spec, self.seed, epoch, index, self.stored)
        crops = {f"crop_{n}": params.boxes[:, i] for i, n in enumerate(("top", "left", "height", "width"))}
        boxes = {f"box_{n}": params.mix_box[:, i] for i, n in enumerate(("top", "left", "bottom", "right"))}
        sides = ("top", "left", "bottom", "right", "red", "green", "blue")
        cut = {f"cutout_{n}": params.cutout[:, i] for i, n in enumerate(sides)} if params.cutout.size else {}
        return {
            "image_id": index,
            **({"patches": params.patches} if params.patches.size else {}),
            **{name: crop.astype(np.int64) for name, crop in crops.items()},
            "flip": params.flip,
            "partner": params.partner,
            **boxes,
            "lambda": params.lam,
            **cut,
            "weight": self.weights,
            "class_id": self.class_ids,
            "label": self.soft.epoch(epoch)[index],
        }

    @property
    def soft(self) -> SoftLabels:
        """The labels, opened anew in each process: what is open, and the thread that reads ahead, are not inherited."""
        if self._soft is None or self._soft[0] != os.getpid():
            self._soft = (os.getpid(), SoftLabels(self.folder))
        return self._soft[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_soft": None}


def _only(folder: Folder) -> str:
    found = [name.split("/")[1] for name in folder.names(f"labels/*/{layout.MANIFEST}")]
    if len(found) != 1:
        raise ValueError(
            f"{folder.uri} has {'finished labels ' + ', '.join(found) if found else 'no finished labels'}: expected "
            + ("labels=NAME, one of these" if found else "a run directory whose label stage is finished")
        )
    return found[0]
