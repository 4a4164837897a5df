"""A lock on a directory, which says who holds it and ends with the process that holds it."""

import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FILE = ".lock"


class DirectoryLock:
    """One process at a time works in a directory.

    The system lets go of the lock when its process ends, however it ends. Where a file system has no locks, there is
    none.

    Args:
        directory: the directory, which is made by :meth:`acquire`.

    >>> import tempfile
    >>> lock = DirectoryLock(tempfile.mkdtemp())
    >>> lock.acquire()
    >>> lock.check()
    >>> lock.release()
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._file: int | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            BlockingIOError: when another process holds it; the message says which one.
            OSError: when the directory cannot be made or written to.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = os.open(self.directory / _FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.directory}: {error.strerror}. Give another path") from error
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 10_000).decode(errors="replace")
            os.close(file)
            raise BlockingIOError(
                f"{_described(owner)} is working in {self.directory}. Wait for it, end it, or give another directory."
            ) from None
        except OSError:  # a file system without locks
            pass
        self._file = file
        if not self._is_in_place():  # the owner before removed the file after it was opened here
            os.close(file)
            self._file = None
            self.acquire()
            return
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(timezone.utc).isoformat()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(about).encode(), 0)

    def check(self) -> None:
        """Checks that the directory is still where it was.

        Raises:
            FileNotFoundError: when it was removed or renamed; the message says where it is now, if that is known.
        """
        if self._file is None or self._is_in_place():
            return
        try:  # on Linux
            place = Path(os.readlink(f"/proc/self/fd/{self._file}")).parent
        except OSError:
            place = self.directory
        if place != self.directory.resolve() and (place / _FILE).exists():
            raise FileNotFoundError(
                f"{self.directory} was renamed to {place} during training. What was written until then is there. "
                f"Continue with: pyrovae train --run {place} --resume"
            )
        raise FileNotFoundError(f"{self.directory} was removed or renamed during training. Train again, or restore it.")

    def release(self) -> None:
        """Lets go of the lock, and removes its file."""
        if self._file is None:
            return
        if self._is_in_place():
            (self.directory / _FILE).unlink()
        os.close(self._file)
        self._file = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.release()

    def _is_in_place(self) -> bool:
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.directory / _FILE))
        except FileNotFoundError:
            return False


def is_empty(directory: Path) -> bool:
    """Returns whether a directory holds nothing but a lock."""
    return all(entry.name == _FILE for entry in directory.iterdir())


def _described(owner: str) -> str:
    try:
        about = json.loads(owner)
        return f"process {about['pid']} on {about['host']}, since {about['since'][:19]} UTC,"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another process"
