"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dints import system
from dints.errors import UserError

DIGITS = 32  # of a digest
LONGEST_NAME = 140  # bytes: eCryptfs holds 143 with the dot, most file systems 255


def digest(path: str | Path) -> str:
    """Return the digest of a file's content, of `DIGITS` characters.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:DIGITS]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def internal_name(name: str, ending: str) -> str:
    """Return the name of a file of our own beside one called ``name``: a digest in its place where
    that is too long.
    """
    if len(os.fsencode(name + ending)) > LONGEST_NAME:
        name = hashlib.blake2b(os.fsencode(name)).hexdigest()[:DIGITS]
    return name + ending


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file at ``path`` by ``content``; text may hold names of files that are not
    UTF-8.
    """
    with replacing(path) as file:
        # Python holds such a byte as half a surrogate pair, which UTF-8 has no code for: it is
        # written as \udcff.
        file.write(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


@contextmanager
def replacing(path: str | Path, keep: Path | None = None) -> Iterator[io.BufferedWriter]:
    """Give a file to write into, which takes the place of ``path`` once it is whole and on the
    disk.

    Args:
        keep: what the file that was there is called from then on.
    """
    path = Path(path)
    partial = path.with_name(f".{internal_name(path.name, f'.{os.getpid()}.partial')}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            try:
                yield file
            except RuntimeError as error:
                # of which torch.save makes one that does not tell why
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        system.sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(path, error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def reason(path: Path, error: OSError) -> str:
    """Say why a file cannot be written: the system's own words name no file that stands where a
    folder should.
    """
    there = next((folder for folder in path.parents if os.path.lexists(folder)), path.parent)
    return (
        f"{there} is a file: give a folder"
        if os.path.isfile(there)
        else error.strerror or str(error)
    )


def check_folder(folder: Path, flag: str) -> None:
    """Make a folder and write into it, before work begins that would be lost; ``flag`` is what
    names it.
    """
    probe = folder / f".probe.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {reason(probe, error)}") from error


@contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock on the file at ``path``, which is made if need be; it ends with the process that
    holds it.

    Raises:
        BlockingIOError: another process, or another part of this one, holds it, and ``wait`` is not
            set.
        OSError: the file cannot be made.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise BlockingIOError(f"another process has locked {path}") from error
    try:
        yield
    finally:
        lock.release()
