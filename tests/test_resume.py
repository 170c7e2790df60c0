"""The fault promise, through the real command: killed anywhere, the same command goes on and ends in the same bytes.

A run is killed with SIGKILL three times, in encode, in quantize and in synthesize, each time when some of the stage's
units are published and some are not; a second run is left alone. The driver owns its Ray, so its death takes the whole
local cluster along. Of the default suite, `tests/chaos/test_matrix.py` kills one in encode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.deaths import TIMEOUT, Stamp, kill_when, stamps, start, wait_gone

SHARDS, PER_SHARD, IPC, TARS = 8, 15, 4, 20


def overrides(corpus: Path, run: Path) -> list[str]:
    return [
        f"run_dir={run}", "experiment=digits",
        "dataset=webdataset", f"dataset.path={corpus}",
        f"ipc={IPC}", "stages=[prepare,encode,quantize,synthesize]", "baselines=[]",
        "encoder.chunk_samples=1", "encoder.batch=1", "quantizer.snapshot_every=1",
        f"synthesizer.shard_images={10 * IPC // TARS}", "synthesizer.max_workers=1",
    ]  # fmt: skip


def finish(corpus: Path, run: Path, log: Path) -> None:
    process, mark = start(overrides(corpus, run), log)
    try:
        assert process.wait(TIMEOUT) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    wait_gone(mark)


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def content(run: Path) -> dict[str, bytes]:
    names = ("latents/shard-*/*.parquet", "codebook/part-*.parquet", "images/*.tar")
    return {str(p.relative_to(run)): p.read_bytes() for pattern in names for p in sorted(run.glob(pattern))}


@dataclass
class History:
    """A run killed three times and then left to end; what was there after each kill, and later."""

    run: Path
    kept: dict[str, Stamp] = field(default_factory=dict)  # stage -> its finished units when it was killed
    after: dict[str, Stamp] = field(default_factory=dict)  # the same units at the end
    events: dict[str, list[str]] = field(default_factory=dict)  # stage -> what the run said of each part of the history


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[..., Path]) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shards", SHARDS, PER_SHARD)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run left alone."""
    base = tmp_path_factory.mktemp("alone")
    finish(corpus, base / "run", base / "log")
    return base / "run"


@pytest.fixture(scope="module")
def killed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    base = tmp_path_factory.mktemp("killed")
    run, log = base / "run", base / "log"
    history = History(run)

    def seen(stage: str, *patterns: str) -> None:
        history.kept[stage] = stamps(run, *patterns)
        history.events[stage] = [e["event"] + " " + e.get("stage", "") for e in events(run)]

    kill_when(lambda: any(run.glob("latents/shard-*/done.json")), overrides(corpus, run), log)
    seen("encode", "latents/shard-*/done.json")
    for name in list(history.kept["encode"]):
        history.kept["encode"] |= stamps(run, f"{Path(name).parent}/*.parquet")

    kill_when(
        lambda: (run / "latents/manifest.json").exists() and any(run.glob("codebook/part-*.parquet")), corpus, run, log
    )
    seen("quantize", "latents/**/*.parquet", "latents/**/*.json", "codebook/part-*.parquet")

    kill_when(lambda: any(run.glob("images/*.tar")), overrides(corpus, run), log)
    seen("synthesize", "codebook/*", "images/*.tar")

    finish(corpus, run, log)
    for stage, kept in history.kept.items():
        history.after[stage] = {n: s for n, s in stamps(run, "**/*").items() if n in kept}
    history.events["end"] = [e["event"] + " " + e.get("stage", "") for e in events(run)]
    yield history


@pytest.mark.slow
def test_the_kills_were_in_the_middle(killed: History) -> None:
    shards = [n for n in killed.kept["encode"] if n.endswith("done.json")]
    assert 1 <= len(shards) < SHARDS
    parts = [n for n in killed.kept["quantize"] if n.startswith("codebook/part-")]
    assert 1 <= len(parts) <= 10 and "stage finished quantize" not in killed.events["quantize"]
    assert 1 <= sum(n.endswith(".tar") for n in killed.kept["synthesize"]) < TARS
    assert killed.events["encode"] == ["run started ", "stage finished prepare"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode", "quantize", "synthesize"])
def test_what_was_finished_is_not_made_again(killed: History, stage: str) -> None:
    assert killed.kept[stage] and killed.after[stage] == killed.kept[stage]


@pytest.mark.slow
def test_each_stage_finished_once(killed: History) -> None:
    finished = [e.removeprefix("stage finished ") for e in killed.events["end"] if e.startswith("stage finished")]
    assert finished == ["prepare", "encode", "quantize", "synthesize"]
    assert killed.events["end"].count("run started ") == 4 and killed.events["end"][-1] == "run finished "


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(killed: History, reference: Path) -> None:
    expected, made = content(reference), content(killed.run)
    assert len([n for n in expected if n.endswith(".tar")]) == TARS
    assert sorted(made) == sorted(expected)
    assert [n for n in expected if made[n] != expected[n]] == []


@pytest.mark.slow
def test_nothing_temporary_is_left(killed: History) -> None:
    assert not (killed.run / "codebook" / "snapshots").exists()
    for manifest in ("latents", "codebook", "images"):
        assert json.loads((killed.run / manifest / "manifest.json").read_text())["identity_digest"]


@pytest.mark.slow
def test_the_same_command_on_a_finished_run_reuses_everything(corpus: Path, reference: Path) -> None:
    patterns = ("data/**/*.tar", "data/*shards.json", "latents/**/*", "codebook/*", "images/*")
    before, told = stamps(reference, *patterns), len(events(reference))
    finish(corpus, reference, reference.parent / "again")
    assert stamps(reference, *patterns) == before
    assert [e["event"] for e in events(reference)[told:]] == ["run started", "run finished"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_the_number_of_quantizers_does_not_change_the_codebook(reference: Path) -> None:
    import dataclasses

    from support.latent_logs import planned

    from ddoq_ray.config.compose import load_config
    from ddoq_ray.execution.networks import Networks
    from ddoq_ray.storage.folder import Folder

    run = Folder(str(reference))
    encoded = run.read_json("latents/manifest.json")
    prior_id, shape = encoded["identity"]["prior"], tuple(encoded["latent_shape"])
    facts = Networks(prior_id, shape, 16, None, 10, None, None, None, 0, 0, {})
    config = load_config([f"ipc={IPC}", "baselines=[]"])
    expected = {p.name: p.read_bytes() for p in reference.glob("codebook/part-*.parquet")}
    for number in (1, 3):
        place = f"with-{number}"
        fewer = dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, num_shards=number))
        quantizers = planned(fewer, run, place, facts)
        try:
            quantizers.launch()
            for shard in range(SHARDS):
                quantizers.shard_done(shard)
            quantizers.finish()
        finally:
            quantizers.close()
        assert {p.name: p.read_bytes() for p in reference.glob(f"{place}/codebook/part-*.parquet")} == expected
