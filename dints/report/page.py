"""The page: a batch's cases and their scores, as one HTML file that needs nothing beside it.

`page.html` is its text, `page.css` its look and `page.js` the few lines that it runs. Its
Content-Security-Policy lets a browser load nothing and run nothing but these lines, whatever a case
is called.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path

import jinja2
import numpy as np
from tqdm import tqdm

from dints import __version__, files
from dints.data.listing import Case
from dints.data.tasks import Task
from dints.errors import UserError
from dints.evaluation.scores import NAN
from dints.evaluation.summary import summarise
from dints.network.model_file import Model
from dints.report import models as model_facts
from dints.report import plots, results
from dints.report.overlays import Overlay
from dints.report.results import Result

NAME = "report.html"
WORST, MIDDLE, BEST = 4, 1, 2  # cases whose pictures are shown at once
FIRST, UNUSUAL = 4, 8  # of those without references
MOST_PLANES = 16  # of a view of a case that is shown at once
# Of pictures, plots, drawings and curves. With tables and text the page is to stay below 5 MB.
BYTES = 4_500_000
OTHERS = "All other cases"
SCORES = {"dice": "Dice", "surface_dice": "Surface Dice at 1 mm", "hausdorff95_mm": "HD95 in mm"}


def write(
    folder: Path,
    cases: Sequence[Case | UserError],
    outputs: Sequence[Path],
    models: Sequence[Model],
    model_paths: Sequence[Path],
) -> Path:
    """Write ``report.html`` into a batch's folder, which has ``run.json``; return its path.

    Args:
        cases: the fault in the place of one that could not be used.
        outputs: the file of each one's segmentation.
        model_paths: the files of ``models``, whose folders may hold tables of their training.

    Raises:
        UserError: something that the report needs is missing or cannot be read, or the page cannot
            be written.
    """
    path = folder / NAME
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        notes = {output.name: run["cases"][output.name] for output in outputs}
        pairs = zip(cases, outputs, strict=True)
        done = [(case, out) for case, out in pairs if notes[out.name].get("state") == "done"]
        seconds = [notes[output.name].get("seconds") for _, output in done]
        failed = [name for name, note in notes.items() if note.get("state") == "failed"]
        failures = [(name, notes[name]["reason"]) for name in failed]
        found, task = _looked_at(done, models[0]), models[0].task
        batch = Batch(found, models, seconds, failures, run["settings"])
        about = model_facts.about(models, model_paths)
        many_planes = partial(results.picture_of, task=task, most_planes=MOST_PLANES)
        page = render(batch, about, lambda number: many_planes(*done[number]))
        files.write_atomically(path, page)
    except (MemoryError, OSError, RuntimeError, ValueError, UserError) as error:
        raise UserError(
            f"{path} could not be made ({error}); segmentations and scores are written: fix this "
            "and give the same command again, which keeps them, or leave --report out"
        ) from error
    return path


@dataclass(frozen=True)
class Batch:
    """The facts of a batch that the page shows.

    Attributes:
        results: of the cases that were segmented.
        seconds: that each of them took.
        failures: files that are not there, and why.
        settings: of the batch, as ``run.json`` has them.
    """

    results: Sequence[Result]
    models: Sequence[Model]
    seconds: Sequence[float | None]
    failures: Sequence[tuple[str, str]]
    settings: Mapping[str, object]

    @property
    def task(self) -> Task:
        return self.models[0].task

    @property
    def has_scores(self) -> bool:
        return any(result.rows for result in self.results)

    @property
    def trained_on(self) -> set[str]:
        """Names of its cases that a model was trained on."""
        trained_on = [model.info.get("training_cases", []) for model in self.models]
        return {result.name for result in self.results}.intersection(chain(*trained_on))


def _looked_at(done: Sequence[tuple[Case, Path]], model: Model) -> list[Result]:
    ranges = model.info.get("ranges", {})
    bar = tqdm(done, desc="report", unit="case", disable=None)
    return [results.look_at(case, output, model.task, ranges) for case, output in bar]


def render(
    batch: Batch, about: Sequence[model_facts.About], many_planes: Callable[[int], Overlay]
) -> str:
    """Return the page.

    Args:
        many_planes: returns the picture of many planes of a case, by its number.
    """
    remarks, drawn = remarks_on(batch), _plots(batch)
    others = [text for _, text in drawn]
    others += [text for one in about for text in (one.drawing, *one.curves.values())]
    groups, num_left_out = pictures(batch, remarks, many_planes, BYTES - sum(map(len, others)))
    rows = [row for result in batch.results for row in result.rows]
    folder = Path(__file__).parent
    script = (folder / "page.js").read_text(encoding="utf-8")
    return _template().render(
        batch=batch,
        task=batch.task,
        class_names=batch.task.class_names[1:],
        colours=[plots.colour(label) for label in range(1, batch.task.num_classes)],
        summary=summarise(rows) if rows else {},
        plots=drawn,
        groups=groups,
        pictured={number for _, overlays in groups for number in overlays},
        others=OTHERS,
        num_left_out=num_left_out,
        remarks=remarks,
        num_unusual=sum(map(bool, remarks)),
        median_seconds=float(np.median([s for s in batch.seconds if s is not None] or [math.nan])),
        about=about,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"number": number, "volume": volume, "percent": percent}
    environment.filters |= {**filters, "value": model_facts.value_of}
    return environment.get_template("page.html")


def number(value: float | None, digits: int = 3) -> str:
    """Write a score for people."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def volume(value: float) -> str:
    """Write ml for people: three digits, or all before the point."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def percent(value: float | None) -> str:
    """Write a relative error for people."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:+.1f}%".replace("-", "−")


