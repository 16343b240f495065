"""The page: what became of a batch and how good it is, as one HTML file that needs nothing beside it.

`page.html` is its text, `page.css` its look and `page.js` the few lines that it runs. Its Content-Security-Policy lets
a browser load nothing and run nothing but these lines, whatever a case is called.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from tqdm import tqdm

from dints import __version__, files
from dints.data.cases import Case
from dints.data.leniency import Leniency
from dints.errors import UserError
from dints.evaluation.summary import summarise
from dints.network.model_file import Model
from dints.report import models as model_facts
from dints.report import plots, results
from dints.report.results import Result

NAME = "report.html"
WORST, MIDDLE, BEST = 4, 1, 2  # cases whose pictures are shown at once
FIRST = 4  # of those without a reference, beside unusual ones
BYTES_OF_PICTURES = 3_500_000  # of all of them; the page is to stay below 5 MB
SCORES = {"dice": "Dice", "surface_dice": "Surface Dice, 1 mm", "hausdorff95_mm": "HD95, mm"}


def write(
    folder: Path,
    cases: Sequence[Case | UserError],
    outputs: Sequence[Path],
    models: Sequence[Model],
    model_paths: Sequence[Path],
    leniency: Leniency,
) -> Path:
    """Write ``report.html`` of a batch into its folder, which has ``run.json`` and the segmentations, and return it.

    Args:
        cases: as `dints.data.cases.try_to_open` returns them.
        outputs: the file of each one's segmentation.
        model_paths: the files of ``models``, whose folders may hold tables of their training.

    Raises:
        UserError: something that the report needs is missing or cannot be read, or the page cannot be written.
    """
    path = folder / NAME
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        task, ranges = models[0].task, models[0].info.get("ranges", {})
        notes = [run["cases"][output.name] for output in outputs]
        done = [number for number, note in enumerate(notes) if note.get("state") == "done"]
        looked_at = [
            results.look_at(cases[number], outputs[number], task, leniency, ranges)
            for number in tqdm(done, desc="report", unit="case", disable=None)
        ]
        facts = {
            "seconds": [notes[number].get("seconds") for number in done],
            "failures": [(o.name, n.get("reason", "")) for o, n in zip(outputs, notes, strict=True) if "reason" in n],
            "settings": run["settings"],
        }
        about = model_facts.about(models, model_paths)
        files.write_atomically(path, render(looked_at, models, about, **facts))
    except (MemoryError, OSError, RuntimeError, ValueError, UserError) as error:
        raise UserError(
            f"{path} could not be made ({error}); segmentations and scores are written: mend this and give the same "
            "command again, which keeps them, or leave --report out"
        ) from error
    return path


def render(
    looked_at: Sequence[Result],
    models: Sequence[Model],
    about: Sequence[model_facts.About],
    *,
    seconds: Sequence[float | None],
    failures: Sequence[tuple[str, str]],
    settings: Mapping[str, object],
) -> str:
    """Return the page.

    Args:
        seconds: that each case took.
        failures: files that are not there, and why.
        settings: of the batch, as ``run.json`` has them.
    """
    task, names = models[0].task, [result.name for result in looked_at]
    class_names = task.class_names[1:]
    rows = [row for result in looked_at for row in result.rows]
    trained_on = {name for model in models for name in model.info.get("training_cases", [])}
    remarks = _remarks(looked_at, class_names, trained_on)
    groups, num_left_out = groups_of_pictures(looked_at, remarks, bool(rows))
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    return _template().render(
        task=task,
        class_names=class_names,
        colours=[plots.colour(label) for label in range(1, task.num_classes)],
        results=looked_at,
        has_scores=bool(rows),
        summary=summarise(rows) if rows else {},
        plots=[(caption, Markup(text)) for caption, text in _plots(looked_at, class_names, names)],  # noqa: S704  ours
        groups=groups,
        pictured={number for _, numbers, _ in groups for number in numbers},
        num_left_out=num_left_out,
        remarks=remarks,
        num_trained_on=len(trained_on & set(names)),
        seconds=seconds,
        median_seconds=float(np.median([s for s in seconds if s is not None] or [math.nan])),
        failures=failures,
        settings=[(name.replace("_", " "), model_facts.value_of(value)) for name, value in settings.items()],
        about=about,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),  # noqa: S704  ours
        script=Markup(script),  # noqa: S704  ours
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
    environment.filters |= {"number": number, "volume": volume, "percent": percent}
    return environment.get_template("page.html")


def number(value: float | None, digits: int = 3) -> str:
    """Write a score for people."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def volume(value: float) -> str:
    """Write ml for people, three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Write a relative error for people."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:+.1f}%"


def _remarks(looked_at: Sequence[Result], class_names: Sequence[str], trained_on: set[str]) -> list[list[str]]:
    """Return what is to be told of each case."""
    volumes = np.array([result.volumes for result in looked_at])
    remarks = []
    for result, of_volumes in zip(looked_at, results.unusual_volumes(volumes, class_names), strict=True):
        false = [f"{row.label} was found where the reference has none" for row in result.rows if row.false_positive]
        missed = [f"{row.label} was missed" for row in result.rows if math.isinf(row.hausdorff95_mm)]
        trained = ["the model was trained on it"] * (result.name in trained_on)
        remarks.append([*result.doubts, *missed, *false, *of_volumes, *trained])
    return remarks


def groups_of_pictures(
    looked_at: Sequence[Result], remarks: Sequence[Sequence[str]], has_scores: bool
) -> tuple[list[tuple[str, list[int], bool]], int]:
    """Divide cases into those whose pictures are shown at once, and the others, which are unfolded.

    Returns:
        (title, numbers of the cases, whether they are shown at once) of each group; how many are left out to keep
        the page small.
    """
    numbers = range(len(looked_at))
    if has_scores:
        order = sorted(numbers, key=lambda number: looked_at[number].rank)
        middle = len(order) // 2
        chosen = {
            "The worst by Dice": order[:WORST],
            "The median by Dice": order[middle : middle + MIDDLE],
            "The best by Dice": order[: -BEST - 1 : -1],
        }
        if len(order) <= WORST + MIDDLE + BEST:
            chosen = {"All cases, the worst by Dice first": order}
    else:
        order = list(numbers)
        unusual = [number for number in numbers if remarks[number]]
        usual = [number for number in numbers if not remarks[number]]
        chosen = {"Unusual cases": unusual, "The first cases" if unusual or len(usual) > FIRST else "All cases": usual[:FIRST]}
    shown = {number for group in chosen.values() for number in group}
    chosen["All other cases"] = [number for number in order if number not in shown]
    left, groups, num_left_out = BYTES_OF_PICTURES, [], 0
    for title, group in chosen.items():
        kept = []
        for case in group:
            left -= looked_at[case].overlay.size
            if left >= 0:
                kept.append(case)
        num_left_out += len(group) - len(kept)
        groups.append((title, kept, title != "All other cases"))
    return [group for group in groups if group[1]], num_left_out


def _plots(looked_at: Sequence[Result], class_names: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """Draw scores and volumes; return what each plot shows, and its SVG."""
    if not looked_at:
        return []
    volumes = {name: [result.volumes[label] for result in looked_at] for label, name in enumerate(class_names)}
    scored = [number for number, result in enumerate(looked_at) if result.rows]
    if not scored:
        return [("Volume of each class as segmented, a point a case", plots.strips(volumes, names, "ml"))]
    drawn = []
    for score, title in SCORES.items():
        values = {
            name: [getattr(result.rows[label], score) if result.rows else math.nan for result in looked_at]
            for label, name in enumerate(class_names)
        }
        best = 1.0 if "Dice" in title else None
        drawn.append((f"{title} of each class, a point a case", plots.strips(values, names, title, best)))
    references = {
        name: [result.rows[label].reference_ml if result.rows else math.nan for result in looked_at]
        for label, name in enumerate(class_names)
    }
    drawn.append(("Volume as segmented over the reference's, a point a case and class", plots.agreement(references, volumes, names)))
    return drawn
