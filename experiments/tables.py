"""Print the tables of results.jsonl as Markdown: a row a recipe, then a row a network; a column a fold.

    python experiments/tables.py

All trainings of a table would take the same time on an idle core. A cell is the mean Dice of the classes, over the
fold's 52 cases; with several seeds their mean, with the smallest and the largest. GMAC are the multiply-adds of a
batch's forward pass, in 10^9. Minutes are those of training alone, two side by side; "-" where other work shared the
cores.
"""

from __future__ import annotations

import argparse
from statistics import mean

from runner import U, read_results

EQUAL_MINUTES = 6


def main() -> None:
    results = [result for result in read_results() if result["processes"] == 1 and result["minutes"] == EQUAL_MINUTES]
    tables = {
        "recipe": [result for result in results if result["network"] == U],
        "network": [result for result in results if result["recipe"] == "recommended"],
    }
    for name, chosen in tables.items():
        print("\n".join(table(name, chosen)), end="\n\n")


def table(name: str, results: list[dict]) -> list[str]:
    """Return the lines of a table, a row for each value that the results have under ``name``."""
    folds = sorted({result["fold"] for result in results})
    lines = [
        f"| {name} | parameters | GMAC | iterations | minutes | {' | '.join(f'fold {fold}' for fold in folds)} |",
        f"| --- | ---: | ---: | ---: | ---: | {' | '.join('---:' for _ in folds)} |",
    ]
    for value in dict.fromkeys(result[name] for result in results):
        rows = [result for result in results if result[name] == value]
        minutes = [result["seconds"] / 60 for result in rows if result["seconds"] is not None]
        cells = [
            value,
            f"{rows[0]['parameters'] / 1e6:.2f} M",
            f"{rows[0]['gmac']:.1f}",
            f"{rows[0]['iterations']:,}",
            f"{mean(minutes):.1f}" if minutes else "-",
            *(dice([result["dice"] for result in rows if result["fold"] == fold]) for fold in folds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def dice(seeds: list[float]) -> str:
    """Write the mean over seeds, and their range where there are several."""
    if len(seeds) < 2:
        return f"{seeds[0]:.4f}" if seeds else "-"
    return f"{mean(seeds):.4f} ({min(seeds):.4f} to {max(seeds):.4f})"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
