"""What stages ask for, compared with machines: pure, by hand-counted cases."""

from __future__ import annotations

import pytest

from ddoq_ray.config.compose import load_config
from ddoq_ray.pipeline import steps
from ddoq_ray.stages.demands import fits, plan, table
from ddoq_ray.stages.step import Ask

ROOM = {"memory": 8.0 * 2**30}
TWO = [{"CPU": 2.0} | ROOM]


def test_the_default_run_fits_two_cpus_as_it_is() -> None:
    config = load_config()
    assert plan(config, steps(config), TWO, may_grow=False) == (config, [])


@pytest.mark.parametrize(
    ("overrides", "nodes", "words"),
    [
        (["cluster=gpu", "cluster.address=local"], TWO, ["1 encoder of 4 CPU and 1 GPU", "0 GPU in all"]),
        (["cluster=gpu"], [{"CPU": 4.0, "GPU": 1.0} | ROOM], ["1 reader of 1 CPU", "4 CPU in all", "num_cpus"]),
        (["cluster.trainer.workers=2"], [{"CPU": 1.0} | ROOM], ["2 trainers of 1 CPU", "cluster.trainer.workers"]),
        (["cluster.quantizer.num_cpus=1"], TWO, ["2 quantizers of 1 CPU", "cluster.quantizer.num_cpus"]),
        (
            ["cluster.quantizer.num_gpus=1", "cluster.encoder.num_gpus=1"], [{"CPU": 8.0, "GPU": 1.0} | ROOM],
            ["quantizers of 1 GPU", "1 GPU in all", "cluster.quantizer.num_gpus"],
        ),
        (
            ["cluster.encoder.num_cpus=1", "cluster.reader.num_cpus=1"], [{"CPU": 1.0} | ROOM],
            ["1 encoder of 1 CPU and 1 reader of 1 CPU", "1 CPU in all", "cluster.encoder.num_cpus"],
        ),
        (["cluster.decoder.num_cpus=4"], [{"CPU": 2.0} | ROOM] * 2, ["no single node has 4 CPU", "2 nodes: 2 CPU,"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_the_key(
    overrides: list[str], nodes: list[dict[str, float]], words: list[str]
) -> None:
    config = load_config(overrides)
    with pytest.raises(ValueError) as error:
        plan(config, steps(config), nodes, may_grow=False)
    assert all(word in str(error.value) for word in words), error.value
    same, told = plan(config, steps(config), nodes, may_grow=True)  # a cluster may grow: it is said, and waited for
    assert same == config and all(line.startswith("waiting ") for line in told) and told


def test_pools_are_fitted_and_said() -> None:
    asked = load_config(["encoder.workers=20", "synthesizer.max_workers=9", "labels.workers=8"])
    config, told = plan(asked, steps(asked), TWO, may_grow=False)
    assert (config.encoder.workers, config.synthesizer.max_workers, config.labels.workers) == (7, 2, 2)
    assert any("encoder.workers=20 has room for 7" in line for line in told) and len(told) == 3
    assert plan(config, steps(config), TWO, may_grow=False) == (config, [])


def test_groups_of_students_are_fitted_whole() -> None:
    keys = ["cluster.trainer.groups=4", "cluster.trainer.workers=2", "stages=[train]"]
    asked = load_config(keys)
    config, told = plan(asked, steps(asked), [{"CPU": 5.0} | ROOM], may_grow=False)
    assert config.cluster.trainer.groups == 2 and told[0].endswith("that many are started")
    assert "cluster.trainer.groups=4 has room for 2" in told[0]
    with pytest.raises(ValueError, match=r"2 trainers of 1 CPU; .*lower cluster\.trainer\.workers"):
        plan(asked, steps(asked), [{"CPU": 1.0} | ROOM], may_grow=False)


def test_workers_are_never_cut_across_nodes() -> None:
    assert fits([Ask("a", 2, 1.5)], [{"CPU": 2.0}] * 2)
    assert not fits([Ask("a", 2, 1.5)], [{"CPU": 2.9}])
    assert fits([Ask("cpu", 1, 2), Ask("gpu", 1, 2, 1.0)], [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}])


def test_only_wanted_stages_count() -> None:
    config = load_config(["stages=[prepare,encode]"])
    assert set(table(config, steps(config))) == {"prepare", "encode"}
