"""Records that are whole, and that another version of the package wrote."""

import copy
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ddoq_ray.execution.errors import user_error
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, NotAsWritten, checked, with_check
from ddoq_ray.storage.at_rest import damaged
from ddoq_ray.storage.codebook import PartRecord
from ddoq_ray.storage.fitting_facts import Facts, OtherVersion, misfit, misfit_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelGrid

WORDS = "was not written by this version of ddoq-ray"


@pytest.fixture
def latents(tmp_path: Path) -> Artifact:
    artifact = Artifact(Folder(str(tmp_path)) / "latents", "encode")
    artifact.begin({"seed": 0})
    artifact.finish(
        {"seed": 0}, seconds=1.5, items=3, unit="images", bytes=9, shards=0, refused=0, digest="d", kept=True
    )
    return artifact


def rewrite(artifact: Artifact, change: dict[str, Any], *, without: str = "") -> None:
    """A manifest of another version: its digest of itself is right."""
    row = {k: v for k, v in checked(artifact.folder.read(layout.MANIFEST)).items() if k != without}
    artifact.folder.publish_json(layout.MANIFEST, with_check(row | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": 3}, "its `identity` is 3; expected an object"),
        ({"items": None}, "its `items` is null; expected a whole number"),
        ({"seconds": "1"}, "its `seconds` is '1'; expected a number"),
        ({"kept": 1}, "its `kept` is 1; expected true or false"),
        ({"latent_shape": ["a"]}, "its `latent_shape` is 'a'; expected a whole number"),
        ({"files": {"a": 1}}, "its `files` is 1; expected an object"),
    ],
)
def test_a_fact_of_another_kind_is_told_by_name(latents: Artifact, change: dict[str, Any], words: str) -> None:
    rewrite(latents, change)
    for read in (latents.manifest, latents.require, lambda: latents.check({"seed": 0})):
        with pytest.raises(ValueError, match=WORDS) as error:
            read()
        assert words in str(error.value) and "overwrite=true" in str(error.value)
    (damage,) = damaged(Folder(latents.folder.uri.removesuffix("/latents")), {})
    assert damage.file == "latents/manifest.json" and words in damage.why


def test_a_fact_that_is_missing_is_told_where_it_is_asked_for(latents: Artifact) -> None:
    rewrite(latents, {}, without="digest")
    manifest = pickle.loads(pickle.dumps(latents.require()))  # as it comes through Ray
    assert manifest["items"] == 3 and manifest.get("digest") is None
    with pytest.raises(OtherVersion, match=f"{WORDS}: it has no `digest`"):
        manifest["digest"]
    assert [d.file for d in damaged(Folder(latents.folder.uri.removesuffix("/latents")), {})] == [
        "latents/manifest.json"
    ]
    with pytest.raises(OtherVersion) as error:
        manifest["identity"]["start"]
    assert "it has no `identity.start`" in str(user_error(error.value))  # words for the user, no traceback
    rewrite(latents, {}, without="identity")
    with pytest.raises(OtherVersion, match="no `identity`"):
        latents.check({"seed": 0})
    assert latents.begin({"seed": 0}, overwrite=True) == "new"


def test_a_newer_version_may_say_more(latents: Artifact) -> None:
    rewrite(latents, {"news": {"a": 1}, "environment": {"cpu": None}})
    assert latents.check({"seed": 0}) == "done"


def test_numbers_may_be_whole_and_values_of_students_that_diverged_are_null() -> None:
    whole = {"identity": {}, "seconds": 2, "best_top1_pct": None, "diverged": True}
    assert misfit(whole, "train") == "" == misfit(copy.deepcopy(whole), "no stage of ours")


def test_brackets_without_end_are_no_record() -> None:
    with pytest.raises(NotAsWritten, match="no JSON"):
        checked(b"[" * 200_000)


def test_records_of_parts_and_labels_are_looked_at_in_the_same_way() -> None:
    part = asdict(PartRecord("d", 1, 2, 3, [], {}, []))
    assert misfit_of(PartRecord, part) == ""
    assert misfit_of(PartRecord, part | {"bytes": None}) == "its `bytes` is null; expected a whole number"
    with pytest.raises(OtherVersion, match=r"no `grid\.epochs`"):
        LabelGrid.recorded(Facts({"grid": {"images": 3}}, "m.json")["grid"])
