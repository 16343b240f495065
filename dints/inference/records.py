"""What became of each case of a batch: a note a case, since ranks write at the same time, and ``run.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dints import files
from dints.data.listing import ListedCase

NOTES, RUN = ".cases", "run.json"


def precision_of_earlier(folder: Path, models: Sequence[str]) -> str | None:
    """Return the precision that an earlier batch in the folder had by the same models, of these digests, if there was.

    On a CPU ``auto`` is measured, and may turn out otherwise on a busy machine: what is done would be done again.
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
        settings: all that a segmentation depends on beside its image, as plain values: a case that was done with others
            is done again.
        facts: more for readers of ``run.json``, on which no segmentation depends.
    """

    folder: Path
    settings: Mapping[str, object]
    facts: Mapping[str, object] = field(default_factory=dict)

    def key(self, case: ListedCase) -> str:
        """Name all that the case's segmentation depends on: settings, and the content of its images."""
        facts = [*sorted(self.settings.items()), *map(files.digest, case.images)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    def is_done(self, case: ListedCase, outputs: Sequence[Path]) -> bool:
        """Tell whether the segmentation, and what is written beside it, is there, of these images by these settings.

        Args:
            outputs: the segmentation's path first.
        """
        note = self._read(outputs[0])
        if note.get("state") != "done" or note.get("key") != self.key(case):
            return False
        return all(path.is_file() for path in outputs) and note.get("written") == list(map(files.digest, outputs))

    def note_done(self, case: ListedCase, outputs: Sequence[Path], seconds: float) -> None:
        """Note a segmentation that has been written, and what lies beside it."""
        written = list(map(files.digest, outputs))
        self._write(outputs[0], state="done", seconds=round(seconds, 3), key=self.key(case), written=written)

    def note_failed(self, output: Path, reason: str) -> None:
        """Note why there is no segmentation; an older one, which is not of this run, is left as it is."""
        self._write(output, state="failed", reason=reason)

    def write_run(self, outputs: Sequence[Path]) -> None:
        """Write ``run.json``: settings, and for each case its state, the seconds that it took or why it failed."""
        shown = ("state", "seconds", "reason")
        notes = {output.name: self._read(output) for output in outputs}
        cases = {name: {key: note[key] for key in shown if key in note} for name, note in notes.items()}
        content = {"settings": dict(self.settings), **self.facts, "cases": cases}
        files.write_atomically(self.folder / RUN, json.dumps(content, indent=2) + "\n")

    def _note(self, output: Path) -> Path:
        return self.folder / NOTES / f"{output.name}.json"

    def _read(self, output: Path) -> dict:
        with suppress(OSError, ValueError):  # none, or cut short: the case is done again
            note = json.loads(self._note(output).read_text(encoding="utf-8"))
            return note if isinstance(note, dict) else {}
        return {}

    def _write(self, output: Path, **note: object) -> None:
        files.write_atomically(self._note(output), json.dumps(note))
