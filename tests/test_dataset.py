"""dints/dataset.py: the cases of a dataset.json in either form, what is refused without reading voxels, and folds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dints.dataset import Case, names, read_cases, split_fold
from dints.errors import UserError
from dints.tasks import read_json

TWO_CHANNELS = {"modality": {"0": "T2", "1": "ADC"}}
NNUNET = {"channel_names": {"0": "T2", "1": "ADC"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}


def write(root: Path, *paths: str) -> None:
    """Empty files: cases are listed and checked without being read."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def listing(*entries: object) -> dict:
    """A list of cases, each an entry or a pair of image and label."""
    return {"training": [dict(zip(("image", "label"), e, strict=True)) if isinstance(e, tuple) else e for e in entries]}


def refusal(description: dict, root: Path, key: str = "training", **options: bool) -> str:
    with pytest.raises(UserError) as raised:
        read_cases(description, "my.json", root, key, **options)
    message = str(raised.value)
    assert "my.json" in message and "\n" not in message
    return message


def numbered(count: int) -> list[Case]:
    return [Case(f"{number}", (f"image{number}",), f"label{number}") for number in range(count)]


@pytest.fixture
def root(tmp_path) -> Path:
    """A dataset folder with something beside it."""
    write(tmp_path, "outside.nii.gz", "data2/beside.nii.gz")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# Lists of cases (MSD)


def test_a_list_of_cases(root):
    write(root, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "b_image.nii", "b_label.nii")
    description = listing(
        ("./imagesTr/a.nii.gz", "imagesTr/../labelsTr/a.nii.gz"), (f"{root}/b_image.nii", "b_label.nii")
    )
    cases = read_cases(description, "my.json", root)
    assert cases == [
        Case("a", (f"{root}/imagesTr/a.nii.gz",), f"{root}/imagesTr/../labelsTr/a.nii.gz"),
        Case("b_image", (f"{root}/b_image.nii",), f"{root}/b_label.nii"),
    ]
    assert names(cases) == ["a.nii.gz", "b_image.nii"]
    assert cases[0].files == (cases[0].images[0], cases[0].label)
    assert Case("a", ("a.nii", "b.nii")).files == ("a.nii", "b.nii")


@pytest.mark.parametrize(
    ("images", "name"),
    [
        (["a_0000.nii.gz", "a_0001.nii.gz"], "a"),
        (["a_t2.nii.gz", "a_adc.nii.gz"], "a_t2"),
        (["a_0000.nii.gz"], "a_0000"),  # one file that holds both channels
        ("a_0000.nii.gz", "a_0000"),
    ],
)
def test_an_entry_names_one_file_or_one_a_channel(root, images, name):
    files = [images] if isinstance(images, str) else images
    write(root, "label.nii.gz", *files)
    cases = read_cases({**TWO_CHANNELS, **listing((images, "label.nii.gz"))}, "my.json", root)
    assert cases == [Case(name, tuple(f"{root}/{file}" for file in files), f"{root}/label.nii.gz")]
    assert names(cases) == files


@pytest.mark.parametrize("count", [3, 4])
def test_files_and_channels_that_do_not_match(root, count):
    images = [f"a{channel}.nii.gz" for channel in range(count)]
    write(root, "good.nii.gz", "good_label.nii.gz", "label.nii.gz", *images)
    description = {**TWO_CHANNELS, **listing(("good.nii.gz", "good_label.nii.gz"), (images, "label.nii.gz"))}
    message = refusal(description, root)
    assert f"entry 1 of 'training' has {count} image files for 2 channels (T2, ADC): list one a channel" in message


