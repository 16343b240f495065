"""Every fault of the project's list is provoked by tests that exist."""

import re
from pathlib import Path

import pytest
from faults import COLLECTED, FAULTS, ON_A_GPU

LIST = Path(__file__).resolve().parents[2] / "shared" / "FAULTS.md"


@pytest.mark.parametrize(("table", "fault"), [(table, fault) for table, rows in FAULTS.items() for fault in rows])
def test_a_fault_is_provoked(table, fault, request):
    """By tests that pytest has found; of files that it was not asked for, nothing is known."""
    whole_files, found = request.config.stash[COLLECTED]
    tests = FAULTS[table][fault]
    assert tests and {test for test in tests if test.split("::")[0] in whole_files} <= found


def test_what_needs_a_gpu_is_in_the_list():
    assert set(ON_A_GPU) <= {fault for rows in FAULTS.values() for fault in rows}


def test_the_list_is_the_designs():
    if not LIST.is_file():
        pytest.skip(f"the design's list of faults is not at {LIST}")
    tables, name = {}, None
    for line in LIST.read_text().splitlines():
        if line.startswith("## "):
            name = line[3:]
        cells = [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and not re.fullmatch("-+|fault", cells[0]):
            tables.setdefault(name, []).append(cells[0])
    assert tables and all(list(FAULTS[name]) == rows for name, rows in tables.items())
