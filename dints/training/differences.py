"""What differs between two plain values, in words: between a stored run's configuration and the one asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from dints.errors import cut, shown

MOST_NAMES = 3  # that are listed of many
DIGESTS = "source"  # what is called so is a digest, which says nothing to people


def differences(name: str, was: object, now: object) -> Iterator[str]:
    """Say how the values of ``name`` differ, part by part; of digests and lists of lists, only that they do."""
    if _are(Mapping, was, now):
        for key in sorted({*was, *now}, key=str):
            if was.get(key) != now.get(key):
                yield from differences(f"{name} {cut(str(key))}", was.get(key), now.get(key))
    elif _hold(str, was, now):
        yield _of_names(name, was, now)
    elif _hold(Mapping, was, now):
        for number, (first, second) in enumerate(zip_longest(was, now), 1):
            if first != second:
                yield from differences(f"{name} {number}", first, second)
    elif name.split()[-1] == DIGESTS or _hold((list, tuple), was, now):
        yield f"{name} changed"
    else:
        was, now = (one.get("name", one) if isinstance(one, Mapping) else one for one in (was, now))
        yield f"{cut(name)} was {shown(was)} and is {shown(now)}"


def _are(kind: type | tuple[type, ...], *values: object) -> bool:
    return all(isinstance(value, kind) for value in values)


def _hold(kind: type | tuple[type, ...], *values: object) -> bool:
    """Tell whether they are lists of such items, not all of them empty."""
    return _are((list, tuple), *values) and any(values) and all(_are(kind, *value) for value in values)


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