def test_paths_are_absolute_though_root_is_not(root, monkeypatch):
    write(root, "a.nii.gz", "b.nii.gz")
    monkeypatch.chdir(root.parent)
    for relative in ("data", Path("data"), "./data/"):
        (case,) = read_cases(listing(("a.nii.gz", "b.nii.gz")), "my.json", relative)
        assert case.files == (f"{root}/a.nii.gz", f"{root}/b.nii.gz")


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({"validation": [], "test": [1]}, ["'training'", "--json_key", "validation, test"]),
        ({"name": "x"}, ["'training'", "--json_key", "none"]),
        ({"training": [], "name": "x"}, ["'training'", "--json_key"]),
        ({"training": {"image": "a"}}, ["'training'", "--json_key"]),
        ({**NNUNET, "training": []}, ["'training'", "--json_key"]),
        ({"training": ["a.nii.gz"]}, ["entry 0 of 'training'", "'image' and 'label'", "'a.nii.gz'"]),
        ({"training": [None]}, ["entry 0 of 'training'", "None"]),
        ({"training": [{"image": "a.nii.gz"}]}, ["entry 0 of 'training'", "'label'"]),
        ({"training": [{"label": "a.nii.gz"}]}, ["entry 0 of 'training'", "'image'"]),
        ({"training": [{"image": "a.nii", "label": ["c.nii"]}]}, ["entry 0 of 'training'", "['c.nii']"]),
        ({"training": [{"image": "a", "label": "b"}, {"image": 3, "label": "c"}]}, ["entry 1 of 'training'", "3"]),
        ({"training": [{"image": ["a", 3], "label": "c"}]}, ["entry 0 of 'training'", "['a', 3]"]),
        ({"training": [{"image": [], "label": "c"}]}, ["entry 0 of 'training'", "[]"]),
        ({"training": [{"image": {"0": "a"}, "label": "c"}]}, ["entry 0 of 'training'", "{'0': 'a'}"]),
        ({"training": [{"image": ["a", "b"], "label": "c"}]}, ["'modality'"]),  # how many there are to be
    ],
)
def test_a_malformed_case_list_is_named(description, expected):
    message = refusal(description, Path("root"))
    assert all(part in message for part in expected), message


def test_the_key_that_nnunets_folders_answer_to_is_named(root):
    assert "no cases under 'mine': give --json_key (lists in the file: training)" in refusal(NNUNET, root, "mine")


# Files


@pytest.mark.parametrize("nnunet", [False, True])
def test_missing_files_are_counted_and_the_first_named(root, nnunet):
    write(root, "a/image.nii.gz", "a/label.nii.gz")
    entries = [(f"{folder}/image.nii.gz", f"{folder}/label.nii.gz") for folder in "abcd"]
    description = listing(*entries)
    if nnunet:
        items = {image[0]: {"images": [image], "label": label} for image, label in entries}
        description = {"channel_names": {"0": "CT"}, "dataset": items}
    message = refusal(description, root)
    assert "6 of the 8 files" in message and f"--root {root}" in message
    assert f"{root}/b/image.nii.gz" in message and f"{root}/c/image.nii.gz" in message and "d/" not in message


@pytest.mark.parametrize(
    "path", ["folder.nii.gz", "nul\0.nii.gz", "half\ud800.nii.gz", "\0/a.nii.gz", "a" * 300 + ".nii"]
)
def test_what_is_no_file_is_missing(root, path):
    write(root, "a.nii.gz")
    (root / "folder.nii.gz").mkdir()
    assert "1 of the 2 files" in refusal(listing((path, "a.nii.gz")), root)


@pytest.mark.parametrize(
    "path", ["a.nrrd", "a.nii.gz.txt", "a.gz", "a.nii.GZ", "a", "", ".", "a.nii.gz\n", "nii", ".nii/"]
)
@pytest.mark.parametrize("is_label", [False, True])
def test_files_that_are_not_nifti_are_refused(root, path, is_label):
    write(root, "b.nii.gz", "c.nii.gz", "d.nii", *([path] if path.startswith("a") else []))
    pair = ("b.nii.gz", path) if is_label else (path, "b.nii.gz")
    with pytest.raises(UserError) as raised:
        read_cases(listing(("c.nii.gz", "d.nii"), pair), "my.json", root)
    message = str(raised.value)
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
def test_files_outside_root_are_refused_unless_allowed(root, path, is_label):
    write(root, "a.nii.gz", "b.nii.gz", "c.nii.gz", "sub/d.nii.gz")
    (root / "link.nii.gz").symlink_to("../outside.nii.gz")
    (root / "chain.nii.gz").symlink_to("link.nii.gz")
    (root / "folder").symlink_to(root.parent)
    path = path.format(outside=root.parent / "outside.nii.gz", root=root)
    description = listing(("a.nii.gz", "b.nii.gz"), ("c.nii.gz", path) if is_label else (path, "c.nii.gz"))
    message = refusal(description, root)
    assert "1 of the 4 files" in message and f"outside --root {root}" in message and "--allow_outside_root" in message
    real = root.parent / ("data2/beside.nii.gz" if "beside" in path else "outside.nii.gz")
    assert f"{root / path} (really {real})" in message
    _, case = read_cases(description, "my.json", root, allow_outside_root=True)
    assert str(root / path) in case.files


