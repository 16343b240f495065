"""docs/extending.md is true: each of its diffs applies to the checkout, and the command after it
works there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import CHECKOUT, copy_checkout

PAGE = CHECKOUT / "docs" / "extending.md"
MOST_LINES = 15  # that an extension may change


@dataclass(frozen=True)
class Example:
    """An extension as the page shows it.

    Attributes:
        diff: in git's form, as seen from the checkout's root.
        command: of bash, run there once the diff is applied.
        output: lines that it prints, in their order, among others.
    """

    diff: str
    command: str
    output: str = ""

    @property
    def changed_lines(self) -> list[str]:
        return re.findall(r"^(?:\+(?!\+\+ )|-(?!-- )).*$", self.diff, re.MULTILINE)


def examples(page: str) -> list[Example]:
    """Read each ```diff block with the first ```bash block after it, and the ```text block that may
    follow that.
    """
    found = []
    for part in re.split(r"^```diff\n", page, flags=re.MULTILINE)[1:]:
        diff, _, rest = part.partition("\n```")
        command = re.search(
            r"^```bash\n(.*?)^```(?:$(?:(?!^```).)*?^```text\n(.*?)^```)?",
            rest,
            re.MULTILINE | re.DOTALL,
        )
        assert command is not None, f"no bash block follows the diff\n{diff}"
        found.append(Example(f"{diff}\n", command[1], command[2] or ""))
    return found


def carry_out(example: Example, folder: Path) -> None:
    """Apply the diff to a copy of the checkout, and run the command there with the Python that runs
    this test.
    """
    copy_checkout(folder)
    done = subprocess.run(
        ["git", "apply", "--recount", "-"],
        cwd=folder,
        input=example.diff,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    rest = done.stdout
    for line in filter(None, map(str.strip, example.output.splitlines())):
        _, found, rest = rest.partition(line)
        assert found, (
            f"{line!r} is not in what the command printed, or not in its turn:\n{done.stdout}"
        )


def test_the_page_has_five_short_examples():
    found = examples(PAGE.read_text())
    assert len(found) == 5
    assert all(1 <= len(example.changed_lines) <= MOST_LINES for example in found)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_an_example_works(number, tmp_path):
    carry_out(examples(PAGE.read_text())[number], tmp_path / "copy")


class TestReading:
    """The page is read as it is meant, and an example that is wrong is found."""

    PAGE = """# Add a colour

```diff
--- a/dints/errors.py
+++ b/dints/errors.py
@@ -9,6 +9,7 @@
{before}
+COLOUR = "red"
{after}
```

and see it:

```bash
python -c 'from dints import errors; print(errors.COLOUR); print("done")'
```

```text
red
done
```

```diff
--- a/x
```

```bash
true
```

```bash
false
```
"""

    @pytest.fixture
    def page(self) -> str:
        """Make a page whose first diff fits the checkout."""
        lines = [f" {line}" for line in (CHECKOUT / "dints" / "errors.py").read_text().splitlines()]
        before = next(number for number, line in enumerate(lines) if line.startswith(" class "))
        parts = {"before": lines[before - 3 : before], "after": lines[before : before + 3]}
        return self.PAGE.format(**{name: "\n".join(part) for name, part in parts.items()})

    @pytest.mark.parametrize(
        ("old", "new", "complaint"),
        [
            ("", "", None),
            ("@@\n", "@@\n another line\n", "patch failed"),
            ("print(errors.COLOUR)", "print(errors.COLOR)", "AttributeError"),
            ("red\ndone", "done\nred", "'red' is not in"),
        ],
        ids=["right", "diff", "command", "order"],
    )
    def test_an_example_that_is_wrong_is_found(self, page, tmp_path, old, new, complaint):
        example = examples(page.replace(old, new, 1) if old else page)[0]
        if complaint is None:
            return carry_out(example, tmp_path / "copy")
        with pytest.raises(AssertionError, match=complaint):
            carry_out(example, tmp_path / "copy")
