"""The digits' settings stay with the digits; what other data needs is asked for in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ddoq_ray.commands.train_prior import run_by
from ddoq_ray.config.compose import load, load_config, to_yaml
from ddoq_ray.config.network_training import TrainPriorConfig
from ddoq_ray.config.presets import choices
from ddoq_ray.config.run import RunConfig, configured
from ddoq_ray.config.schema import plain

OWN = ["dataset.path=shards", "dataset.val_path=val"]
NETWORKS = ["prior.path=my-prior", "teacher.path=my-teacher", "student=resnet18-small", "protocol=d4m"]


def test_nothing_asked_is_the_digits_experiment() -> None:
    config = load_config()
    assert config == load_config(["experiment=digits"]) == load_config(["dataset=digits"])
    s, p = config.synthesizer, config.protocol
    assert (config.dataset.source, config.prior.path, config.teacher.path) == (
        "digits", "shipped:digits-prior", "shipped:digits-teacher"
    )  # fmt: skip
    assert (s.start, s.strength, s.steps, s.guidance, config.encoder.resize) == ("noised", 0.1, 25, 1.0, "squash")
    assert (config.student.arch, config.student.image_size, p.name, p.steps) == ("convnet3-w8", 16, "digits", 400)
    assert config.baselines == ("ddoq-sqrt", "d4m", "random", "full")


@pytest.mark.parametrize(
    ("overrides", "missing", "not_missing"),
    [
        (OWN, ["prior:", "teacher:", "student:", "protocol:"], []),
        (["dataset=imagefolder", "dataset.path=photos"], ["prior:", "teacher:", "student:", "protocol:"], []),
        (["dataset=torchvision", "dataset.torchvision=CIFAR10"], ["prior:", "protocol:"], []),
        ([*OWN, "stages=[prepare,encode,quantize]"], ["prior:"], ["teacher:", "student:", "protocol:"]),
        ([*OWN, *NETWORKS[:2]], ["student:", "protocol:"], ["prior:", "teacher:"]),
        ([*OWN, *NETWORKS[:2], "student.arch=resnet18", "protocol=d4m"], ["student:"], ["protocol:"]),
        ([*OWN, "protocol.lr=1", "stages=[train]"], ["protocol:"], []),
        ([*OWN, "experiment=null"], ["prior:", "protocol:"], []),
    ],
)
def test_all_that_is_missing_is_named_at_once(overrides: list[str], missing: list[str], not_missing: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(overrides)
    text = str(error.value)
    assert all(f"\n  {word}" in text for word in missing) and not any(f"\n  {word}" in text for word in not_missing)
    assert "experiment=digits" in text and "ddoq-ray prepare" in text


def test_prepare_asks_for_nothing() -> None:
    config = load_config([*OWN, "stages=[prepare]"])
    assert (config.prior.path, config.teacher.path) == (None, None)


def test_other_data_takes_no_value_of_the_digits() -> None:
    config = load_config([*OWN, *NETWORKS])
    s = config.synthesizer
    assert (s.start, s.strength, s.steps, s.guidance) == ("noised", 0.7, 50, None)
    assert config.baselines == ("ddoq-sqrt", "d4m", "random")
    assert (config.student.image_size, config.protocol.name) == (32, "d4m")
    assert load_config([*OWN, *NETWORKS, "synthesizer.strength=0.2", "baselines=[full]"]).synthesizer.strength == 0.2
    named = load_config(["experiment=digits", *OWN])
    assert (named.prior.path, named.synthesizer.strength, named.baselines[-1]) == ("shipped:digits-prior", 0.1, "full")


def test_a_prior_brings_what_it_is_run_by(tmp_path: Path) -> None:
    dit = load_config([*OWN, *NETWORKS[1:], "prior=dit-xl-2-256"])
    s = dit.synthesizer
    assert (dit.prior.path, s.strength, s.steps, s.guidance) == ("facebook/DiT-XL-2-256", 0.7, 50, 4.0)
    assert dit.encoder.resize == "center-crop"
    assert load_config([*OWN, *NETWORKS[1:], "prior=dit-xl-2-256", "synthesizer.guidance=2"]).synthesizer.guidance == 2
    (tmp_path / "ddoq_prior.json").write_text(json.dumps({"synthesizer": {"strength": 0.4, "guidance": 3.0}}))
    for path in (tmp_path, f"file://{tmp_path}"):
        own = load_config([*OWN, *NETWORKS[1:], f"prior.path={path}"]).synthesizer
        assert (own.strength, own.steps, own.guidance) == (0.4, 50, 3.0)
    for block in ({"synthesizer": {"guidance": None}}, {"synthesizer": None}, []):
        (tmp_path / "ddoq_prior.json").write_text(json.dumps(block))
        own = load_config([*OWN, *NETWORKS[1:], f"prior.path={tmp_path}"]).synthesizer
        assert (own.strength, own.guidance) == (0.7, None)
    for block in ({"synthesizer": "guidance"}, {"synthesizer": {"strength": 7}}, {"encoder": {"resize": "up"}},
                  {"encoder": {"batch": 3}}):  # fmt: skip
        (tmp_path / "ddoq_prior.json").write_text(json.dumps(block))
        with pytest.raises(ValueError, match=r"ddoq_prior\.json"):
            load_config([*OWN, *NETWORKS[1:], f"prior.path={tmp_path}"])


def brought(*overrides: str) -> tuple[object, ...]:
    c = load_config(list(overrides))
    s = c.synthesizer
    return s.start, s.strength, s.steps, s.guidance, c.encoder.resize


DIGITS, DIT, OTHER = (
    ("noised", 0.1, 25, 1.0, "squash"), ("noised", 0.7, 50, 4.0, "center-crop"), ("noised", 0.7, 50, None, "squash")
)  # fmt: skip


def test_a_priors_path_brings_the_same_as_its_preset() -> None:
    for path in ("facebook/DiT-XL-2-256", "facebook/DiT-XL-2-256@main", "/models/DiT-XL-2-256"):
        assert brought(*OWN, *NETWORKS[1:], f"prior.path={path}") == DIT
    assert brought(*OWN, *NETWORKS[1:], "prior.path=shipped:digits-prior") == DIGITS
    assert brought(*OWN, *NETWORKS) == brought(*OWN, *NETWORKS, "prior=own") == OTHER
    # A copy of the hub's that lies elsewhere is run as the preset, or the experiment, says.
    assert brought(*OWN, *NETWORKS[1:], "prior=dit-xl-2-256", "prior.path=copy") == DIT
    assert brought(*OWN, "experiment=imagenet-1k-dit", "prior.path=copy") == DIT


def test_a_folder_of_an_autoencoder_alone_is_decoded_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    config = load_config([*OWN, *NETWORKS[1:], f"prior.path={tmp_path}"])
    assert config.prior.autoencoder_only and config.synthesizer.strength == 0
    named = load_config([*OWN, *NETWORKS[1:], "prior=autoencoder", "prior.path=stabilityai/sd-vae-ft-mse"])
    assert named.prior.autoencoder_only and named.synthesizer.strength == 0
    for key in ("prior.scheduler=ddim", "prior.negative_prompt=cartoon"):
        with pytest.raises(ValueError, match=r"has no effect here: prior\.autoencoder_only"):
            load_config([*OWN, *NETWORKS[1:], f"prior.path={tmp_path}", key])
    with pytest.raises(ValueError, match=r"prior\.path=null"):
        load_config([*OWN, *NETWORKS[1:], "prior=autoencoder"])
    (tmp_path / "model_index.json").write_text("{}")
    assert not load_config([*OWN, *NETWORKS[1:], f"prior.path={tmp_path}"]).prior.autoencoder_only


def test_published_experiments_are_what_their_sources_say() -> None:
    """suduo94/D4M@da35d10, its scripts; arXiv 2501.07681, appendix C."""
    d4m, ddoq = (load_config([f"experiment=imagenet-1k-{name}", *OWN]) for name in ("d4m", "sd"))
    for c in (d4m, ddoq):
        s, e = c.synthesizer, c.encoder
        assert (s.start, s.strength, s.steps, s.guidance, s.image_size) == ("noised", 0.7, 50, 8.0, 224)
        assert (c.prior.negative_prompt, c.prior.scheduler) == ("cartoon, anime, painting", "folder")
        assert (e.resize, e.posterior, e.dtype) == ("squash", "sample", "float16")
        assert (c.teacher.path, c.student.arch, c.student.image_size) == ("torchvision:resnet18", "resnet18", 224)
        p = c.protocol
        assert (p.epochs, p.batch, p.temperature, p.min_scale, p.flip) == (300, 1024, 20.0, 0.08, True)
    assert "d4m" in d4m.methods and (d4m.protocol.lr, d4m.protocol.schedule) == (1e-3, "cosine")
    assert ddoq.methods == ("ddoq-sqrt", "ddoq-uniform", "random") and ddoq.quantizer.name == "minibatch_kmeans"
    assert (ddoq.protocol.lr, ddoq.protocol.schedule, ddoq.protocol.step_at) == (2e-3, "step", (250,))
    assert (ddoq.num_seeds, ddoq.weights.scheme) == (5, "sqrt")


def test_another_prior_leaves_the_digits_settings_behind(tmp_path: Path) -> None:
    (tmp_path / "ddoq_prior.json").write_text(json.dumps({"synthesizer": {"steps": 9}, "encoder": {"resize": "pad"}}))
    for data in ((), ("dataset=digits",), ("experiment=digits",)):
        assert brought(*data, "prior.path=other") == OTHER
        assert brought(*data, f"prior.path={tmp_path}") == ("noised", 0.7, 9, None, "pad")
        assert brought(*data, "prior.path=other", "synthesizer.strength=0.2")[1] == 0.2
    assert brought("experiment=imagenet-1k-dit", *OWN, f"prior.path={tmp_path}")[2] == 9


def test_a_trained_prior_says_what_it_is_run_by(tmp_path: Path) -> None:
    def told(*overrides: str) -> tuple[object, ...]:
        block = run_by(load(TrainPriorConfig, list(overrides)))
        (tmp_path / "ddoq_prior.json").write_text(json.dumps(block))
        return brought(*OWN, *NETWORKS[1:], f"prior.path={tmp_path}")

    photos = ("dataset.path=x", "image_size=32")
    assert told() == DIGITS
    assert told(*photos) == ("noised", 0.7, 50, 4.0, "squash")
    # Without dropped labels the null label has learnt nothing.
    assert told(*photos, "training.label_dropout=0", "resize=center-crop") == ("noised", 0.7, 50, 1.0, "center-crop")


def test_the_main_job_is_what_it_was_to_the_last_key() -> None:
    """Every value is written out in digits.yaml: none changes unnoticed."""
    assert plain(load_config()) == yaml.safe_load((Path(__file__).parent / "digits.yaml").read_text())


EXPERIMENTS = [
    f"experiment={name}"
    for name in choices("experiment")
    if name != "digits" and not name.endswith("-compare") and "/" not in name
]


def with_data(experiment: str) -> list[str]:
    """torchvision's sets bring their own validation part."""
    return [experiment, *(OWN[:1] if experiment == "experiment=cifar10" else OWN)]


@pytest.mark.parametrize("overrides", [[], [*OWN, *NETWORKS], *map(with_data, EXPERIMENTS)])
def test_the_published_configuration_is_the_whole_truth(overrides: list[str]) -> None:
    config = load_config(overrides)
    assert configured(RunConfig, yaml.safe_load(to_yaml(config))) == config
