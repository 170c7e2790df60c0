"""The configuration: YAML and dataclasses agree key by key, and a wrong key or value is an error that helps."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddoq_ray.commands.help import help_text
from ddoq_ray.config import METHODS, STAGES, RunConfig
from ddoq_ray.config.compare import CompareConfig
from ddoq_ray.config.compose import config_dir, load, load_config, to_yaml
from ddoq_ray.config.dataset import DatasetConfig
from ddoq_ray.config.grammar import leaves
from ddoq_ray.config.network_training import TrainPriorConfig, TuneDecoderConfig
from ddoq_ray.config.quantizer import QUANTIZERS
from ddoq_ray.config.run import configured
from ddoq_ray.config.schema import plain

# A file that sets several groups at once ("@package _global_") has tests of its own.
CHOICES = sorted(
    (p.parent.name, p.stem) for p in config_dir().glob("*/*.yaml") if "@package _global_" not in p.read_text()
)


def test_composed_configurations_are_what_they_were() -> None:
    """composed.yaml holds what each line composes beyond digits.yaml: no default and no preset changes unnoticed."""
    here = Path(__file__).parent
    base = dict(leaves(yaml.safe_load((here / "digits.yaml").read_text())))
    for line, pinned in yaml.safe_load((here / "composed.yaml").read_text()).items():
        now = dict(leaves(plain(load_config([] if line == "nothing" else line.split()))))
        differing = {k: v for k, v in now.items() if k not in base or base[k] != v}
        assert differing | dict.fromkeys(set(base) - set(now), "absent") == pinned, line


def test_the_dataclasses_alone_are_what_runs_when_nothing_is_asked() -> None:
    assert RunConfig() == load_config()


def test_files_hold_differences_only() -> None:
    defaults = dict(leaves(plain(CompareConfig())))
    for path in sorted(config_dir().rglob("*.yaml")):
        text = path.read_text()
        values = yaml.safe_load(text) or {}
        chosen = {k.split("/")[1]: v for choice in values.pop("defaults", []) if choice != "_self_"
                  for k, v in choice.items() if k.startswith("override /")}  # fmt: skip
        below = "" if "@package _global_" in text or path.name == "config.yaml" else f"{path.parent.name}."
        under = dict(defaults)  # what the file is laid over
        for group, name in chosen.items():
            preset = (config_dir() / group / f"{name}.yaml").read_text()
            inside = "" if "@package _global_" in preset else f"{group}."
            under |= {k: v for k, v in leaves(yaml.safe_load(preset) or {}, inside) if k in defaults}
        repeated = {k: v for k, v in leaves(values, below) if k not in defaults or under[k] == v}
        assert not repeated, f"{path.name} repeats defaults, or names no key: {repeated}"


def test_quantizer_choices_are_the_registered_algorithms() -> None:
    assert {c for g, c in CHOICES if g == "quantizer"} == set(QUANTIZERS)
    for name, cls in QUANTIZERS.items():
        assert type(load_config([f"quantizer={name}"]).quantizer) is cls


def test_every_field_has_words() -> None:
    def check(cls: Any) -> None:
        for field in dataclasses.fields(cls):
            assert field.metadata.get("help"), f"{cls.__name__}.{field.name}"

    for name in QUANTIZERS:
        check(QUANTIZERS[name])
    check(RunConfig)
    config = load_config()
    for field in dataclasses.fields(RunConfig):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check(value)


PROMISED = [
    "run_dir", "seed", "ipc", "stages", "small_class", "dataset.path", "dataset.val_path", "dataset.classes",
    "latents.path", "latents.keep", "prior.path", "teacher.path", "teacher.min_top1", "quantizer",
    "quantizer.num_shards", "quantizer.winner", "encoder.workers", "synthesizer.min_workers",
    "synthesizer.max_workers", "synthesizer.strength", "synthesizer.start", "weights.scheme", "student", "protocol",
    "num_seeds", "max_bad_fraction", "report.heldout_images",
]  # fmt: skip


@pytest.mark.parametrize("key", PROMISED)
def test_promised_key_exists(key: str) -> None:
    value: Any = load_config()
    for part in key.split("."):
        assert hasattr(value, part), key
        value = getattr(value, part)


def test_values_given_reach_the_dataclass() -> None:
    quantizer = ["quantizer=gram", "quantizer.hartigan=false"]
    config = load_config(["ipc=50", *quantizer, "protocol.lr=1", "stages=[prepare,encode]", "run_dir=x"])
    assert (config.ipc, config.quantizer.name, config.stages) == (50, "gram", ("prepare", "encode"))
    assert config.quantizer.hartigan is False  # type: ignore[attr-defined]
    assert isinstance(config.protocol.lr, float)
    assert config.folder == "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ipc = 3  # type: ignore[misc]


def test_yaml_of_a_resolved_configuration_composes_to_itself() -> None:
    config = load_config(["quantizer=minibatch_kmeans", "ipc=3", "protocol=ddoq-v1", "weights=sqrt"])
    assert configured(RunConfig, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    "value",
    [
        "shards/train-{0000..0099}.tar", "shards/*.tar", "s3://bucket/x-*.tar", "/data/a=b/c, d/it's here.tar",
        "a[0-9].tar", "'quoted-{0..3}.tar'", "C:\\data", "1e3", "007", "true", "ünï/ø é", "a{b}=[c]", "a#b", "~/data",
    ],
)  # fmt: skip
def test_paths_need_no_quotes_of_hydra(value: str) -> None:
    config = load_config([f"dataset.path={value}", "dataset.val_path=v", "stages=[prepare]"])
    assert config.dataset.path == os.path.expanduser(value.strip("'"))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run_dir=1e5", "run_dir", "1e5"), ("run_dir=~/x", "run_dir", os.path.expanduser("~/x")),
        ("run_dir=a=b, c", "run_dir", "a=b, c"), ('run_dir="a b"', "run_dir", "a b"), ("run_dir=yes", "run_dir", "yes"),
        ("ipc=01", "ipc", 1), ('ipc="3"', "ipc", 3), ("++ipc=3", "ipc", 3), ("ipc = 3", "ipc", 3),
        ("baselines=d4m", "methods", ("ddoq", "d4m")), ("baselines=d4m,random", "methods", ("ddoq", "d4m", "random")),
        ("baselines=[d4m,d4m]", "methods", ("ddoq", "d4m")),
        ("baselines=[d4m, random]", "baselines", ("d4m", "random")),
        ("baselines=[]", "methods", ("ddoq",)), ("overwrite=True", "overwrite", True),
    ],
)  # fmt: skip
def test_a_value_is_read_by_the_kind_of_its_key(override: str, key: str, value: Any) -> None:
    assert getattr(load_config([override]), key) == value


def test_of_a_key_given_twice_the_last_counts() -> None:
    config = load_config(["ipc=3", "quantizer=gram", "ipc=4", "quantizer=kmeans"])
    assert (config.ipc, config.quantizer.name) == (4, "kmeans")


def test_students_of_several_ranks_have_whole_gpus() -> None:
    with pytest.raises(ValueError, match=r"cluster\.trainer\.num_gpus=0\.5 with 2 workers: NCCL"):
        load_config(["cluster.trainer.workers=2", "cluster.trainer.num_gpus=0.5"])
    for keys in (["cluster.trainer.num_gpus=0.5"], ["cluster.trainer.workers=2", "cluster.trainer.num_gpus=2"]):
        assert load_config(keys).cluster.trainer.num_gpus


def test_training_commands_read_values_in_the_same_way() -> None:
    command = load(TrainPriorConfig, ["out=1e5", "dataset.path=a,b=[c] é", "training.unet_widths=8,8"])
    assert (command.out, command.dataset.path, command.training.unet_widths) == ("1e5", "a,b=[c] é", (8, 8))


def test_run_directory_has_a_word_for_the_data() -> None:
    assert load_config(["ipc=1"]).folder == "runs/digits-ipc1"
    for path, title in [
        ("data/flowers", "flowers"), ("data/flowers/train-{0000..0003}.tar", "flowers"),
        ("s3://b/birds/*.tar", "birds"), ("x.tar", "data"),
        ("runs/photos/data/train", "photos"), ("photos/val_images", "photos"), ("data/train", "train"),
        ("data/cats/*.parquet", "cats"),
    ]:  # fmt: skip
        assert DatasetConfig(path=path).title == title
    assert DatasetConfig(path="data/flowers", name="f").title == "f"
    assert DatasetConfig(source="torchvision", torchvision="CIFAR10", path="/cache").title == "cifar10"


def test_own_method_and_baselines_without_doubles() -> None:
    assert load_config(["weights=sqrt"]).methods == ("ddoq-sqrt", "d4m", "random", "full")
    assert load_config(["baselines=[ddoq,random]"]).methods == ("ddoq", "random")
    assert load_config(["baselines=[herding,medoids]"]).methods == ("ddoq", "herding", "medoids")
    assert set(load_config().methods) <= set(METHODS)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # unknown
        (["ipcc=3"], ["unknown", "ipcc", "did you mean ipc?"]),
        (["quantizer.winer=paper"], ["unknown", "quantizer.winer", "did you mean quantizer.winner?"]),
        (["quantizer=gram", "quantizer.winner=paper"], ["unknown", "quantizer.winner", "quantizer.hartigan"]),
        (["+x=1"], ["unknown", "x", "ipc"]),
        (["hydra.run.dir=x"], ["unknown", "hydra.run.dir", "--help"]),
        (["quantizer=foo"], ["quantizer=foo", "expected one of", "clvq", "gram"]),
        (["protocol=[digits,imagenet]"], ["protocol=[digits,imagenet]", "expected one of", "ddoq-v1"]),
        (["cluster.decoder.cpus=1"], ["unknown", "cluster.decoder.cpus", "cluster.decoder.num_cpus"]),
        (["label"], ["'label'", "key=value", "--help"]),
        (["~ipc"], ["~ipc", "key=value"]),
        # mistyped
        (["ipc=ab"], ["ipc='ab'", "whole number"]),
        (["ipc=1.5"], ["ipc=1.5", "whole number"]),
        (["ipc=true"], ["ipc='true'", "whole number"]),
        (["protocol.lr=fast"], ["protocol.lr='fast'", "number"]),
        (["overwrite=maybe"], ["overwrite='maybe'", "true or false"]),
        (["stages="], ["stages=''", "[a,b]"]),
        (["ipc=1.0"], ["ipc=1.0", "whole number"]),
        (["ipc=3,4"], ["ipc='3,4'", "whole number"]),
        (["protocol.lr=0,001"], ["protocol.lr='0,001'", "number"]),
        (["run_dir="], ["run_dir=", "empty", "leave the key out"]),
        (["--ipc=3"], ["--ipc=3", "no dashes", "write ipc=3"]),
        (["=3"], ["'=3'", "key=value"]),
        (["IPC=3"], ["unknown", "did you mean ipc?"]),
        (["quantizer=Gram"], ["did you mean quantizer=gram?"]),
        (["prior=path/to/folder"], ["expected one of", "prior.path=path/to/folder"]),
        (["teacher=torchvision:resnet18"], ["expected one of", "teacher.path=torchvision:resnet18"]),
        (["dataset=./photos"], ["expected one of", "dataset.path=./photos"]),
        (["dataset=CIFAR10"], ["dataset=torchvision dataset.torchvision=CIFAR10"]),
        (["student=vit_b_16"], ["expected one of", "student.arch=NAME student.image_size=PIXELS"]),
        (["baselines=none"], ["none", "d4m, random"]),
        (["prior.path=null"], ["prior.path=null", "encode", "leave it out"]),
        (["teacher.path=null"], ["teacher.path=null", "label", "leave it out"]),
        (["experiment=imagenet"], ["experiment=imagenet", "expected one of cifar10, cifar10-compare, digits"]),
        (["experiment=imagenet-1k-dit"], ["needs data", "dataset.path"]),
        (["cluster.reader=3"], ["cluster.reader='3'", "group of keys"]),
        (["small_class=what"], ["small_class=what", "error, cap, drop"]),
        (["weights.scheme=x"], ["weights.scheme=x", "counts, sqrt, uniform"]),
        # out of range
        (["ipc=0"], ["ipc=0", "1 or more"]),
        (["seed=-1"], ["seed=-1", "0 or more"]),
        (["num_seeds=0"], ["num_seeds=0", "1 or more"]),
        (["max_bad_fraction=2"], ["max_bad_fraction=2.0", "0 to 1"]),
        (["quantizer.num_shards=0"], ["quantizer.num_shards=0", "1 or more"]),
        (["quantizer.batch=0"], ["quantizer.batch=0", "1 or more"]),
        (["encoder.workers=0"], ["encoder.workers=0", "1 or more"]),
        (["synthesizer.strength=1.5"], ["synthesizer.strength=1.5", "0 to 1"]),
        (["synthesizer.strength=nan"], ["synthesizer.strength=nan", "finite"]),
        (["synthesizer.min_workers=3"], ["synthesizer.max_workers=2", "synthesizer.min_workers=3"]),
        (["teacher.min_top1=101"], ["teacher.min_top1=101.0", "0 to 100"]),
        (["labels.workers=0"], ["labels.workers=0", "1 or more"]),
        (["student.image_size=1"], ["student.image_size=1", "4 or more"]),
        (["protocol.lr=0"], ["protocol.lr=0.0", "more than 0"]),
        (["protocol.weight_decay=-1"], ["protocol.weight_decay=-1.0", "0 or more"]),
        (["protocol.min_scale=0"], ["protocol.min_scale=0.0", "above 0"]),
        (["protocol.eval_every=-1"], ["protocol.eval_every=-1", "0 or more"]),
        (["cluster.decoder.num_gpus=-1"], ["cluster.decoder.num_gpus=-1.0", "0 or more"]),
        (["cluster.trainer.workers=0"], ["cluster.trainer.workers=0", "1 or more"]),
        (["cluster.num_cpus=0"], ["cluster.num_cpus=0", "1 or more"]),
        (["stages=[]"], ["stages=[]", "prepare"]),
        (["stages=[pack]"], ["pack", "prepare, encode"]),
        (["stages=[report,prepare]"], ["report", "in the order"]),
        (["stages=[prepare,prepare]"], ["prepare", "at most once"]),
        (["baselines=[mtt]"], ["mtt", "d4m", "random, herding, medoids"]),
        (["report.heldout_images=-1"], ["report.heldout_images=-1", "0 or more"]),
        (["run_dir=runs/[a]*"], ["run_dir=runs/[a]*", "choose another"]),
        (["run_dir=~nobody-here/x"], ["~nobody-here/x", "whole path"]),
        (["teacher.path=[~nobody-here/x,y]"], ["~nobody-here/x", "whole path"]),
        # not together
        (["dataset=webdataset"], ["dataset.path", "dataset=digits"]),
        (["dataset.val_path=x"], ["dataset.val_path", "dataset.path"]),
        (["protocol.epochs=3"], ["protocol.epochs=3", "protocol.steps=400", "null"]),
        (["protocol.epochs=3", "protocol.steps=null"], ["protocol.full_epochs", "baselines"]),
        (["protocol.step_at=[3]"], ["protocol.step_at=[3]", "protocol.schedule=cosine"]),
        (["latents.path=x", "latents.keep=false"], ["latents.keep=false", "latents.path"]),
        (["latents.path=x", "stages=[encode]"], ["latents.path", "encode"]),
        (["quantizer.name=gram"], ["quantizer.name=gram", "use quantizer=gram"]),
        (["dataset.path=a-0.tar", "dataset.path=a-1.tar"], ["dataset.path", "2 times", "in quotes"]),
        # without effect
        (["synthesizer.start=noise", "synthesizer.strength=0.3"], ["synthesizer.strength", "no effect", "start=noise"]),
        (["latents.path=x", "encoder.batch=3"], ["encoder.batch", "no effect", "latents.path"]),
        (["labels.mode=online", "labels.workers=3"], ["labels.workers", "no effect", "labels.mode=online"]),
        (["protocol=d4m", "baselines=[]", "protocol.full_epochs=3"], ["protocol.full_epochs", "no effect", "full"]),
        (["protocol.step_factor=0.5"], ["protocol.step_factor", "no effect", "protocol.schedule"]),
        (["cluster=gpu", "cluster.num_cpus=3"], ["cluster.num_cpus", "no effect", "cluster.address"]),
        (["dataset.path=x", "dataset.val_path=y", "dataset.source=digits"], ["dataset.source", "no effect"]),
        # collections
        (["dataset=imagefolder"], ["dataset.path is not set"]),
        (["dataset=pictures"], ["dataset=pictures", "imagefolder", "torchvision"]),
        (["dataset=torchvision"], ["dataset.torchvision=CIFAR10"]),
        (["dataset.torchvision=CIFAR10"], ["dataset=torchvision"]),
        (["dataset=torchvision", "dataset.torchvision=SVHN"], ["dataset.torchvision=SVHN", "CIFAR10, CIFAR100"]),
        (["dataset=idx", "dataset.path=x", "dataset.val_path=y"], ["dataset.val_path", "no effect", "its own"]),
        (["dataset=imagefolder", "dataset.path=x", "dataset.heldout=1.5"], ["dataset.heldout=1.5", "whole number"]),
        (["dataset=imagefolder", "dataset.path=x", "dataset.heldout=-1"], ["dataset.heldout=-1", "part"]),
        (["dataset=parquet", "dataset.path=x", "dataset.val_path=y", "dataset.heldout=3"], ["dataset.heldout", "one"]),
        (["dataset=parquet", "dataset.path=x", "dataset.resort=true"], ["dataset.resort", "no effect", "parquet"]),
        (["dataset=idx", "dataset.path=x", "dataset.label_column=l"], ["dataset.label_column", "no effect", "idx"]),
        (["dataset.heldout=0.1"], ["dataset.heldout", "no effect", "digits"]),
        (["dataset=webdataset", "dataset.path=x", "dataset.heldout=0.1"], ["dataset.heldout", "dataset.resort=true"]),
        (["dataset=webdataset", "dataset.path=x", "dataset.shard_mb=9"], ["dataset.shard_mb", "dataset.resort=true"]),
        (["dataset=imagefolder", "dataset.path=x", "dataset.shard_mb=0"], ["dataset.shard_mb=0", "1 or more"]),
        (["dataset=imagefolder", "dataset.path=x", "dataset.shard_samples=0"], ["shard_samples=0", "1 or more"]),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, list) and "=" in str(v) else "",
)
def test_wrong_key_names_key_and_remedy(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(overrides)
    message = str(error.value)
    assert type(error.value) is ValueError
    assert all(word in message for word in words), message
    assert "hydra.cc" not in message and "\n" not in message


def test_epochs_can_replace_the_steps_of_a_preset() -> None:
    config = load_config(["protocol.epochs=7", "protocol.steps=null", "baselines=[]"])
    assert config.protocol.epochs_for(100) == 7
    assert load_config(["protocol.steps=10"]).protocol.epochs_for(100) == 5  # 2 batches of 50 an epoch
    assert load_config(["protocol.steps=10"]).protocol.epochs_for(120) == 4  # 3 batches an epoch, rounded up
    assert load_config(["protocol=d4m"]).protocol.epochs_for(100, full=True) == 90


def test_a_stage_alone_takes_the_keys_of_the_whole_run() -> None:
    """A person who runs stage by stage repeats the same keys; each must be taken, or the stages would not match."""
    for stage in STAGES:
        assert load_config([f"stages=[{stage}]", "protocol.steps=30", "teacher.min_top1=50"]).protocol.steps == 30


def test_help_names_every_key_with_the_composed_default() -> None:
    text = " ".join(help_text().split())
    config = load_config()
    assert f"the same bytes [{config.teacher.batch}]" in text
    assert ", ".join(METHODS) in text  # every baseline by its name
    assert "quantizer.hartigan" in text and "quantizer.variant" in text  # other algorithms' keys too
    assert f"same compute for every method [{config.protocol.steps}]" in text


@pytest.mark.processes
def test_config_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from ddoq_ray.config.compose import load_config; load_config(['ipc=3']); "
        "print(sorted({'ray', 'torch', 'diffusers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_key_is_of_its_own_configuration_alone() -> None:
    """Though the files of the same choices are composed once."""
    plain, lists = load_config(["quantizer=gram"]), "baselines=[random]"
    other = load_config(["quantizer=gram", "quantizer.hartigan=false", "prior.path=x", lists])
    assert (other.prior.path, other.baselines) == ("x", ("random",)) and other != plain
    assert load_config(["quantizer=gram"]) == plain


def test_each_key_that_is_a_path_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cluster = load_config(["cluster.calibration=~/rates.json", "cluster.trainer.scratch=~/tmp"]).cluster
    assert (cluster.calibration, cluster.trainer.scratch) == ("/home/me/rates.json", "/home/me/tmp")
    assert load_config(["teacher.path=[~/a,b]"]).teacher.path == ("/home/me/a", "b")
    assert load(TuneDecoderConfig, ["source=~/p", "perceptual=~/t"]).source == "/home/me/p"