def test_files_outside_root_are_counted_though_they_are_missing(root):
    description = listing(("../x.nii", "../y.nii"), ("a.nii", "/z.nii"))
    assert f"3 of the 4 files that my.json lists are outside --root {root}" in refusal(description, root)
    assert "4 of the 4 files" in refusal(description, root, allow_outside_root=True)


def test_links_within_root_and_a_root_that_is_a_link_are_fine(root):
    write(root, "store/a.nii.gz", "b.nii.gz")
    (root / "a.nii.gz").symlink_to("store/a.nii.gz")
    link = root.parent / "link"
    link.symlink_to(root)
    for entry in (("a.nii.gz", "b.nii.gz"), (f"{link}/a.nii.gz", f"{root}/b.nii.gz")):
        for folder in (root, link):
            assert read_cases(listing(entry), "my.json", folder)[0].name == "a"
    write(root.parent, "b.nii.gz")
    (case,) = read_cases(listing((f"{root}/a.nii.gz"[1:], f"{root.parent}/b.nii.gz")), "my.json", "/")
    assert case.images == (f"{root}/a.nii.gz",)


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
    write(root, "a.nii", "a_label.nii", "b.nii", "b_label.nii", "sub/c.nii")
    (root / "link.nii").symlink_to("a.nii")
    message = refusal({**TWO_CHANNELS, **listing(("a.nii", "a_label.nii"), second)}, root)
    assert (
        f"{first_use} of 'training' and {second_use} of 'training' are one file, {root / file}: list every file once"
        in message
    )


# nnU-Net v2


def write_nnunet(root: Path, *cases: str, ending: str = ".nii.gz") -> None:
    for case in cases:
        write(root, f"labelsTr/{case}{ending}", *(f"imagesTr/{case}_000{channel}{ending}" for channel in range(2)))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nnunets_folders(root, ending):
    write_nnunet(root, "b_1", "b", "a", ending=ending)
    # Other files are none of its business, nor what macOS leaves behind.
    write(root, "imagesTs/c_0000.nii.gz", "labelsTr/notes.txt", "labelsTr/._a.nii.gz", "imagesTr/._a_0000.nii.gz")
    cases = read_cases({**NNUNET, "file_ending": ending}, "my.json", root)
    assert [case.name for case in cases] == ["a", "b", "b_1"]
    assert cases[0] == Case(
        "a", (f"{root}/imagesTr/a_0000{ending}", f"{root}/imagesTr/a_0001{ending}"), f"{root}/labelsTr/a{ending}"
    )
    assert names(cases[:1]) == [f"a_0000{ending}", f"a_0001{ending}"]


def test_nnunets_ending_is_nii_gz_unless_it_says_otherwise(root):
    write_nnunet(root, "a")
    description = {key: value for key, value in NNUNET.items() if key != "file_ending"}
    assert read_cases(description, "my.json", root) == read_cases(NNUNET, "my.json", root)


def test_channels_from_the_tenth_on(root):
    channels = {str(channel): f"c{channel}" for channel in range(12)}
    write(root, "labelsTr/a.nii.gz", *(f"imagesTr/a_{channel:04d}.nii.gz" for channel in range(12)))
    (case,) = read_cases({**NNUNET, "channel_names": channels}, "my.json", root)
    assert case.images[2].endswith("a_0002.nii.gz") and case.images[11].endswith("a_0011.nii.gz")


def test_nnunets_dataset_object(root):
    write(root, "x/1.nii.gz", "x/2.nii.gz", "y.nii", "labelsTr/other.nii.gz")
    description = {**NNUNET, "dataset": {"case 7": {"images": ["x/1.nii.gz", "x/2.nii.gz"], "label": "y.nii"}}}
    (case,) = read_cases(description, "my.json", root)
    assert case == Case("case 7", (f"{root}/x/1.nii.gz", f"{root}/x/2.nii.gz"), f"{root}/y.nii")


def test_a_list_of_cases_comes_before_nnunets_folders(root):
    write_nnunet(root, "a")
    write(root, "b.nii", "b_label.nii")
    (case,) = read_cases({**NNUNET, **listing(("b.nii", "b_label.nii"))}, "my.json", root)
    assert case.name == "b"


