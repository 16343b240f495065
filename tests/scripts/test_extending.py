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
    """Apply the diff in the folder, and run the command there with the Python of this test."""
    apply = ["git", "apply", "--recount", "-"]
    done = subprocess.run(apply, cwd=folder, input=example.diff, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-euo", "pipefail", "-c", f"{{ {example.command}\n}} 2>&1"]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=-1, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    rest = done.stdout
    for line in filter(None, map(str.strip, example.output.splitlines())):
        _, found, rest = rest.partition(line)
        assert found, f"{line!r} is not in its turn in\n{done.stdout}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Copy the checkout; the examples change different files of it."""
    return copy_checkout(tmp_path_factory.mktemp("extended") / "copy")


def test_the_page_has_five_short_examples():
    found = examples(PAGE.read_text())
    assert len(found) == 5
    assert all(1 <= len(example.changed_lines) <= MOST_LINES for example in found)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_an_example_works(number, copy):
    carry_out(examples(PAGE.read_text())[number], copy)


@pytest.mark.parametrize(
    ("old", "complaint"),
    [("-plain", "patch failed"), ("cat a", "cat: b"), ("red\ndone", "'red' is not in its turn")],
)
def test_an_example_that_is_wrong_is_found(tmp_path, old, complaint):
    page = """```diff
--- a/a
+++ b/a
@@ -1 +1 @@
-plain
+red
```

```bash
cat a
echo done
```

```text
red
done
```
"""
    (tmp_path / "a").write_text("plain\n")
    new = {"-plain": "-other", "cat a": "cat b", "red\ndone": "done\nred"}[old]
    (example,) = examples(page)
    carry_out(example, tmp_path)
    (tmp_path / "a").write_text("plain\n")
    (example,) = examples(new.join(page.rsplit(old, 1)))
    with pytest.raises(AssertionError, match=complaint):
        carry_out(example, tmp_path)
