"""What a signal or a fork must not come amid: imports of Numba, and compilations.

Done by half, either breaks every later call, in the process or in its child.
"""

from __future__ import annotations

import contextlib
import logging  # noqa: F401  # before the hooks below: its own, which takes a lock that Numba needs, is to come after
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

lock = threading.RLock()  # whoever holds it is waited for by a fork
forked = False  # whether this is a forked child: threads, other than the one that forked, did not come along

Handler = Callable[[int, FrameType | None], object]


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Let signals and forks wait for the end of it.

    A signal's handler may raise, as Ctrl-C's does: that would leave a module or Numba's registries half done, or be
    printed and dropped where LLVM calls Python back.
    """
    with lock:
        release = _held_signals()
        try:
            yield
        finally:
            with contextlib.ExitStack() as handlers:
                for number, handler in reversed(release()):
                    handlers.callback(handler, number, None)


def _held_signals() -> Callable[[], list[tuple[int, Handler]]]:
    """Let signals wait whose handlers are Python's; what is returned ends that, and gives those that came meanwhile."""
    heard: dict[int, None] = {}
    usual: dict[int, Handler] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        heard[number] = None

    def release() -> list[tuple[int, Handler]]:
        for number, handler in usual.items():
            if signal.getsignal(number) is hear:  # or else somebody has set another one
                signal.signal(number, handler)
        return [(number, usual[number]) for number in heard]

    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                try:
                    signal.signal(number, hear)
                except ValueError:  # in an interpreter that is not the main one
                    break
                usual[number] = handler
    return release


_release: Callable[[], list[tuple[int, Handler]]] = list


def _before_fork() -> None:
    # What a handler raised in here would be printed and dropped, and the fork would not wait.
    global _release
    release = _held_signals()
    lock.acquire()
    _release = release


def _in_parent() -> None:
    heard = _release()
    lock.release()
    for number, _ in heard:  # once the fork is over
        threading.Timer(0.01, signal.raise_signal, [number]).start()


def _in_child() -> None:
    global forked
    forked = True
    _release()
    lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