def remarks_on(batch: Batch) -> list[list[str]]:
    """Return the remarks on each case."""
    volumes = np.array([result.volumes for result in batch.results])
    unusual = results.unusual_volumes(volumes, batch.task.class_names[1:])
    remarks = []
    for result, of_volumes in zip(batch.results, unusual, strict=True):
        missed = [row.label for row in result.rows if math.isinf(row.hausdorff95_mm)]
        false = [row.label for row in result.rows if row.false_positive]
        wrong = [f"{label} was missed" for label in missed]
        wrong += [f"{label} was found where the reference has none" for label in false]
        remarks.append([*result.remarks, *wrong, *of_volumes])
    return remarks


Groups = list[tuple[str, dict[int, Overlay]]]


def pictures(
    batch: Batch,
    remarks: Sequence[Sequence[str]],
    many_planes: Callable[[int], Overlay],
    most_bytes: int,
) -> tuple[Groups, int]:
    """Choose the pictures: those that are shown at once have many planes, the others one a view.

    Args:
        many_planes: as of `render`.
        most_bytes: of all of them.

    Returns:
        titles of groups, with the pictures in them by their cases' numbers; how many are left out
        to keep the page small.
    """
    groups = grouped(batch, remarks)
    others = groups.pop(OTHERS)
    stills = [result.overlay for result in batch.results]
    left, chosen = most_bytes - sum(stills[n].size for group in groups.values() for n in group), []
    for title, numbers in groups.items():
        chosen.append((title, {}))
        for number in numbers:
            many = many_planes(number)
            more = many.size - stills[number].size
            chosen[-1][1][number] = many if more <= left else stills[number]
            left -= more if more <= left else 0
    chosen.append((OTHERS, {}))
    for number in others:
        if stills[number].size <= left:
            chosen[-1][1][number] = stills[number]
            left -= stills[number].size
    return [group for group in chosen if group[1]], len(others) - len(chosen[-1][1])


def grouped(batch: Batch, remarks: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Divide the cases' numbers into groups by title; those of `OTHERS` are not shown at once."""
    numbers = list(range(len(batch.results)))
    if batch.has_scores:
        numbers.sort(key=lambda number: batch.results[number].rank)
        middle = len(numbers) // 2
        groups = {
            "The worst by Dice": numbers[:WORST],
            "The median by Dice": numbers[middle : middle + MIDDLE],
            "The best by Dice": numbers[: -BEST - 1 : -1],
        }
        if len(numbers) <= WORST + MIDDLE + BEST:
            groups = {"All cases, the worst by Dice first": numbers}
    else:
        usual = [number for number in numbers if not remarks[number]]
        unusual = [number for number in numbers if remarks[number]]
        first = "The first cases" if unusual else "Cases"
        groups = {"Unusual cases": unusual[:UNUSUAL], first: usual[:FIRST]}
    shown = {number for group in groups.values() for number in group}
    return groups | {OTHERS: [number for number in numbers if number not in shown]}


def _plots(batch: Batch) -> list[tuple[str, str]]:
    """Draw scores and volumes; return what each plot shows, and its SVG."""
    found, class_names = batch.results, batch.task.class_names[1:]
    if not found:
        return []
    names, drawn = [result.name for result in found], []
    volumes = dict(
        zip(class_names, zip(*(result.volumes for result in found), strict=True), strict=True)
    )
    if not batch.has_scores:  # an axis a class: a lesion is seen beside its organ
        for label, (name, of_class) in enumerate(volumes.items(), start=1):
            drawing = plots.strips({name: of_class}, names, first_label=label)
            drawn.append((f"{name}, ml as segmented", drawing))
        return drawn

    def columns(score: str) -> dict[str, list[float]]:
        unknown = [NAN] * len(class_names)
        of_cases = [[getattr(row, score) for row in result.rows] or unknown for result in found]
        return dict(zip(class_names, zip(*of_cases, strict=True), strict=True))

    for score, title in SCORES.items():
        best = None if score == "hausdorff95_mm" else 1.0
        drawn.append((title, plots.strips(columns(score), names, best)))
    return [*drawn, ("Volume", plots.agreement(columns("reference_ml"), volumes, names))]
