"""The files of listed cases, refused without being read; and folds."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import touch

from dints.data.listing import Case, check_files, split_fold
from dints.errors import UserError


def check(root: Path, *entries: tuple[str | list[str], str]) -> None:
    """Check pairs of image or images and label, listed as a reader would."""
    cases = []
    for number, (images, label) in enumerate(entries):
        images = [images] if isinstance(images, str) else images
        paths = tuple(str(root / image) for image in images)
        cases.append(Case(f"{number}", paths, str(root / label), f"entry {number}"))
    check_files(cases, "my.json", root)


def refusal(root: Path, *entries: tuple) -> str:
    with pytest.raises(UserError, match=r"my\.json") as raised:
        check(root, *entries)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def root(tmp_path) -> Path:
    """Make a dataset's folder with something beside it."""
    touch(tmp_path, "outside.nii.gz")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# Files


@pytest.mark.fault("missing files")
def test_missing_files_are_counted_and_the_first_named(root):
    touch(root, "a/image.nii.gz", "a/label.nii.gz")
    (root / "folder.nii.gz").mkdir()
    folders = [(f"{folder}/image.nii.gz", f"{folder}/label.nii.gz") for folder in "abc"]
    # Neither a folder is a file nor a name that no file can have.
    message = refusal(
        root, *folders, ("folder.nii.gz", "nul\0.nii.gz"), ("half\ud800.nii", "d.nii")
    )
    assert "8 of the 10 files" in message and f"--root {root}" in message
    assert f"{root}/b/image.nii.gz" in message and "d.nii" not in message


@pytest.mark.parametrize("path", ["a.nii.gz.txt", "", "a.nii.gz\n"])
def test_files_that_are_not_nifti_are_refused(root, path):
    touch(root, "b.nii.gz", "c.nii.gz", "d.nii", *([path] if path else []))
    says = "1 of the 4 files .* do not end in .nii or .nii.gz, for example (?s:.*): convert"
    for entry in (("b.nii.gz", path), (path, "b.nii.gz")):
        with pytest.raises(UserError, match=says) as error:
            check(root, ("c.nii.gz", "d.nii"), entry)
        assert str(root / path) in str(error.value)


@pytest.mark.parametrize("path", ["{root}/../outside.nii.gz", "link.nii.gz"])
def test_files_outside_of_the_folder_and_links_are_taken_once(root, path):
    """Links are how people keep data; a file behind two names is still one file."""
    touch(root, "a.nii.gz", "b.nii.gz")
    (root / "link.nii.gz").symlink_to("../outside.nii.gz")
    entry = "a.nii.gz", path.format(root=root)
    check(root, entry)
    linked = root.parent / "linked"
    linked.symlink_to(root)
    check(linked, entry)
    says = (
        f"the label of entry 0 and an image of entry 1 are one file, {root.parent}/outside.nii.gz"
    )
    assert says in refusal(root, entry, ("../outside.nii.gz", "b.nii.gz"))


@pytest.mark.parametrize(
    ("second", "uses", "file"),
    [
        (("./sub/../a.nii", "b_label.nii"), "an image of entry 0 and an image of entry 1", "a.nii"),
        (("b.nii", "a.nii"), "an image of entry 0 and the label of entry 1", "a.nii"),
        ((["b.nii"] * 2, "b_label.nii"), "an image of entry 1 and an image of entry 1", "b.nii"),
    ],
)
def test_a_file_that_is_listed_twice_is_refused(root, second, uses, file):
    touch(root, "a.nii", "a_label.nii", "b.nii", "b_label.nii", "sub/c.nii")
    message = refusal(root, ("a.nii", "a_label.nii"), second)
    assert f"{uses} are one file, {root / file}: list every file once" in message


# Folds


@pytest.mark.parametrize(("num_cases", "num_folds"), [(3, 5), (17, 5), (16, 8)])
def test_folds_validate_every_case_once(num_cases, num_folds):
    cases = list(range(num_cases))
    if num_folds > num_cases:
        says = f"--num_folds {num_folds}, but there are only {num_cases} cases"
        with pytest.raises(UserError, match=says):
            split_fold(cases, num_folds, 0)
        return
    splits = [split_fold(cases, num_folds, fold) for fold in range(num_folds)]
    assert [case for _, validation in splits for case in validation] == cases  # contiguous folds
    sizes = [len(validation) for _, validation in splits]
    assert max(sizes) - min(sizes) <= 1
    for fold, (training, validation) in enumerate(splits):
        assert training == [case for case in cases if case not in validation]
        if num_cases % num_folds == 0:  # then it is the published split
            size = num_cases // num_folds
            assert validation == cases[fold * size : (fold + 1) * size]
    assert split_fold(cases, num_folds, "all") == (cases, [])


@pytest.mark.fault("fold out of range, -1, more folds than cases")
def test_too_few_cases_to_train_on_are_refused():
    for fold, given, left in ((0, "--fold 0 of --num_folds 2", 1), ("all", "--fold all", 2)):
        says = f"{given} leaves {left} of 2 cases to train on, and 3 are needed: give --fold all, "
        with pytest.raises(UserError, match=says):
            split_fold([1, 2], 2, fold, 3)
    assert split_fold([1, 2], 2, 0, 1) == ([2], [1])
