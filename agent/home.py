"""The agent's folder: one agent at a time, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class StartError(Exception):
    """The agent cannot run; the message says what to do."""


@contextlib.contextmanager
def only_agent_in(home: Path) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go of it when the process dies. Raises StartError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "agent.lock").open("w")
    except OSError as error:
        raise StartError(f"cannot write in {home}: {error.strerror}; choose another --home") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another agent runs in {home}; stop it, or give --home") from None
        yield


def write_whole(path: Path, text: str) -> None:
    """Replace a file, on the disk when this returns; readers see the old or the new. Raises OSError."""
    fresh = path.with_name(path.name + ".new")
    # Ours alone: node tokens and key hashes lie here.
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
