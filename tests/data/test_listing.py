"""The files of listed cases, refused without being read; and folds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from toys import touch

from dints.data.formats import read_dataset
from dints.data.listing import ListedCase, check_files, split_fold
from dints.data.tasks import TASKS
from dints.errors import UserError


def listed(root: Path, *entries: tuple[str | list[str], str]) -> list[ListedCase]:
    """List pairs of image or images and label as a reader would."""
    cases = []
    for number, (images, label) in enumerate(entries):
        images = [images] if isinstance(images, str) else images
        paths = tuple(str(root / image) for image in images)
        cases.append(ListedCase(f"{number}", paths, str(root / label), f"entry {number}"))
    return cases


def refusal(root: Path, *entries: tuple, allow_outside_root: bool = False) -> str:
    with pytest.raises(UserError, match=r"my\.json") as raised:
        check_files(listed(root, *entries), "my.json", root, allow_outside_root)
    return str(raised.value)


@pytest.fixture
def root(tmp_path) -> Path:
    """Make a dataset folder with something beside it."""
    touch(tmp_path, "outside.nii.gz", "data2/beside.nii.gz")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# Files


@pytest.mark.fault("missing files")
def test_missing_files_are_counted_and_the_first_named(root):
    touch(root, "a/image.nii.gz", "a/label.nii.gz")
    message = refusal(root, *((f"{folder}/image.nii.gz", f"{folder}/label.nii.gz") for folder in "abcd"))
    assert "6 of the 8 files" in message and f"--root {root}" in message and "\n" not in message
    assert f"{root}/b/image.nii.gz" in message and f"{root}/c/image.nii.gz" in message and "d/" not in message


@pytest.mark.parametrize(
    "path", ["folder.nii.gz", "nul\0.nii.gz", "half\ud800.nii.gz", "\0/a.nii.gz", "a" * 300 + ".nii"]
)
def test_what_is_no_file_is_missing(root, path):
    touch(root, "a.nii.gz")
    (root / "folder.nii.gz").mkdir()
    assert "1 of the 2 files" in refusal(root, (path, "a.nii.gz"))


@pytest.mark.parametrize(
    "path", ["a.nrrd", "a.nii.gz.txt", "a.gz", "a.nii.GZ.txt", "a", "", ".", "a.nii.gz\n", "nii", ".nii/"]
)
@pytest.mark.parametrize("is_label", [False, True])
def test_files_that_are_not_nifti_are_refused(root, path, is_label):
    touch(root, "b.nii.gz", "c.nii.gz", "d.nii", *([path] if path.startswith("a") else []))
    message = refusal(root, ("c.nii.gz", "d.nii"), ("b.nii.gz", path) if is_label else (path, "b.nii.gz"))
    assert "1 of the 4 files that my.json lists do not end in .nii or .nii.gz" in message
    assert str(root / path) in message and "convert" in message


@pytest.mark.parametrize(
    "path",
    [
        "../outside.nii.gz",
        "sub/../../outside.nii.gz",
        "{outside}",
        "link.nii.gz",
        "chain.nii.gz",
        "folder/outside.nii.gz",
        "../data2/beside.nii.gz",  # its path begins with that of the root
        "{root}/../outside.nii.gz",
    ],
)
@pytest.mark.parametrize("is_label", [False, True])
@pytest.mark.fault("../.., absolute paths, symlinks that leave the root")
def test_files_outside_root_are_refused_unless_allowed(root, path, is_label):
    touch(root, "a.nii.gz", "b.nii.gz", "c.nii.gz", "sub/d.nii.gz")
    (root / "link.nii.gz").symlink_to("../outside.nii.gz")
    (root / "chain.nii.gz").symlink_to("link.nii.gz")
    (root / "folder").symlink_to(root.parent)
    path = path.format(outside=root.parent / "outside.nii.gz", root=root)
    entries = [("a.nii.gz", "b.nii.gz"), ("c.nii.gz", path) if is_label else (path, "c.nii.gz")]
    message = refusal(root, *entries)
    assert "1 of the 4 files" in message and f"outside --root {root}" in message and "--allow_outside_root" in message
    real = root.parent / ("data2/beside.nii.gz" if "beside" in path else "outside.nii.gz")
    assert f"{root / path} (really {real})" in message
    check_files(listed(root, *entries), "my.json", root, allow_outside_root=True)


def test_files_outside_root_are_counted_though_they_are_missing(root):
    entries = ("../x.nii", "../y.nii"), ("a.nii", "/z.nii")
    assert f"3 of the 4 files that my.json lists are outside --root {root}" in refusal(root, *entries)
    assert "4 of the 4 files" in refusal(root, *entries, allow_outside_root=True)


def test_links_within_root_and_a_root_that_is_a_link_are_fine(root):
    touch(root, "store/a.nii.gz", "b.nii.gz")
    (root / "a.nii.gz").symlink_to("store/a.nii.gz")
    link = root.parent / "link"
    link.symlink_to(root)
    for entry in (("a.nii.gz", "b.nii.gz"), (f"{link}/a.nii.gz", f"{root}/b.nii.gz")):
        for folder in (root, link):
            check_files(listed(folder, entry), "my.json", folder, False)
    touch(root.parent, "b.nii.gz")
    check_files(listed(Path("/"), (f"{root}/a.nii.gz"[1:], f"{root.parent}/b.nii.gz")), "my.json", "/", False)


@pytest.mark.parametrize(
    ("second", "first_use", "second_use", "file"),
    [
        (("a.nii", "b_label.nii"), "an image of entry 0", "an image of entry 1", "a.nii"),
        (("./sub/../a.nii", "b_label.nii"), "an image of entry 0", "an image of entry 1", "a.nii"),
        (("link.nii", "b_label.nii"), "an image of entry 0", "an image of entry 1", "a.nii"),
        (("b.nii", "a_label.nii"), "the label of entry 0", "the label of entry 1", "a_label.nii"),
        (("b.nii", "a.nii"), "an image of entry 0", "the label of entry 1", "a.nii"),
        (("a_label.nii", "b_label.nii"), "the label of entry 0", "an image of entry 1", "a_label.nii"),
        (("b.nii", "b.nii"), "an image of entry 1", "the label of entry 1", "b.nii"),
        ((["b.nii", "b.nii"], "b_label.nii"), "an image of entry 1", "an image of entry 1", "b.nii"),
    ],
)
def test_a_file_that_is_listed_twice_is_refused(root, second, first_use, second_use, file):
    touch(root, "a.nii", "a_label.nii", "b.nii", "b_label.nii", "sub/c.nii")
    (root / "link.nii").symlink_to("a.nii")
    message = refusal(root, ("a.nii", "a_label.nii"), second)
    assert f"{first_use} and {second_use} are one file, {root / file}: list every file once" in message


# Folds


@pytest.mark.parametrize("num_cases", [2, 3, 5, 8, 17, 20, 41, 208])
@pytest.mark.parametrize("num_folds", [2, 3, 4, 5, 8])
def test_folds_validate_every_case_once(num_cases, num_folds):
    cases = list(range(num_cases))
    if num_folds > num_cases:
        with pytest.raises(UserError, match=f"--num_folds {num_folds}, but there are only {num_cases} cases"):
            split_fold(cases, num_folds, 0)
        return
    splits = [split_fold(cases, num_folds, fold) for fold in range(num_folds)]
    assert [case for _, validation in splits for case in validation] == cases  # each once, in contiguous folds
    sizes = [len(validation) for _, validation in splits]
    assert max(sizes) - min(sizes) <= 1
    for fold, (training, validation) in enumerate(splits):
        assert training == [case for case in cases if case not in validation]
        if num_cases % num_folds == 0:  # then it is the published split
            size = num_cases // num_folds
            assert validation == cases[fold * size : (fold + 1) * size]


@pytest.mark.parametrize("least_training", [0, 2])  # of a retraining, and of a search
@pytest.mark.parametrize("num_cases", [1, 2, 3, 4, 7])
def test_too_few_cases_are_refused_with_options_that_work(num_cases, least_training):
    """Whatever the fold: the options that the message gives are accepted, and without any there are too few cases."""
    cases, refusals = list(range(num_cases)), 0
    for num_folds in (2, 3, 5):
        for fold in (*range(num_folds), "all"):
            try:
                training, _ = split_fold(cases, num_folds, fold, least_training)
            except UserError as error:
                refusals += 1
                remedy = str(error).partition(": ")[2]
                found = re.fullmatch(r"give (?:--num_folds (\d+)( --fold 0)?, or )?--fold all, .*", remedy)
                assert (found is None) == (num_cases < least_training), error
                if found is None:
                    assert remedy == f"add labelled cases, {least_training} at least"
                    continue
                split_fold(cases, num_folds, "all", least_training)
                if found[1]:
                    split_fold(cases, int(found[1]), 0 if found[2] else fold, least_training)
                    assert found[2] or fold < int(found[1])
            else:
                assert len(training) >= least_training
    assert refusals or num_cases > 4


def test_fold_all_trains_on_every_case():
    assert split_fold([1, 2, 3], 5, "all") == ([1, 2, 3], [])


def test_task04_is_split_into_four_folds_of_52(task04):
    task, cases = read_dataset(task04)
    assert task == TASKS["Task04_Hippocampus"] and len(cases) == 208 and cases[0].name == "hippocampus_003"
    for fold in range(4):
        training, validation = split_fold(cases, 4, fold)
        assert (len(training), len(validation)) == (156, 52)
        assert validation == cases[52 * fold : 52 * (fold + 1)]
