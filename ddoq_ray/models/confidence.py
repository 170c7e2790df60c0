"""How sure a classifier is of pictures' classes: its cross-entropy.

Shape suffixes: n pictures, H W their size, S the classifier's, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ddoq_ray.models.classifiers import Classifier


@torch.inference_mode()
def class_losses(
    judge: Classifier, pictures: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], *, pad: bool = False
) -> npt.NDArray[np.float32]:
    """The classifier's cross-entropy in nats, float32 [n], of pictures that it sees at once.

    Args:
        judge: in eval mode.
        pictures: uint8 [n, H, W, 3].
        indices: int64 [n], its output for each one's class.
        pad: put smaller pictures into the middle of one of S x S that is the mean colour elsewhere (0 once it is
            normalised); else they are resized to it.

    Raises:
        ValueError: an index that it has no output for.
    """
    if len(indices) and not 0 <= indices.min() <= indices.max() < judge.num_classes:
        raise ValueError(
            f"the classifier that judges images: it has {judge.num_classes} outputs, and a class asks for output "
            f"{int(indices.max())} (teacher_index in classes.json); give a classifier of these classes"
        )
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(judge.mean.device).float() / 255
    size, side = judge.image_size, x.shape[-1]
    if pad and side < size:
        whole = judge.mean.expand(len(x), 3, size, size).clone()
        first = (size - side) // 2
        whole[:, :, first : first + side, first : first + side] = x
        x = whole
    elif side != size:
        x = torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    targets = torch.from_numpy(indices).to(x.device)
    losses = torch.nn.functional.cross_entropy(judge(x).float(), targets, reduction="none")
    return np.asarray(losses.cpu().numpy(), np.float32)