@pytest.mark.parametrize("ending", [".png", ".nrrd", "nii.gz", "", None, [".nii"]])
def test_nnunets_other_files_are_to_be_converted(root, ending):
    write_nnunet(root, "a", ending=ending if isinstance(ending, str) else ".nii")
    assert f"'file_ending' is {ending!r}: convert" in refusal({**NNUNET, "file_ending": ending}, root)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], ["labelsTr cannot be read (No such file or directory)", "--root"]),
        (["labelsTr"], ["labelsTr cannot be read (Not a directory)", "--root"]),
        (["labelsTr/a.nii", "imagesTr/a_0000.nii"], ["labelsTr has no .nii.gz file", "'file_ending'", "--root"]),
        (["labelsTr/a.nii.gz"], ["imagesTr cannot be read (No such file or directory)"]),
        (["labelsTr/a.nii.gz", "imagesTr/a_0000.nii.gz"], ["1 of the 3 files", "imagesTr/a_0001.nii.gz"]),
        (
            ["labelsTr/a.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz"],
            ["2 files in", "imagesTr are not <case>_0000 to <case>_0001", "b_0000.nii.gz: add its label"],
        ),
        (
            ["labelsTr/a.nii.gz", *(f"imagesTr/a_000{channel}.nii.gz" for channel in range(3))],
            ["1 files in", "a_0002.nii.gz"],
        ),
        (["labelsTr/a.nii.gz", "imagesTr/a.nii.gz"], ["1 files in", "for example a.nii.gz"]),
    ],
)
def test_what_nnunets_folders_lack(root, files, expected):
    write(root, *files)
    message = refusal(NNUNET, root)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({}, "'dataset' must be an object such as"),
        ("BraTS", "'dataset' must be an object such as .* not 'BraTS'"),
        ([{"images": ["a"], "label": "b"}], "'dataset' must be an object such as"),
        ({"a": None}, "case 'a' of 'dataset' needs the paths 'images' and 'label', and is None"),
        ({"a": {"images": ["0.nii", "1.nii"]}}, "case 'a' of 'dataset' needs the paths 'images' and 'label'"),
        ({"a": {"image": "0.nii", "label": "l.nii"}}, "case 'a' of 'dataset' needs the paths 'images' and 'label'"),
        ({"a": {"images": ["0.nii"], "label": "l.nii"}}, "case 'a' of 'dataset' has 1 image files for 2 channels"),
        ({"a": {"images": "0.nii", "label": "l.nii"}}, "case 'a' of 'dataset' has 1 image files for 2 channels"),
        ({"a": {"images": ["0.nii", "2.nii"], "label": "l.nii"}}, "1 of the 3 files .* are not under --root .*/2.nii"),
        ({"a": {"images": ["0.nii", "1.nii"], "label": "l.png"}}, "1 of the 3 files .* do not end in .nii .*/l.png"),
        ({"a": {"images": ["0.nii", "1.nii"], "label": "../outside.nii.gz"}}, "1 of the 3 files .* outside --root"),
        (
            {name: {"images": [f"{name}.nii", "1.nii"], "label": f"{name}.nii.gz"} for name in "01"},
            "an image of case '0' of 'dataset' and an image of case '1' of 'dataset' are one file",
        ),
        *(
            ({name: {"images": ["0.nii", "1.nii"], "label": "l.nii"}}, "a name that no file can have: rename it")
            for name in ("", "../a", "a/b", "..", "a/", ".a")
        ),
    ],
)
def test_a_dataset_object_that_is_refused(root, dataset, expected):
    write(root, "0.nii", "1.nii", "l.nii", "l.png", "0.nii.gz", "1.nii.gz")
    assert re.search(expected, refusal({**NNUNET, "dataset": dataset}, root))


# Folds


@pytest.mark.parametrize("num_cases", [2, 3, 5, 8, 17, 20, 41, 208])
@pytest.mark.parametrize("num_folds", [2, 3, 4, 5, 8])
def test_folds_validate_every_case_once(num_cases, num_folds):
    cases = numbered(num_cases)
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


def test_fold_all_trains_on_every_case():
    assert split_fold(numbered(3), 5, "all") == (numbered(3), [])


def test_task04_is_split_into_four_folds_of_52(task04):
    cases = read_cases(read_json(task04 / "dataset.json"), task04 / "dataset.json", task04)
    assert len(cases) == 208
    assert (cases[0].name, names(cases[:1])) == ("hippocampus_003", ["hippocampus_003.nii.gz"])
    for fold in range(4):
        training, validation = split_fold(cases, 4, fold)
        assert (len(training), len(validation)) == (156, 52)
        assert validation == cases[52 * fold : 52 * (fold + 1)]
