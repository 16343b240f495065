"""What differs between two plain values, in words: between a stored run's configuration and the one
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dints.errors import cut, shown

MOST_NAMES = 3  # that are listed of many
FEW = 3  # texts of a list that is shown whole


def differences(name: str, was: object, now: object) -> Iterator[str]:
    """Yield how the values of ``name`` differ, part by part; of nested lists, only that they do."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted({*was, *now}, key=str):
            if was.get(key) != now.get(key):
                yield from differences(f"{name} {cut(str(key))}", was.get(key), now.get(key))
    elif _hold(str, was, now) and max(len(was), len(now)) > FEW:
        yield _of_names(name, was, now)
    elif _hold((list, tuple), was, now):
        yield f"{name} changed"
    else:
        yield f"{cut(name)} was {shown(was)} and is {shown(now)}"


def _hold(kind: type | tuple[type, ...], *values: object) -> bool:
    """Tell whether they are lists of such items, not all of them empty."""
    return (
        all(isinstance(value, (list, tuple)) for value in values)
        and any(values)
        and all(isinstance(item, kind) for value in values for item in value)
    )


def _of_names(what: str, was: Sequence[str], now: Sequence[str]) -> str:
    came, went = (sorted({*first} - {*second}) for first, second in ((now, was), (was, now)))
    if not came and not went:
        return f"the {what} are in another order"
    said = []
    for verb, names in (("came", came), ("went", went)):
        if names:
            listed = ", ".join(map(cut, names[:MOST_NAMES]))
            said.append(f"{len(names)} {verb} ({listed}{', ...' * (len(names) > MOST_NAMES)})")
    return f"of the {what} {' and '.join(said)}"
