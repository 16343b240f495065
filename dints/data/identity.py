"""What a run learns from, by content: a run that goes on is to go on with the same files."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dints import files
from dints.data.listing import Case
from dints.errors import UserError
from dints.running.machine import threads

log = logging.getLogger(__name__)

NAME = "data.json"  # in a run's folder


def digest(path: str, noted: Sequence | None) -> list:
    """Return size, time of change and digest of a file's content; it is read only where one of the first two is new.

    Args:
        noted: what this returned before; anything else counts as nothing.
    """
    try:
        status = os.stat(path)
        state = [status.st_size, status.st_mtime_ns]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; it was there before: put it back") from error
    if isinstance(noted, list) and len(noted) == 3 and noted[:2] == state:
        return [*state, str(noted[-1])[: files.DIGITS]]  # older notes have longer ones
    return [*state, files.digest(path)]


def check_identity(folder: Path, cases: Sequence[Case], is_continued: bool, allow_changed: bool) -> None:
    """Note the content of all files of the cases in the run's folder, or hold it against what is noted there.

    Args:
        is_continued: the run has begun before.
        allow_changed: go on all the same, with a line in the log, and the change in ``data.json``.

    Raises:
        UserError: a file was replaced; its case is named.
    """
    noted = _read(folder / NAME) if is_continued else {}
    known, of_files = noted.get("files", {}), _files(cases)
    with threads(8) as pool:
        found = dict(zip(of_files, pool.starmap(digest, [(p, known.get(k)) for k, p in of_files.items()]), strict=True))
    changed = [key for key in found if key in known and known[key][-1][: files.DIGITS] != found[key][-1]]
    changes = noted.get("changes", [])
    if changed:
        fault = f"{len(changed)} files of the data are not as they were when the run began, for example the {changed[0]}"
        if not allow_changed:
            raise UserError(
                f"{fault} ({of_files[changed[0]]}): put them back, give --allow_changed_data to continue with "
                "these, or --resume never to start afresh"
            )
        log.warning("%s: the run continues with these, not to the result that it would have had", fault)
        changes = [*changes, changed]
    files.write_atomically(folder / NAME, json.dumps({"files": found, "changes": changes}, indent=1))


def _files(cases: Sequence[Case]) -> dict[str, str]:
    """Return the path of each file, by what it is: a dataset may have been moved."""
    found, seen = {}, Counter()
    for case in cases:
        seen[case.name] += 1
        name = case.name if seen[case.name] == 1 else f"{case.name} ({seen[case.name]})"  # folders may share names
        for number, image in enumerate(case.images):
            found[f"image of {name}" + f", channel {number}" * (len(case.images) > 1)] = image
        found[f"label of {name}"] = case.label
    return found


def _read(path: Path) -> dict:
    """Return what was noted; nothing of a run that began before there were notes, or where they are damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        notes = content.get("files") if isinstance(content, dict) else None
        if isinstance(notes, dict) and all(isinstance(note, list) and note for note in notes.values()):
            return content
    return {}
