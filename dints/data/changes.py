"""Whether files changed since a run began: a resumed run learns from the same ones, by content."""

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


def digest(path: str, noted: object) -> list:
    """Return size, time of change and digest of a file, read only where one of the two is new.

    Args:
        noted: an earlier result of this function; anything else counts as nothing.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; it was there before: put it back"
        ) from error
    state = [status.st_size, status.st_mtime_ns]
    if isinstance(noted, list) and len(noted) == 3 and noted[:2] == state:
        return noted
    return [*state, files.digest(path)]


def check_unchanged(
    folder: Path, cases: Sequence[Case], is_continued: bool, allow_changed: bool
) -> None:
    """Note the content of all files of the cases in the run's folder, or compare it with the notes.

    Args:
        is_continued: the run has begun before.
        allow_changed: log a change, and add it to ``data.json``, instead of refusing it.

    Raises:
        UserError: a file was replaced; its case is named.
    """
    stored = _read(folder / NAME) if is_continued else {}
    known, paths = stored.get("files", {}), _files(cases)
    with threads(8) as pool:
        noted = [(path, known.get(name)) for name, path in paths.items()]
        found = dict(zip(paths, pool.starmap(digest, noted), strict=True))
    changed = [name for name in found if name in known and known[name][-1] != found[name][-1]]
    changes = stored.get("changes", [])
    if changed:
        fault = (
            f"{len(changed)} files of the data are not as they were when the run began, for "
            f"example the {changed[0]}"
        )
        if not allow_changed:
            raise UserError(
                f"{fault} ({paths[changed[0]]}): put them back, give --allow_changed_data to "
                "continue with these, or --resume never to start afresh"
            )
        log.warning(
            "%s: the run continues with these, not to the result that it would have had", fault
        )
        changes = [*changes, changed]
    content = json.dumps({"files": found, "changes": changes}, indent=1)
    files.write_atomically(folder / NAME, content)


def _files(cases: Sequence[Case]) -> dict[str, str]:
    """Return the path of each file by its use, which stays when a dataset is moved."""
    found, seen = {}, Counter()
    for case in cases:
        seen[case.name] += 1  # folders may share names
        name = case.name if seen[case.name] == 1 else f"{case.name} ({seen[case.name]})"
        for number, image in enumerate(case.images):
            channel = f", channel {number}" if len(case.images) > 1 else ""
            found[f"image of {name}{channel}"] = image
        found[f"label of {name}"] = case.label
    return found


def _read(path: Path) -> dict:
    """Return the notes, or nothing where there are none or they are damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(note, list) and note for note in content["files"].values()):
            return content
    return {}
