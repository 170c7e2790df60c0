"""Accuracy by hand: over the data's outputs, in any batch, and nothing that is not a number is right."""

from __future__ import annotations

import pytest
import torch

from ddoq_ray.models.accuracy import top1_top5


class Reads(torch.nn.Module):
    """Its logits are the first pixels of an image."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return x.flatten(1)[:, : len(self.scale)] * self.scale


LOGITS = torch.tensor(
    [[9, 1, 2, 3, 4, 5, 6], [1, 9, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 9, 8], [7, 7, 1, 1, 1, 1, 1]], dtype=torch.uint8
)
IMAGES = torch.nn.functional.pad(LOGITS, (0, 5)).view(4, 3, 2, 2)


@pytest.mark.parametrize("batch", [1, 3, 500])
def test_accuracy_by_hand(batch: int) -> None:
    truth = torch.tensor([0, 0, 0, 1])  # first; not among five; third; tied, which goes to the lower output
    assert top1_top5(Reads(7), IMAGES, truth, batch=batch) == (25.0, 75.0)
    columns = torch.tensor([5, 0])  # of two classes: the outputs 5 and 0
    assert top1_top5(Reads(7), IMAGES, truth, columns, batch) == (75.0, 100.0)


def test_accuracy_counts_nothing_that_is_not_a_number() -> None:
    model = Reads(4)
    torch.nn.init.constant_(model.scale, float("nan"))
    assert top1_top5(model, IMAGES, torch.zeros(4, dtype=torch.int64), torch.arange(4)) == (0.0, 0.0)
