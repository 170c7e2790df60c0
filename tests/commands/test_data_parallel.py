"""Training on several ranks by Ray Train: as one process trains, through a death, with words for what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddoq_ray.commands.data_parallel import check_room
from ddoq_ray.commands.table import BY_NAME
from ddoq_ray.commands.training_images import ReadImages
from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.data.image_file import ImageFile
from ddoq_ray.models.training.ranks import Alone, Part, check_parts
from ddoq_ray.stages.train.ranks import Ranks


def test_parts_are_the_batch_and_their_means_its_mean() -> None:
    batch = torch.arange(11.0)
    parts = [Part(11, Ranks(rank, 4)) for rank in range(4)]
    assert sorted(torch.cat([part.of(batch) for part in parts]).tolist()) == batch.tolist()
    assert sum(float(part.of(batch).mean()) * part.share for part in parts) == pytest.approx(float(batch.mean()))
    alone = Part(11, Alone())
    assert alone.share == 1.0 and torch.equal(alone.of(batch), batch)
    check_parts(100, 11, 4, "training.batch")
    for images, size in ((100, 3), (3, 100)):
        with pytest.raises(ValueError, match=r"workers=4: a step has 3 images \(training.batch="):
            check_parts(images, size, 4, "training.batch")


def test_workers_without_room_are_refused_in_words() -> None:
    two = TrainerResources(2, num_cpus=2.0)
    check_room(two, [{"CPU": 2.0}, {"CPU": 3.0}])
    with pytest.raises(ValueError, match=r"workers=2: each takes 2 CPUs .* Ray has 3 CPUs and 0 GPUs\. Give fewer"):
        check_room(two, [{"CPU": 3.0}])
    with pytest.raises(ValueError, match="1 CPUs and 1 GPU "):
        check_room(TrainerResources(2, num_gpus=1.0), [{"CPU": 4.0, "GPU": 1.0}])


@pytest.mark.parametrize(
    "words, said",
    [(["workers=0"], "expected 1 or more"), (["address=auto"], "no effect with workers=1")],
)
def test_keys_that_cannot_work_are_refused(words: list[str], said: str) -> None:
    for name in ("train-prior", "tune-decoder"):
        with pytest.raises(ValueError, match=said):
            BY_NAME[name].compose(words)


def test_images_that_a_node_does_not_see_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.pixels is not to be seen from the node .* every node sees"):
        ReadImages(["a"], ImageFile(tmp_path / "train", {}), None).open()
