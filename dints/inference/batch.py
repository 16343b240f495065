"""A batch of volumes: each is segmented, written with its maps, noted, and scored."""

from __future__ import annotations

import csv
import io
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dints import files
from dints.data.cases import read_image, read_label
from dints.data.listing import ENDING, Case
from dints.data.nifti import Header, read_header, save_map, save_segmentation
from dints.data.plausibility import unusual
from dints.data.tasks import Task
from dints.errors import UserError
from dints.evaluation.postprocessing import Postprocessing
from dints.inference.decision import UNITS, Decision
from dints.inference.predictor import Predictor
from dints.inference.records import Records, check_name, map_path
from dints.running.processes import Processes
from dints.training.validation import Overlaps, Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Segments one case after another, and writes the masks and maps.

    Attributes:
        maps: that are written beside a segmentation, of `dints.inference.decision.MAPS`.
    """

    predictor: Predictor
    postprocessing: Postprocessing
    records: Records
    maps: list[str]

    def segment_all(
        self,
        cases: list[Case],
        faults: list[UserError | None],
        outputs: list[Path],
        processes: Processes,
    ) -> tuple[Scores, dict[str, str]]:
        """Segment this rank's share of the cases.

        Returns:
            the scores of all ranks' cases; the reasons of those that failed.
        """
        task, failed = self.predictor.task, {}
        overlaps = Overlaps(len(cases), task.num_classes, processes)
        silent = None if processes.is_main else True
        share = processes.share(len(cases))
        for index in tqdm(share, desc="segmenting", unit="volume", disable=silent):
            case, output = cases[index], outputs[index]
            paths = [output, *(map_path(output, name) for name in self.maps)]
            try:
                labels, reference = self.segment_case(case, faults[index], paths)
            except UserError as error:
                failed[output.name] = str(error)
                self.records.note_failed(case, paths, str(error))
                log.warning("%s is left out: %s", output.name, error)
                continue
            if reference is not None:
                overlaps.add(index, labels, reference)
        processes.wait_for_all("segmented")  # shares take unequal times
        of_ranks = processes.gather(failed)
        failed = {name: fault for of_rank in of_ranks for name, fault in of_rank.items()}
        return overlaps.scores(), failed

    def segment_case(
        self, case: Case, fault: UserError | None, paths: list[Path]
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Segment a case, unless that is done, and write its segmentation and maps.

        Args:
            paths: of its segmentation, and of the maps that are written beside it.

        Returns:
            Its labels and those of its reference, (x, y, z); neither where there is no reference.

        Raises:
            UserError: it cannot be segmented, or not scored.
        """
        check_name(paths[0])
        if fault is not None:
            raise fault
        task, label = self.predictor.task, case.label_header
        # First, so that a bad one costs no segmentation.
        reference = None if label is None else read_label(label, task)
        for remark in unusual(case, self.predictor.ranges):
            log.warning("%s is unusual: %s", paths[0].name, remark)
        start = time.monotonic()
        if self.records.is_done(case, paths):
            if reference is None:
                return None, None
            return read_label(read_header(str(paths[0])), task), reference
        decision = self.decide(case)
        labels = self.postprocessing.apply(decision.labels, case.headers[0].spacing)
        decision = replace(decision, labels=labels)
        self.records.forget(paths[0])  # not before there is something to take its place
        self.save(decision, case.headers[0], paths)
        self.records.note_done(case, paths, time.monotonic() - start)
        return labels, reference

    def decide(self, case: Case) -> Decision:
        """Segment a case's image on its file's own grid."""

        def read() -> np.ndarray:
            voxels, replaced = read_image(case)
            if replaced:
                log.warning("%s: %d NaN or infinite voxels are replaced", case.images[0], replaced)
            return voxels

        return self.predictor.segment(read, case.affine, case.name, self.maps)

    def save(self, decision: Decision, image: Header, paths: list[Path]) -> None:
        """Write a segmentation, and after it the maps beside it."""
        save_segmentation(decision.labels, image, paths[0])
        for path, name in zip(paths[1:], self.maps, strict=True):
            values = getattr(decision, name)
            values = values if values.ndim == 3 else np.moveaxis(values, 0, -1)
            save_map(values, image, path, UNITS)


def write_scores(
    path: Path, scores: Scores, outputs: list[Path], task: Task, trained_on: set[str] | None
) -> None:
    """Write a row per case: Dice of each class, empty where the case does not have the class.

    Args:
        trained_on: cases that the model was trained on; None where there is no need to mark them.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    marks = ["trained_on"] if trained_on is not None else []
    table.writerow(["case", *task.class_names[1:], *marks])
    for output, dice in zip(outputs, scores.dice.tolist(), strict=True):
        name = ENDING.sub("", output.name)
        marks = [] if trained_on is None else ["yes" if name in trained_on else "no"]
        values = ("" if value != value else f"{value:.6f}" for value in dice)
        table.writerow([output.name, *values, *marks])
    files.write_atomically(path, text.getvalue())
