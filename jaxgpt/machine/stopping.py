"""Asking a run to end: SIGTERM, Ctrl-C, `Run.stop()`, or a callback that returns False.

Between two steps the loop sees that it was asked. An evaluation, a sample or a rollout is left at
once, since the state of the run does not change meanwhile. Where Python itself has to wait, in a
compiled program that takes longer than the grace period, a thread saves the state and ends the
process. Several processes leave nothing halfway: they would wait for each other.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """What is being computed is no longer wanted; nothing but `Stopping` catches it."""


class Stopping:
    """Whether the run is asked to end.

    Args:
        asked: set by whoever asks.
        grace: seconds from a signal to a saved checkpoint, at most.
    """

    def __init__(self, asked: threading.Event, grace: float) -> None:
        self.asked, self.grace = asked, grace
        self._inside = False
        self._lock = threading.Lock()
        self._save: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within, SIGTERM and the first Ctrl-C ask; the second Ctrl-C interrupts."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may
            return
        heard, told = socket.socketpair()
        told.setblocking(False)
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        # Is written to at once, also while Python waits for a compiled program.
        wakeup = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            told.close()  # ends the thread
            thread.join()
            heard.close()

    def attempt(self, compute: Callable[[], Any], save: Callable[[], None]) -> tuple[bool, Any]:
        """Computes what may be left when the run is asked to end: (whether it was left, result).

        Args:
            save: saves the run as it is now; called by another thread, before the process ends.
        """
        if jax.process_count() > 1:
            return False, compute()
        try:
            try:
                self._save, self._inside = save, True
                if self.asked.is_set():
                    return True, None
                return False, compute()
            finally:
                with self._lock:
                    self._inside = False
        except Stopped:
            return True, None

    def _ask(self, number: int, _: object) -> None:
        if self.asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked.set()
        if self._inside:
            self._inside = False  # one exception is enough
            raise Stopped

    def _listen(self, heard: socket.socket) -> None:
        """Waits for a signal, and then for the main thread, but not for ever."""
        while data := heard.recv(1):
            if data[0] not in SIGNALS:
                continue
            heard.settimeout(self.grace)
            try:
                while heard.recv(1):
                    pass
                return
            except TimeoutError:
                heard.settimeout(None)
            with self._lock:  # the main thread cannot go on from here
                if self._inside:
                    self._save()
                    sys.stderr.flush()
                    sys.stdout.flush()
                    os._exit(0)
