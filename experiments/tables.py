"""Print the tables of results.jsonl as Markdown.

First what was trained alike on all four folds, then a row a recipe, a row a network, and at equal
memory a row a kind.

    python experiments/tables.py

All trainings of the second and third would take the same time on an idle core. A cell is the mean
Dice of the classes, over the fold's 52 cases; with several seeds their mean, with the smallest and
the largest. GMAC are the multiply-adds of a batch's forward pass, in 10^9. Minutes are those of
training alone, two side by side; "-" where much other work shared the cores.

At equal memory, each kind's networks have as many iterations. Dice are means over a network's
seeds, then over the networks. The last column is what the winners of candidates gain over it: the
difference of the means, and its 95% interval over cases (bootstrap). Below stands by how much a
network's seeds differ.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import mean

import numpy as np
from runner import NUM_FOLDS, U, read_results

EQUAL_MINUTES = 6
DRAWS = 10_000  # of cases, for an interval
NAMES = {
    U: "a U of 9 blocks with skips",
    "dynunet": "MONAI's DynUNet",
    "segresnet": "MONAI's SegResNet",
}
KINDS = {  # of what is trained at equal memory, the recommended one first
    "control": "candidates",
    "search": "gradient search, then candidates",
    "gradient": "gradient search alone",
    "random": "random, finest path kept",
    "u_shaped_5x3": "a U of 5 blocks, no skips",
    **NAMES,
}
RECOMMENDED = next(iter(KINDS))


def main() -> None:
    every = read_results()
    print("\n".join(folds_table(every)), end="\n\n")
    results = [
        line for line in every if line["processes"] == 1 and line.get("minutes") == EQUAL_MINUTES
    ]
    tables = {
        "recipe": [result for result in results if result["network"] == U],
        "network": [result for result in results if result["recipe"] == "recommended"],
    }
    for name, chosen in tables.items():
        print("\n".join(table(name, chosen)), end="\n\n")
    print("\n".join([*memory_table(every), "", seeds_differ(every)]))


def table(name: str, results: list[dict]) -> list[str]:
    """Return the lines of a table, a row for each value that the results have under ``name``."""
    folds = sorted({result["fold"] for result in results})
    lines = [
        f"| {name} | parameters | GMAC | iterations | minutes | "
        f"{' | '.join(f'fold {fold}' for fold in folds)} |",
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
            *(
                dice([result["dice"] for result in rows if result["fold"] == fold])
                for fold in folds
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def folds_table(results: list[dict]) -> list[str]:
    """Return the lines of the table of means over four folds, with a column a class."""
    alike = defaultdict(dict)
    for line in results:
        if line.get("minutes") is not None and line["seed"] == 0:
            alike[line["minutes"] * line["processes"], line["network"], line["recipe"]][
                line["fold"]
            ] = line
    lines = []
    for (minutes, network, recipe), of_fold in sorted(alike.items()):
        if len(of_fold) < NUM_FOLDS:
            continue
        folds, first = of_fold.values(), of_fold[0]
        classes = [mean(line["classes"][name] for line in folds) for name in first["classes"]]
        if not lines:
            lines.append(
                "| network | recipe | minutes | parameters | GMAC | "
                f"{' | '.join(first['classes'])} | mean |"
            )
            lines.append(
                f"| --- | --- | ---: | ---: | ---: | {' | '.join('---:' for _ in classes)} | ---: |"
            )
        cells = [
            network,
            recipe,
            f"{minutes:g}",
            f"{first['parameters'] / 1e6:.2f} M",
            f"{first['gmac']:.1f}",
        ]
        cells += [f"{value:.4f}" for value in (*classes, mean(line["dice"] for line in folds))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table(results: list[dict]) -> list[str]:
    """Return the lines of the table at equal memory; searches stand with the time that they
    took.
    """
    seconds = defaultdict(list)
    for line in results:
        if "kind" in line and line["seconds"] is not None:
            seconds[line["memory_mib"], line["kind"]].append(line["seconds"])
            if line["gradient_seconds"]:
                # one search, decoded for every memory
                seconds["gradient"].append(line["gradient_seconds"])
    lines = [
        "| MiB | found by | networks | parameters | minutes of search | of training | Dice (worst "
        "to best) | candidates gain (95%) |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    networks, order = at_equal_memory(results), list(KINDS)
    for (memory, kind), of_kind in sorted(
        networks.items(), key=lambda item: (item[0][0], order.index(item[0][1]))
    ):
        sizes = [of_network[0]["parameters"] / 1e6 for of_network in of_kind]
        found = networks.get((memory, RECOMMENDED))
        searched = seconds["gradient" if kind == "gradient" else (memory, kind)]
        trained = [
            line["seconds"]
            for of_network in of_kind
            for line in of_network
            if line["seconds"] is not None
        ]
        gains = "-" if kind == RECOMMENDED or not found else gain(found, of_kind)
        cells = [
            f"{memory:g}",
            KINDS[kind],
            str(len(of_kind)),
            f"{min(sizes):.2f} to {max(sizes):.2f} M" if len(sizes) > 1 else f"{sizes[0]:.2f} M",
            f"{mean(searched) / 60:.0f}" if searched else "-",
            f"{mean(trained) / 60:.1f}" if trained else "-",
            dice([mean(line["dice"] for line in of_network) for of_network in of_kind]),
            gains,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def at_equal_memory(results: list[dict]) -> dict[tuple[float, str], list[list[dict]]]:
    """Return by memory in MiB and kind what was trained at equal memory: of each network the lines
    of its seeds.
    """
    networks = defaultdict(lambda: defaultdict(list))
    for line in results:
        if line.get("memory_mib") is not None and "network" in line:
            networks[line["memory_mib"], kind_of(line["network"])][line["network"]].append(line)
    return {place: list(of_kind.values()) for place, of_kind in networks.items()}


def seeds_differ(results: list[dict]) -> str:
    """Tell by how much two seeds of a network at equal memory differ: on average, and nine tenths
    of them at most.
    """
    of_networks = (
        of_network for of_kind in at_equal_memory(results).values() for of_network in of_kind
    )
    differences = [
        abs(np.subtract(*[line["dice"] for line in lines]))
        for lines in of_networks
        if len(lines) == 2
    ]
    if not differences:
        return "no network has two seeds"
    return (
        f"two seeds of {len(differences)} networks differ by {mean(differences):.4f} on average, "
        f"nine tenths of them by at most {np.quantile(differences, 0.9):.4f}"
    )


def kind_of(network: str) -> str:
    """Name the kind of a network of the rows at equal memory: how it was found, or itself."""
    kind = network.split("_")[0]
    return kind if kind in ("search", "control", "gradient", "random") else network


def gain(found: list[list[dict]], others: list[list[dict]]) -> str:
    """Write by how much the mean Dice of some networks is above that of others, with its interval
    over cases.

    Only the seeds that all of them have count: trainings of one seed see the same patches.
    """
    seeds = set.intersection(
        *({line["seed"] for line in of_network} for of_network in [*found, *others])
    )
    difference = np.subtract(*(_case_means(networks, seeds) for networks in (found, others)))
    drawn = np.random.default_rng(0).choice(difference, (DRAWS, len(difference))).mean(-1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{difference.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def _case_means(networks: list[list[dict]], seeds: set[int]) -> np.ndarray:
    """Return the mean Dice of each case, over these seeds of a network and then over networks."""
    of_seeds = (
        [per_case(line) for line in of_network if line["seed"] in seeds] for of_network in networks
    )
    return np.mean([np.mean(lines, axis=0) for lines in of_seeds], axis=0)


def per_case(line: dict) -> list[float]:
    """Return the mean Dice of each case, in the order of their names."""
    return [mean(line["cases"][case].values()) for case in sorted(line["cases"])]


def dice(seeds: list[float]) -> str:
    """Write the mean over seeds, and their range where there are several."""
    if len(seeds) < 2:
        return f"{seeds[0]:.4f}" if seeds else "-"
    return f"{mean(seeds):.4f} ({min(seeds):.4f} to {max(seeds):.4f})"


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
