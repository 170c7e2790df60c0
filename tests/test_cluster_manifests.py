"""cluster/: the manifests against the schemas of what reads them, the Slurm script by a run of its body."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from ddoq_ray.execution import signals

CHECKOUT = Path(__file__).resolve().parent.parent
CLUSTER = CHECKOUT / "cluster"
CRDS = Path(os.environ.get("DDOQ_ASSETS", CHECKOUT.parent / "shared/assets")) / "kuberay-crds"


def documents(name: str) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all((CLUSTER / name).read_text()) if d]


def of_kind(name: str, kind: str) -> dict[str, Any]:
    return next(d for d in documents(name) if d["kind"] == kind)


# KubeRay's own definitions.


def strict(schema: Any) -> Any:
    """A CRD's schema under which an unknown key is an error, as `kubectl apply` with strict validation has it."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-")}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not free:
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def checks() -> Callable[[dict[str, Any]], list[str]]:
    if not CRDS.is_dir():
        pytest.skip(f"needs KubeRay's definitions in {CRDS} (DDOQ_ASSETS)")
    made = {}
    for file in ("rayclusters", "rayjobs"):
        crd = yaml.load((CRDS / f"{file}.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        made[crd["spec"]["names"]["kind"]] = jsonschema.Draft4Validator(schema)

    def errors(document: dict[str, Any]) -> list[str]:
        found = made[document["kind"]].iter_errors(document)
        return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found]

    return errors


@pytest.mark.assets
@pytest.mark.parametrize(("file", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_kuberay_takes_the_manifests(checks: Callable[[dict[str, Any]], list[str]], file: str, kind: str) -> None:
    assert checks(of_kind(file, kind)) == []


@pytest.mark.assets
def test_planted_errors_are_caught(checks: Callable[[dict[str, Any]], list[str]]) -> None:
    job = of_kind("rayjob.yaml", "RayJob")

    def planted(change: Callable[[dict[str, Any]], Any]) -> list[str]:
        bad = copy.deepcopy(job)
        change(bad["spec"])
        return checks(bad)

    cases = (
        (lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplica=0), "minReplica"),  # a key misspelt
        (lambda s: s["rayClusterSpec"]["workerGroupSpecs"][1].pop("template"), "'template' is a required property"),
        (lambda s: s["rayClusterSpec"]["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
    )
    for change, words in cases:
        found = planted(change)
        assert len(found) == 1 and words in found[0], found


# What they promise.


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_cluster_is_as_the_readme_says(name: str) -> None:
    document = documents(name)[0]
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"]["mode"] == "token" and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    limits = {name: g["template"]["spec"]["containers"][0]["resources"]["limits"] for name, g in groups.items()}
    assert {name: "nvidia.com/gpu" in of for name, of in limits.items()} == {"cpu": 0, "gpu": 1, "gpu-spot": 1}
    assert groups["gpu-spot"]["minReplicas"] == 0
    for group in (spec["headGroupSpec"], *groups.values()):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["containers"][0]["volumeMounts"][0]["name"] == "shared"
        assert group["template"]["metadata"]["labels"]["app"] == "ddoq-ray", "the network policy holds for it"
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]} == {"/shared", "/tmp"}
        assert "ephemeral-storage" in pod["containers"][0]["resources"]["requests"]
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    seconds = {e["name"]: float(e["value"]) for e in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert seconds > signals.GRACE_SECONDS, "`ray job stop` would kill a run that is on its way to its last words"
    kept = spec["headGroupSpec"]["template"]["metadata"]["annotations"]
    assert kept["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false", "the driver is there"


def test_the_network_policy_lets_in_the_operator_and_what_reads_metrics() -> None:
    policy = of_kind("raycluster.yaml", "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app": "ddoq-ray"}
    ports = {
        rule["from"][0]["podSelector"]["matchLabels"].get("app.kubernetes.io/name", "own"): {
            port["port"] for port in rule.get("ports", [])
        }
        for rule in policy["ingress"]
    }
    assert ports == {"own": set(), "kuberay-operator": {8265}, "prometheus": {8080, 44217, 44227}}


def test_both_manifests_have_the_same_cluster() -> None:
    assert (
        of_kind("raycluster.yaml", "RayCluster")["spec"] == of_kind("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]
    )


def test_the_job_runs_what_composes_and_ends() -> None:
    from ddoq_ray.config.compose import load_config

    spec = of_kind("rayjob.yaml", "RayJob")["spec"]
    python, _, module, *words = shlex.split(spec["entrypoint"])
    assert (python, module) == ("python", "ddoq_ray")
    assert load_config(words).cluster.address == "auto"
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0


def test_rays_launcher_takes_its_file() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    # Ray itself gives /dev/shm as much as its store takes of each machine; what is given here would be for all alike.
    assert not any("--shm-size" in option for option in config["docker"]["run_options"])
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 3}, schema)


def test_no_token_and_no_root_in_what_is_committed() -> None:
    for file in CLUSTER.iterdir():
        text = file.read_text()
        assert not re.search(r"AUTH_TOKEN=[0-9a-f]{8}|[0-9a-f]{32}", text), file
    docker = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^USER (\w+)", docker, re.M)[-1] == "ray"
    for source in re.findall(r"^COPY (.*) \S+$", docker, re.M):
        assert all((CHECKOUT / name).exists() for name in source.split()), source


# The Slurm script.

SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$TOLD"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$TOLD"
[ "$1" = requeue ] && exit 0
[ "$1 $2" = "show hostnames" ] && tr , '\\n' <<< "$3"
"""
HOSTNAME = """#!/usr/bin/env bash
echo "127.0.0.1 10.0.0.1"
"""
# A head listens on its port, as a Ray head does; a node stays until it is ended.
RAY = """#!/usr/bin/env {python}
import os, signal, socket, sys
with open(os.environ["TOLD"], "a") as f:
    print("ray", *sys.argv[1:], "TOKEN" if len(os.environ["RAY_AUTH_TOKEN"]) == 64 else "none", file=f)
port = next((int(a.partition("=")[2]) for a in sys.argv if a.startswith("--port=")), 0)
listening = socket.create_server(("127.0.0.1", port))
signal.pause()
"""
# A run outlasts the start of the second node, which the script does not wait for.
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && exec {python} "$@"
trap 'echo "run stopped" >> "$TOLD"; kill $! 2> /dev/null; exit 143' TERM
echo "python $*" >> "$TOLD"
until grep -q -- --nodelist=two "$TOLD"; do sleep 0.05; done
[ -n "$RUN_SECONDS" ] && {{ sleep "$RUN_SECONDS" & wait $!; }}
exit "$RUN_CODE"
"""


def slurm(tmp_path: Path, code: int, seconds: str = "") -> tuple[subprocess.Popen[str], Path]:
    """The script's body on a scheduler of two nodes that are both this machine."""
    bin_, told = tmp_path / "bin", tmp_path / "told"
    bin_.mkdir()
    told.touch()
    scripts = {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME, "ray": RAY, "python": PYTHON}
    for name, text in scripts.items():
        path = bin_ / name
        path.write_text(text.format(python=sys.executable) if name in ("ray", "python") else text)
        path.chmod(0o755)
    env = os.environ | {
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "TOLD": str(told),
        "RUN_CODE": str(code),
        "RUN_SECONDS": seconds,
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_GPUS_ON_NODE": "2",
    }
    script = [str(CLUSTER / "slurm.sh"), "ipc=1", "run_dir=/shared/run", "dataset.path=/shared/a b/{0..3}.tar"]
    return subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), told


@pytest.mark.processes
@pytest.mark.parametrize("code", [0, 2])
def test_slurm_starts_a_head_and_a_node_and_ends_with_the_runs_code(tmp_path: Path, code: int) -> None:
    process, told = slurm(tmp_path, code)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    lines = told.read_text().splitlines()
    port = 20000 + os.getpid() % 20000
    asked = "--block --disable-usage-stats --num-cpus=3 --num-gpus=2"
    nodes = [line for line in lines if line.startswith("ray start")]
    assert nodes[0].startswith(f"ray start {asked} --head --node-ip-address=127.0.0.1 --port={port}")
    assert len(nodes) <= 2 and all(f"--address=127.0.0.1:{port} TOKEN" in node for node in nodes[1:])
    steps = [line for line in lines if line.startswith("srun") and "ray start" in line]
    assert any("--nodelist=two" in step for step in steps)
    assert all("--cpus-per-task=3" in step for step in steps), "Slurm would give all of a node's Ray one core"
    assert not any(line.startswith("scontrol requeue") for line in lines)
    run = next(line for line in lines if line.startswith("python -m ddoq_ray"))
    words = "ipc=1 run_dir=/shared/run dataset.path=/shared/a b/{0..3}.tar"
    assert run == f"python -m ddoq_ray {words} cluster.address=127.0.0.1:{port}"
    assert not re.search(r"[0-9a-f]{64}", "\n".join(lines) + out), "the token is on a command line or in the log"


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["time", "scancel"])
def test_a_signal_ends_the_run_in_words_and_a_job_whose_time_is_over_is_queued_again(
    tmp_path: Path, number: signal.Signals
) -> None:
    process, told = slurm(tmp_path, 0, seconds="60")
    deadline = time.monotonic() + 60
    while "python -m ddoq_ray" not in told.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "run stopped" in told.read_text()
    queued = f"scontrol requeue {os.getpid()}" in told.read_text().splitlines()
    assert queued == ("it is put in the queue again" in out) == (number == signal.SIGUSR1)


def test_slurm_gives_whole_nodes_warns_in_time_and_keeps_a_job_that_loses_a_node() -> None:
    text = (CLUSTER / "slurm.sh").read_text()
    options = re.findall(r"^#SBATCH (--[^\n#]+)$", text, re.M)
    for option in ("--exclusive", "--mem=0", "--no-kill", "--requeue", "--open-mode=append", "--signal=B:USR1@180"):
        assert option in options
    assert text.count("#SBATCH") == len(options), "a word behind an option is one more option to Slurm"


@pytest.mark.processes
def test_slurm_without_keys_says_how(tmp_path: Path) -> None:
    done = subprocess.run([CLUSTER / "slurm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "run_dir=FOLDER" in done.stderr


@pytest.mark.processes
def test_shellcheck_finds_nothing() -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run([checker, CLUSTER / "slurm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
