"""How often a quantizer actor has died at its work without getting on: the end of a run that would wait for ever.

Ray restarts a quantizer without limit, and that is right while it gets on: nodes come and go. One that dies of its own
work, mostly of too little memory, would die again and again behind a progress line that stands still. A restarted actor
therefore keeps a note beside its snapshot until it publishes something: how often it has died, and whether it is at
work (a node that is taken away under an actor that waits for encoders proves nothing). The third death is the last. An
actor that was never restarted writes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ddoq_ray.execution.workers import MAX_DEATHS
from ddoq_ray.storage.folder import Folder


class Deaths:
    """The note of one actor; it belongs to one driver, since the same command again deserves new trials."""

    def __init__(self, codebook: Folder, name: str, driver: str) -> None:
        self.codebook, self.name, self.driver = codebook, name, driver
        self._note: dict[str, Any] | None = None  # while this actor is watched

    def restarted(self) -> int:
        """Count the death before this start; how many there were, at work and with nothing published between."""
        note: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # damaged or gone: counted from one
            note = self.codebook.read_json(self.name)
        if note.get("driver") != self.driver:
            note = {"driver": self.driver, "deaths": 0, "at_work": True}
        self._note = note | {"deaths": note["deaths"] + bool(note["at_work"]), "at_work": True}
        self._write()
        return int(self._note["deaths"])

    def work(self, at_work: bool) -> None:
        """The actor begins or ends a piece of work."""
        if self._note is not None and self._note["at_work"] != at_work:
            self._note["at_work"] = at_work
            self._write()

    def got_on(self) -> None:
        """Some of what was done since the start is published: the actor is as one that never died."""
        if self._note is not None:
            self._note = None
            self.codebook.remove(self.name)

    def _write(self) -> None:
        self.codebook.publish_json(self.name, self._note)


def too_many(deaths: int) -> bool:
    return deaths >= MAX_DEATHS


def last_words(classes: Sequence[int], need: int, *, streaming: bool) -> str:
    """Why the run ends here, and what to change.

    Args:
        classes: Ascending, those of the actor that are not finished.
        need: Bytes that the actor was planned to need.
        streaming: Whether its algorithm is a stream, or wants classes whole.
    """
    shown = f"{classes[0]} to {classes[-1]}" if len(classes) > 1 else ", ".join(map(str, classes))
    keys = (
        "quantizer.buffer=ipc or a smaller ipc" if streaming else "quantizer=clvq, or a smaller quantizer.max_class_gb"
    )
    return (
        f"the quantizer of classes {shown} ({len(classes):,} in all) died {MAX_DEATHS} times without getting on, most "
        f"likely for want of memory: it was planned to need {need / (1 << 30):.2f} GiB. Choose more "
        f"quantizer.num_shards (fewer classes each), {keys}, or a node with more memory; see the actor's log for the "
        "cause. The same command goes on from what is published"
    )
