"""A look from beside: a thread that ends the run in words where what it sees will not mend itself."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from ddoq_ray.execution import signals


class Onlooker(ABC):
    """Looks again and again while the block runs, and ends it wherever it is: in Ray, in a library, in our own code.

    Attributes:
        error: What the block raises then; the command's exit code follows from it.
        code: That exit code, for a run that is held up in a library and is ended with its process.
        every_s: Seconds between two looks.
        words: Why the run is ended; empty while it is not.
    """

    error: ClassVar[type[Exception]]
    code: ClassVar[int]
    every_s: ClassVar[float]

    def __init__(self, own_session: bool) -> None:
        """`own_session`: the process is there for this run, and may be ended with it."""
        self.own_session, self.words = own_session, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=type(self).__name__, daemon=True)
        self._runs_in_main = threading.current_thread() is threading.main_thread()
        self._ended = contextlib.ExitStack()

    @abstractmethod
    def look(self) -> str:
        """Why the run is to be ended; empty while it is not."""

    def __enter__(self) -> Onlooker:
        self._ended.enter_context(signals.interruptible())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._ended.close()
        if self.words:  # of the interruption, whatever it became on its way
            raise self.error(self.words) from None

    def _watch(self) -> None:
        while not self._over.wait(self.every_s):
            words = self.look()
            if words and not self._over.is_set():
                self._end(words)
                return

    def _end(self, words: str) -> None:
        self.words = words
        if self._runs_in_main:
            signals.interrupt()
        if self.own_session and not self._over.wait(signals.GRACE_SECONDS):  # held up in a library
            signals.tell(f"ddoq-ray: error: {words}")
            signals.leave(self.code)
