"""The keys of a comparison: what it is made of, and what is refused before anything starts."""

from __future__ import annotations

import pytest
import yaml

from ddoq_ray.commands.table import BY_NAME
from ddoq_ray.config.compare import CompareConfig
from ddoq_ray.config.compose import load, to_yaml
from ddoq_ray.config.run import RunConfig, configured
from ddoq_ray.pipeline import of_kind, steps
from ddoq_ray.stages.encode.step import Encode
from ddoq_ray.stages.label.step import Label
from ddoq_ray.stages.quantize.step import Quantize
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.stages.train.step import Train


def compare(*words: str) -> CompareConfig:
    config = BY_NAME["compare"].compose(words)
    assert isinstance(config, CompareConfig)
    return config


def test_each_part_is_made_once() -> None:
    """2 IPCs x 2 students x 2 teachers x 2 seeds: images once an IPC, labels once a set, size and teacher."""
    asked = compare(
        "methods=[ddoq,ddoq-sqrt,random,full]", "ipcs=[1,10]", "students=[convnet3-w32,convnet3-w8@16]",
        "teachers=[digits,elsewhere/other]", "num_seeds=2",
    )  # fmt: skip
    planned = steps(asked)
    assert len(of_kind(Encode, planned)) == 1
    assert [s.place for s in of_kind(Quantize, planned)] == [f"compare/ddoq-ipc{k}/codebook" for k in (1, 10)]
    assert [s.place for s in of_kind(Synthesize, planned)] == [f"compare/ddoq-ipc{k}/images" for k in (1, 10)]
    assert len(of_kind(Label, planned)) == 2 * (1 + 2) * 2  # IPCs x (one set of ddoq, two draws) x teachers
    trained = of_kind(Train, planned)
    assert len(trained) == len({s.place for s in trained}) == (2 * 3 + 1) * 2 * 2 * 2  # `full` at one IPC only
    places = [(s.name, s.place) for s in planned]
    assert len(places) == len(set(places))


def test_hard_labels_lie_beside_soft_ones_and_need_one_teacher() -> None:
    asked = compare("methods=[random]", "ipcs=[1]", "teachers=[digits,elsewhere/other]", "hard_labels=true")
    kinds = [(part.teacher.title, part.protocol.name, part.labels.mode) for part in asked.parts()]
    assert kinds == [
        ("digits-teacher", "digits", "auto"), ("digits-teacher", "digits-hard", "hard"), ("other", "digits", "auto"),
    ]  # fmt: skip


def test_batches_belong_to_ipcs() -> None:
    asked = compare("methods=[random]", "ipcs=[1,10]", "batches=[10,50]")
    assert [(part.ipc, part.protocol.batch) for part in asked.parts()] == [(1, 10), (10, 50)]


def test_medoids_have_the_codebook_that_they_are_chosen_by() -> None:
    planned = steps(compare("methods=[medoids,random]", "ipcs=[2]"))
    assert [s.place for s in of_kind(Quantize, planned)] == ["compare/ddoq-ipc2/codebook"]
    assert not of_kind(Synthesize, planned)


def test_students_are_presets_or_architectures_at_a_size() -> None:
    asked = compare("students=[convnet3,convnet3@16,resnet18-small@24]", "ipcs=[1]")
    sizes = [(part.student.arch, part.student.image_size) for part in asked.parts()]
    assert sizes == [("convnet3", 32), ("convnet3", 16), ("resnet18-small", 24)]


def test_what_is_recorded_is_read_back() -> None:
    asked = compare("ipcs=[1,5]", "teachers=[digits]", "quantizer=gram", "hard_labels=true", "reported=cifar10")
    assert configured(CompareConfig, yaml.safe_load(to_yaml(asked))) == asked
    assert all(not isinstance(part, CompareConfig) and isinstance(part, RunConfig) for part in asked.parts())


def test_other_data_is_asked_for_networks_that_the_lists_may_name() -> None:
    words = ["dataset.path=shards", "dataset.val_path=val", "prior.path=mine", "protocol=rded"]
    with pytest.raises(ValueError, match="teacher") as told:
        load(CompareConfig, words)
    assert "student" in str(told.value)
    asked = load(CompareConfig, [*words, "students=[convnet3]", "teachers=[folder/one]"])
    assert [part.teacher.path for part in asked.parts()] == ["folder/one", "folder/one"]


def test_an_experiment_may_be_a_comparison() -> None:
    asked = compare("experiment=digits-compare", "num_seeds=2")
    assert asked.hard_labels and asked.num_seeds == 2 and asked.cluster.trainer.groups == 2
    assert {part.student.arch for part in asked.parts()} == {"convnet3-w8"}
    with pytest.raises(ValueError, match="is a comparison: `ddoq-ray compare experiment=digits-compare`"):
        load(RunConfig, ["experiment=digits-compare"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["methods=[best]"], "methods=['best']: expected some of ddoq,"),
        (["methods=[]"], "methods=[]: expected some of"),
        (["methods=[d4m,d4m]"], "methods names d4m twice"),
        (["ipcs=[0]"], "ipcs=[0]: expected numbers of images per class"),
        (["ipcs=[1,1]"], "each once"),
        (["ipcs=[1,10]", "batches=[5]"], "batches=[5]: expected one for each of ipcs=[1, 10]"),
        (["students=[convnet3@large]"], "convnet3@large is no NAME@SIDE"),
        (["teachers=[a/net,b/net]"], "two are called net"),
        (["teachers=[a,a]"], "teachers names a twice"),
        (["reference=none"], "reference=none: expected one of"),
        (["hard_labels=true", "labels.mode=hard"], "leave one of them out"),
        (["ipc=5"], "ipc has no effect in a comparison: ipcs"),
        (["baselines=[d4m]"], "baselines has no effect in a comparison"),
        (["weights=sqrt"], "weights has no effect in a comparison"),
        (["students=[convnet3]", "student=convnet3"], "student has no effect in a comparison"),
        (["methods=[full,random]", "protocol.steps=null", "protocol.epochs=3"], "protocol.full_epochs"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_told_at_once(words: list[str], told: str) -> None:
    with pytest.raises(ValueError) as error:
        compare(*words)
    assert told in str(error.value)
