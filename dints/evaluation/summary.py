"""Tables of scores: a row a case and class as CSV; summaries with bootstrap intervals."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields

import numpy as np
from scipy import stats

from dints.evaluation.scores import SCORES, Row

RESAMPLES = 4999  # of the cases, for an interval


def scores_table(rows: Sequence[Row]) -> str:
    """Return rows as CSV: an empty cell where a score is not defined, ``inf`` for an infinite
    distance.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: _cell(value) for name, value in asdict(row).items()})
    return text.getvalue()


def _cell(value: str | float) -> str | int:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return int(value) if isinstance(value, bool) else value


def summarise(rows: Sequence[Row], seed: int = 0) -> dict[str, dict]:
    """Return false positive cases and scores of each of the ``classes``, by name, and of ``all``.

    A score's summary: ``n``, the cases that it is defined for; their ``mean`` with its 95%
    interval, ``low`` to ``high``; their ``median``; and how many further ones are ``infinite``,
    which mean and median leave out. None where there is none, or for the interval fewer than two
    cases. Over all classes the mean is that of the classes' means, as usual, and the median that of
    each case's mean over its classes.
    """
    of_classes = defaultdict(list)
    for row in rows:
        of_classes[row.label].append(row)
    classes = {name: _summary_of_classes([own], seed) for name, own in of_classes.items()}
    return {"classes": classes, "all": _summary_of_classes(list(of_classes.values()), seed)}


def _summary_of_classes(of_classes: Sequence[Sequence[Row]], seed: int) -> dict:
    """Summarise the scores of some classes, which have the same cases in the same order."""
    false_positives = sum(row.false_positive for rows in of_classes for row in rows)
    summary = {"false_positive_cases": false_positives}
    for score in SCORES:
        values = [[getattr(row, score) for row in rows] for rows in of_classes]
        summary[score] = _summary(np.array(values).T, seed)
    return summary


def _summary(values: np.ndarray, seed: int) -> dict:
    """Summarise one score of many cases: (cases, classes), NaN where it is not defined."""
    infinite = int(np.isinf(values).sum())
    values = np.where(np.isfinite(values), values, np.nan)
    values = values[np.isfinite(values).any(1)]
    mean = low = high = median = None
    if len(values):
        low, high = interval(values, seed)
        median = float(np.median(np.nanmean(values, 1)))
        mean = float(mean_of_classes(values, np.arange(len(values))))
    found = {"n": len(values), "mean": mean, "low": low, "high": high}
    return found | {"median": median, "infinite": infinite}


def mean_of_classes(values: np.ndarray, cases: np.ndarray) -> np.ndarray:
    """Return the mean of the classes' means over the chosen cases.

    Args:
        values: (all cases, classes), NaN where a case does not have the class.
        cases: (..., n), the numbers of those that are chosen, each as often as it is to count.
    """
    defined = np.isfinite(values)
    sums, counts = (np.where(defined, values, 0)[cases].sum(-2), defined[cases].sum(-2))
    with np.errstate(invalid="ignore"):
        return np.nanmean(sums / counts, -1)


def interval(
    values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float | None, float | None]:
    """Return the 95% interval of the mean of values (cases, classes): bootstrap over the cases.

    It is BCa (Efron 1987), which follows the skewness that Dice has. Of 2500 samples of skewed
    cases (Beta(9, 1)) each, it held the true mean in 94% with 40 cases, 93% with 20 and 88% with
    10: few cases make it too narrow. Where BCa is not defined, as for values that hardly differ, it
    is the percentiles'. None where there are fewer than two cases.
    """
    if len(values) < 2:
        return None, None
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(len(values)),),
            lambda cases, axis: mean_of_classes(values, cases),
            n_resamples=resamples,
            batch=max(1, 10_000_000 // values.size),
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    limits = np.array(found.confidence_interval)
    if not np.isfinite(limits).all():
        limits = np.percentile(found.bootstrap_distribution, (2.5, 97.5))
    return float(limits[0]), float(limits[1])


def markdown(summary: dict[str, dict]) -> str:
    """Return a summary as a Markdown table, a row a class and score."""
    lines = [
        "| class | score | n | mean | 95% interval | median | false positive cases |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, scores in [*summary["classes"].items(), ("all", summary["all"])]:
        for score in SCORES:
            found, label = scores[score], name.replace("|", "\\|")
            keys = ("mean", "low", "high", "median")
            mean, low, high, median = (_number(found[key]) for key in keys)
            infinite = f" (and {found['infinite']} infinite)" if found["infinite"] else ""
            cells = label, score, f"{found['n']}{infinite}", mean, f"{low} to {high}", median
            lines.append(f"| {' | '.join(cells)} | {scores['false_positive_cases']} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
