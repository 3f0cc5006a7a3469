"""Kills at each write of a function, in a child process, so that nothing is cleaned up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

POINTS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "write")
KILLED = 9


def kills(work: Callable[[], object], prepare: Callable[[], None]) -> Iterator[int]:
    """Run `prepare` and then `work` in a child process that dies before its 1st, 2nd, … change of the file system.

    Yields:
        Number of the change, after each kill, until `work` completes.
    """
    number, ended = 0, False
    while not ended:
        number += 1
        prepare()
        child = os.fork()
        if child == 0:
            _die_before(number)
            try:
                work()
            except BaseException:
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), f"at change {number}: exit code {code}"
        ended = code == 0
        yield number


def _die_before(number: int) -> None:
    left = [number]

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return change(*arguments, **named)

        return call

    for name in POINTS:
        setattr(os, name, dying(getattr(os, name)))
