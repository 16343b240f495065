"""Print the tables of results.jsonl as Markdown: a row a setting, a column a fold.

    python experiments/tables.py
    python experiments/tables.py --rows 'recipe/*'

A cell is the mean Dice of the classes, over the fold's 52 cases; with several seeds their mean, with the smallest and
the largest. GMAC are the multiply-adds of a batch's forward pass, in 10^9. Minutes are those of training alone; "-"
where other work shared the cores.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections import defaultdict
from statistics import mean

from runner import read_results


def main(args: argparse.Namespace) -> None:
    groups = defaultdict(lambda: defaultdict(list))
    for result in read_results():
        if fnmatch.fnmatch(result["name"], args.rows):
            groups[result["group"]][result["label"], result["iterations"]].append(result)
    for group, settings in groups.items():
        print("\n".join(table(group, settings)), end="\n\n")


def table(group: str, settings: dict[tuple[str, int], list[dict]]) -> list[str]:
    """Return the lines of a group's table; ``settings`` are the results of each label and number of iterations."""
    folds = sorted({result["fold"] for results in settings.values() for result in results})
    lines = [
        f"| {group} | parameters | GMAC | iterations | minutes | {' | '.join(f'fold {fold}' for fold in folds)} |",
        f"| --- | ---: | ---: | ---: | ---: | {' | '.join('---:' for _ in folds)} |",
    ]
    for (label, iterations), results in settings.items():
        minutes = [result["seconds"] / 60 for result in results if result["seconds"] is not None]
        cells = [
            label,
            f"{results[0]['parameters'] / 1e6:.2f} M",
            f"{results[0]['gmac']:.1f}",
            f"{iterations:,}",
            f"{mean(minutes):.1f}" if minutes else "-",
            *(dice([result["dice"] for result in results if result["fold"] == fold]) for fold in folds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def dice(seeds: list[float]) -> str:
    """Write the mean over seeds, and their range where there are several."""
    if len(seeds) < 2:
        return f"{seeds[0]:.4f}" if seeds else "-"
    return f"{mean(seeds):.4f} ({min(seeds):.4f} to {max(seeds):.4f})"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="pattern of the names of rows (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
