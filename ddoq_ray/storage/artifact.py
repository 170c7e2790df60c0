"""A stage's output: one manifest, and the rule for resuming.

A stage's life: `Artifact.begin(identity)` says whether its output is `done` (a manifest with the same identity),
`open` (begun with the same identity and cut off) or new; the stage publishes its files; `Artifact.finish` writes
``manifest.json`` last. Another identity in the same place is an error that names the differing keys; with
`overwrite` the output that differs is removed and made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder

Status = Literal["new", "open", "done"]


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def digest_of(value: Any) -> str:
    """sha256 (hex) of bytes, or of the canonical JSON of anything else."""
    data = value if isinstance(value, bytes) else canonical(value).encode()
    return hashlib.sha256(data).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for each leaf in which two nested mappings differ."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif canonical(a) != canonical(b):
            lines.append(f"{name}: {canonical(a)} there, {canonical(b)} now")
    return lines


def _part(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recorded identity what `asked` has keys for, nested mappings too."""
    part = {}
    for key, value in asked.items():
        there = recorded.get(key)
        part[key] = _part(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else there
    return part


class Artifact:
    """A stage's output folder with its `started.json` and `manifest.json`."""

    def __init__(self, folder: Folder, stage: str, *, command: str | None = None) -> None:
        """`stage` is the word in its manifest; `command` the stage's command, where that is another word."""
        self.folder = folder
        self.stage = stage
        self.command = command or stage

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished output; None when there is none."""
        try:
            return self.folder.read_json(layout.MANIFEST)
        except FileNotFoundError:
            return None

    def _recorded(self) -> tuple[dict[str, Any] | None, Status]:
        manifest = self.manifest()
        if manifest is not None:
            return manifest["identity"], "done"
        try:
            return self.folder.read_json(layout.STARTED)["identity"], "open"
        except FileNotFoundError:
            return None, "new"

    def check(self, identity: Mapping[str, Any], *, partial: bool = False) -> Status:
        """Compare what is there with what is wanted, as far as `identity`'s keys go; write nothing.

        Args:
            partial: The identity is what is known so far: nested mappings, too, are compared as far as its keys go.

        Raises:
            ValueError: When the folder holds the output of another configuration or of other inputs.
        """
        recorded, status = self._recorded()
        if recorded is None:
            return "new"
        there = _part(recorded, identity) if partial else {k: recorded.get(k) for k in identity}
        lines = differences(there, identity)
        if lines:
            raise ValueError(
                f"{self.folder.uri} holds the {self.stage} stage of another configuration:\n  "
                + "\n  ".join(lines[:12])
                + "\nTo go on with what is there, give the keys that it was made with, a single stage's too (the run "
                "directory's config.yaml holds them: `path: x` below `dataset:` is dataset.path=x). Else use another "
                "run_dir, or overwrite=true to make this stage and all after "
                "it anew."
            )
        return status

    def begin(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> Status:
        """`check`, then record that this identity has begun. With `overwrite`, an output that differs goes first."""
        try:
            status = self.check(identity)
        except ValueError:
            if not overwrite:
                raise
            self.folder.remove()
            status = "new"
        if status == "new":
            self.folder.publish_json(layout.STARTED, {"stage": self.stage, "identity": identity})
        return status

    def finish(self, identity: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Publish the manifest: the identity, its digest, and facts such as seconds, items, bytes and digest.

        The output is complete then, so what killed or late writers left behind is removed first.
        """
        self.folder.sweep()
        manifest = {"stage": self.stage, "identity": identity, "identity_digest": digest_of(identity), **facts}
        self.folder.publish_json(layout.MANIFEST, manifest)
        return manifest

    def done(self, identity: Mapping[str, Any]) -> bool:
        """Whether the output of exactly this identity is finished; write nothing, raise nothing."""
        recorded, status = self._recorded()
        return status == "done" and recorded is not None and not differences(recorded, identity)

    def require(self) -> dict[str, Any]:
        """The manifest, or a clear error that says which stage to run first."""
        manifest = self.manifest()
        if manifest is None:
            raise ValueError(
                f"{self.folder.uri} is not finished: run the {self.command} stage first (ddoq-ray {self.command} ...)"
            )
        return manifest
