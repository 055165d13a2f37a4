"""The folder of one stack's data: temporary and removed, or the user's and kept."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderInUse(Exception):
    """The folder cannot be used; says why."""


@contextmanager
def data_folder(chosen: Path | None) -> Iterator[Path]:
    """Raises FolderInUse: two NATS servers on one store destroy it."""
    if chosen is None:
        folder = Path(tempfile.mkdtemp(prefix="penstock-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
        return
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (chosen / "up.lock").open("w")
    except OSError as exc:
        raise FolderInUse(f"--data-dir {chosen}: {exc.strerror or exc}") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise FolderInUse(f"--data-dir {chosen}: in use by another penstock up") from exc
        yield chosen.resolve()
