"""The one table of commands: a new one is a file with its keys and what runs it, and a row here.

Keys and what runs them are import paths, so that listing the commands loads none of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_KEY = re.compile(r"[+\s]*[\w.-]+\s*=")  # how key=value begins; a path may hold a = too


@dataclass(frozen=True)
class Command:
    """A word of the command line.

    Attributes:
        name: The word.
        words: One line for the list of commands.
        config: Its keys: `module:dataclass`.
        main: What runs it: `module:function`, which is given the configuration.
        use: How it is typed, with what it cannot do without.
        goes_on: Whether the same command goes on where it was cut off; else it begins anew.
        place: The key of the folder that it writes.
        about: A paragraph for its own help.
        reads: Keys, or prefixes that end with a dot, that its own help shows; none = all.
        means: Keys that the word stands for.
        bare: The key of a first word that is no key=value.
    """

    name: str
    words: str
    config: str
    main: str
    use: str
    goes_on: bool = True
    place: str = "run_dir"
    about: str = ""
    reads: tuple[str, ...] = ()
    means: tuple[str, ...] = ()
    bare: str = ""

    @property
    def keys(self) -> type:
        return _imported(self.config)

    def compose(self, overrides: Sequence[str]) -> Any:
        """The checked configuration of this command.

        Raises:
            ValueError: For an unknown, ineffective or invalid key.
        """
        from ddoq_ray.config.compose import load  # Hydra is not for a list of commands

        if self.bare and overrides and not _KEY.match(overrides[0]):
            overrides = [f"{self.bare}={overrides[0]}", *overrides[1:]]
        for key in (m.partition("=")[0] for m in self.means):
            if any(o.partition("=")[0].strip().lstrip("+") == key for o in overrides):
                raise ValueError(f"`ddoq-ray {self.name}` is one stage; leave {key}= out, or leave the command out")
        return load(self.keys, [*overrides, *self.means])

    def run(self, config: Any) -> None:
        _imported(self.main)(config)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _stage(name: str, words: str, reads: str) -> Command:
    return Command(
        name=name,
        words=words,
        config="ddoq_ray.config:RunConfig",
        main="ddoq_ray.pipeline:run",
        use=f"ddoq-ray {name} run_dir=FOLDER key=value ...",
        about=f"The stage `{name}` of a run: {words}. The stages before it must be done in run_dir; give the keys that "
        "they were given, which config.yaml there holds. The keys that it reads:",
        reads=("run_dir", *reads.split(), "overwrite", "cluster.log"),
        means=(f"stages=[{name}]",),
    )


_VIEWS = (
    "student.image_size protocol.epochs protocol.steps protocol.batch protocol.min_scale protocol.flip protocol.cutmix "
    "protocol.mixup protocol.shuffle_patches protocol.cutout protocol.val_crop "
)

RUN = Command(
    name="run",
    words="the configured stages, in order; what is done already is reused, what was cut off resumes",
    config="ddoq_ray.config:RunConfig",
    main="ddoq_ray.pipeline:run",
    use="ddoq-ray [run] key=value ...",
)
STAGE_COMMANDS = (
    _stage(
        "prepare",
        "any labelled images to shards, with a class list and an index",
        "seed dataset. max_bad_fraction cluster.address cluster.num_cpus cluster.reader.",
    ),
    _stage(
        "encode",
        "images to latents",
        "seed dataset. max_bad_fraction latents. prior. encoder. cluster.address cluster.num_cpus cluster.threads "
        "cluster.reader. cluster.encoder.",
    ),
    _stage(
        "quantize",
        "latents to centroids, counts and weights, for each method that has a codebook",
        "seed ipc small_class baselines images. dataset. latents. prior. quantizer. weights.scheme cluster.address "
        "cluster.num_cpus cluster.threads cluster.quantizer.",
    ),
    _stage(
        "synthesize",
        "centroids to images, and the images of every other method",
        "seed ipc small_class baselines images. rded. recovery. num_seeds dataset. prior. encoder.resize synthesizer. "
        "teacher. labels.workers weights.scheme cluster.address cluster.num_cpus cluster.threads cluster.wait_s "
        "cluster.give_up_s cluster.decoder. cluster.reader. cluster.teacher.",
    ),
    _stage(
        "label",
        "soft labels of seeded views of every image set, by the teacher",
        f"seed ipc baselines images. num_seeds dataset. prior. teacher. labels. weights.scheme {_VIEWS}"
        "cluster.address cluster.num_cpus cluster.threads cluster.wait_s cluster.give_up_s cluster.teacher.",
    ),
    _stage(
        "train",
        "students on every image set, by Ray Train",
        "seed ipc baselines images. num_seeds max_bad_fraction dataset. prior. encoder.resize teacher.path labels.mode "
        "weights. student. protocol. cluster.address cluster.num_cpus cluster.trainer.",
    ),
    _stage(
        "evaluate",
        "accuracy of the students on real validation images",
        "ipc baselines images. num_seeds max_bad_fraction dataset. prior. teacher.path weights.scheme student. "
        "protocol.val_crop cluster.address cluster.num_cpus cluster.threads cluster.evaluator.",
    ),
    _stage(
        "report",
        "results.json, the page and the table, with the codebooks measured on unseen images",
        "seed ipc baselines images. num_seeds dataset. latents. prior. encoder. teacher.path weights.scheme student. "
        "report. tracking cluster.address cluster.num_cpus cluster.threads cluster.reader. cluster.encoder.",
    ),
)
COMMANDS = (
    RUN,
    *STAGE_COMMANDS,
    Command(
        name="plan",
        words="what a run will write, move and take, and every problem that can be seen before it starts",
        config="ddoq_ray.config:RunConfig",
        main="ddoq_ray.commands.plan:main",
        use="ddoq-ray plan run_dir=FOLDER key=value ...",
        about="Reads the index of prepared data (data/ in run_dir, which `ddoq-ray prepare` makes) and the keys of the "
        "run that is meant, and prints images and classes, bytes of each stage's output, network traffic, memory of "
        "the quantizers, and times by the rates that `ddoq-ray calibrate` measured. Exit code 2 where something stands "
        "in the run's way, each with its words. Nothing is written. The keys are those of a run:",
    ),
    Command(
        name="compare",
        words="methods x IPC x students x teachers x seeds as one job, with paired intervals",
        config="ddoq_ray.config.compare:CompareConfig",
        main="ddoq_ray.pipeline:run",
        use="ddoq-ray compare methods=[...] ipcs=[...] students=[...] teachers=[...] num_seeds=N key=value ...",
        about="Data are prepared and encoded once, a codebook and images are made once for each method and IPC, labels "
        "once for each image set and teacher, and students are trained by cluster.trainer.groups at a time. What is "
        "finished is kept: the same command goes on where it was cut off, and more methods, IPCs or seeds leave the "
        "others as they are. report/ holds the page, results.json, table.md and table.csv. The other keys are those of "
        "a run:",
    ),
    Command(
        name="calibrate",
        words="the rates of a run's networks on this machine's device, measured in about a minute, for plan",
        config="ddoq_ray.config:RunConfig",
        main="ddoq_ray.commands.calibrate:main",
        use="ddoq-ray calibrate key=value ...",
        goes_on=False,
        about="Measures images a second of encoding, decoding, denoising, labelling and training with the networks and "
        "batches that the keys name, on the GPU where there is one, and adds them to cluster.calibration. The keys are "
        "those of a run:",
    ),
    Command(
        name="status",
        words="where a run stands, from the files of its run directory alone",
        config="ddoq_ray.config.run_directory:StatusConfig",
        main="ddoq_ray.commands.status:main",
        use="ddoq-ray status RUN",
        about="Prints who holds the run directory RUN, what each stage has done of what it has to do, and the last "
        "events. Reads small files only and joins no cluster, so that it answers while the run is at work.",
        bare="run_dir",
    ),
    Command(
        name="verify",
        words="every file of a run directory against its record; repair=true makes damaged ones anew",
        config="ddoq_ray.config.run_directory:VerifyConfig",
        main="ddoq_ray.commands.verify:main",
        use="ddoq-ray verify RUN [repair=true]",
        about="Reads every file of the run directory RUN once and compares it with the digest that was recorded when "
        "it was written. Each damaged or missing file is named, with what was expected and the command that makes it "
        "anew, and the exit code is 2; that of an undamaged run is 0. With repair=true damaged files are moved to "
        "set-aside/ in the run directory, and their stages run with the recorded configuration, which makes only these "
        "anew.",
        bare="run_dir",
    ),
    Command(
        name="train-prior",
        words="a small latent diffusion prior of your own, in diffusers' format, with what it is run by",
        config="ddoq_ray.config.network_training:TrainPriorConfig",
        main="ddoq_ray.commands.train_prior:main",
        use="ddoq-ray train-prior [dataset=digits] out=FOLDER key=value ...",
        place="out",
    ),
    Command(
        name="tune-decoder",
        words="a copy of a prior whose decoder keeps what a classifier sees; its latents and codebooks stay valid",
        config="ddoq_ray.config.network_training:TuneDecoderConfig",
        main="ddoq_ray.commands.tune_decoder:main",
        use="ddoq-ray tune-decoder source=PRIOR perceptual=CLASSIFIER out=FOLDER key=value ...",
        place="out",
    ),
    Command(
        name="train-teacher",
        words="a classifier of your own that labels views",
        config="ddoq_ray.config.network_training:TrainTeacherConfig",
        main="ddoq_ray.commands.train_teacher:main",
        use="ddoq-ray train-teacher [dataset=digits] out=FOLDER key=value ...",
        place="out",
    ),
    Command(
        name="import-teacher",
        words="a classifier that others trained (CIFAR ResNets, torchvision's, timm's) as a teacher",
        config="ddoq_ray.config.importing:ImportTeacherConfig",
        main="ddoq_ray.commands.import_teacher:main",
        use="ddoq-ray import-teacher source=FILE arch=NAME image_size=SIDE out=FOLDER key=value ...",
        goes_on=False,
        place="out",
    ),
)
BY_NAME = {command.name: command for command in COMMANDS}


def named(name: str) -> Command:
    """The command of that name.

    Raises:
        ValueError: There is none.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    near = difflib.get_close_matches(name.lower(), BY_NAME, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown command {name!r}{hint}; expected one of {', '.join(BY_NAME)}, or key=value")
