"""The state of each case of a batch: a note a case, as ranks write at once, and ``run.json``."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dints import files
from dints.data.listing import Case
from dints.errors import UserError
from dints.inference.decision import MAPS

log = logging.getLogger(__name__)

NOTES, RUN = ".cases", "run.json"
OF_WHOLE_RUN = ("scores.csv", "report.html")  # written at a run's end, of all its cases


def precision_of_earlier(folder: Path, models: Sequence[str]) -> str | None:
    """Return the precision of an earlier batch in the folder by models of these digests, if any.

    On a CPU ``auto`` is measured, and another result would have all cases done again.
    """
    with suppress(OSError, ValueError, LookupError, TypeError):
        settings = json.loads((folder / RUN).read_text(encoding="utf-8"))["settings"]
        if settings["models"] == list(models) and settings["precision"] in ("fp32", "bf16"):
            return settings["precision"]
    return None


@dataclass(frozen=True)
class Records:
    """Notes of a batch, in its folder.

    Attributes:
        settings: all that a segmentation depends on beside its image, as plain values.
        facts: more for readers of ``run.json``, on which no segmentation depends.
    """

    folder: Path
    settings: Mapping[str, object]
    facts: Mapping[str, object] = field(default_factory=dict)

    def start(self, outputs: Sequence[Path]) -> None:
        """Remove an earlier run's failures, scores and report, and write this run's settings.

        So a run that is killed leaves none of these beside its own segmentations.
        """
        if (self.folder / RUN).exists():  # else they are another program's
            for name in OF_WHOLE_RUN:
                _remove(self.folder / name)
        own, others = {self._note(output) for output in outputs}, []
        for path in sorted((self.folder / NOTES).glob("*.json")):
            note = _read(path)
            if note.get("state") == "failed":
                _remove(path)
            elif path not in own and note.get("settings") != self._digest():
                others.append(note.get("file", path.stem))
        if others:
            log.warning(
                "%s has %d segmentations by other models or settings, which this run does not "
                "replace, for example %s: another --output_root keeps them apart",
                *(self.folder, len(others), others[0]),
            )
        self.write_run([])

    def key(self, case: Case) -> str:
        """Name all that a segmentation depends on: settings, and the content of its images."""
        return self._digest(*map(files.digest, case.images))

    def is_done(self, case: Case, outputs: Sequence[Path]) -> bool:
        """Tell whether the segmentation and its maps are there, of these images and settings.

        Args:
            outputs: the segmentation's path first.
        """
        note = self._read(outputs[0])
        if note.get("state") != "done" or note.get("key") != self.key(case):
            return False
        is_there = all(path.is_file() for path in outputs)
        return is_there and note.get("written") == [files.digest(path) for path in outputs]

    def note_done(self, case: Case, outputs: Sequence[Path], seconds: float) -> None:
        """Note a segmentation that has been written, and what lies beside it."""
        written = [files.digest(path) for path in outputs]
        facts = {"key": self.key(case), "settings": self._digest(), "written": written}
        facts |= {"file": outputs[0].name, "seconds": round(seconds, 3)}
        self._write(outputs[0], state="done", **facts)

    def note_failed(self, case: Case, outputs: Sequence[Path], reason: str) -> None:
        """Note why a case failed; an older segmentation goes, unless this run would repeat it."""
        is_done = False
        with suppress(UserError):  # the image cannot be read
            is_done = self.is_done(case, outputs)
        if not is_done:
            self.forget(outputs[0])
        self._write(outputs[0], state="failed", reason=reason)

    def forget(self, output: Path) -> None:
        """Remove what an earlier run wrote of a case: its note, all its maps, its segmentation."""
        for path in (self._note(output), *(map_path(output, name) for name in MAPS), output):
            _remove(path)

    def write_run(self, outputs: Sequence[Path]) -> None:
        """Write ``run.json``: settings, and each case's state, its seconds or why it failed."""
        cases = {}
        for output in outputs:
            note = self._read(output)
            keys = [key for key in ("state", "seconds", "reason") if key in note]
            cases[output.name] = {key: note[key] for key in keys}
        content = {"settings": dict(self.settings), **self.facts, "cases": cases}
        files.write_atomically(self.folder / RUN, json.dumps(content, indent=2) + "\n")

    def _digest(self, *more: str) -> str:
        text = repr([*sorted(self.settings.items()), *more])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _note(self, output: Path) -> Path:
        return self.folder / NOTES / files.internal_name(output.name, ".json")

    def _read(self, output: Path) -> dict:
        return _read(self._note(output))

    def _write(self, output: Path, **note: object) -> None:
        files.write_atomically(self._note(output), json.dumps(note))


def map_path(output: Path, name: str) -> Path:
    """Return where the map ``name``, of `MAPS`, lies beside a segmentation."""
    return output.parent / name / output.name


def check_name(output: Path) -> None:
    """Raise `UserError` where the file system cannot hold a segmentation's name."""
    try:
        os.lstat(output)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            count = len(os.fsencode(output.name))
            raise UserError(
                f"{output} cannot be written: its name has {count} bytes, more than this file "
                "system holds: rename the image"
            ) from error


def _read(note: Path) -> dict:
    with suppress(OSError, ValueError):  # none, or cut short: the case is done again
        content = json.loads(note.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR):  # then there is no such file
            raise UserError(
                f"{path}, of an earlier run, cannot be removed: {error.strerror}"
            ) from error
