"""Fetch tasks of the Medical Segmentation Decathlon (MSD).

    python download_msd_datasets.py --msd_task Task09_Spleen

puts ``./data_msd/Task09_Spleen/{dataset.json,imagesTr,labelsTr,imagesTs}`` in place; ``--msd_task
all`` fetches ten.

Nothing takes its final name before it is whole. The archive arrives as ``<Task>.tar.partial``,
which the same command continues after a cut, and becomes ``<Task>.tar`` when its md5 is right. It
is unpacked in ``<Task>.partial_extract``, and that becomes ``<Task>`` when every file that its
dataset.json names is there. A folder that is complete is left alone; in one that is not, the
archive's files are replaced and all others stay.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import requests
from tqdm import tqdm

from dints import options
from dints.data.formats import read_json
from dints.data.tasks import ARCHIVE_URL, ARCHIVES, Archive
from dints.errors import UserError, exit_on_user_error

CHUNK = 1 << 16  # bytes; what a cut connection loses at most
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before another attempt
MAX_MEMBERS, MAX_BYTES = 20_000, 100 * 10**9  # the largest task has under 3,000 members and 30 GB


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        description="Download, check and unpack tasks of the Medical Segmentation Decathlon.",
        epilog="After an interruption, the same command continues. An archive at <root>/<Task>.tar "
        "is used.",
    )
    add, choices = parser.add_argument, [*ARCHIVES, "all"]
    tasks_help = "one or several of %(choices)s (default: Task09_Spleen)"
    add(
        "--msd_task",
        nargs="+",
        choices=choices,
        default=["Task09_Spleen"],
        metavar="TASK",
        help=tasks_help,
    )
    add(
        "--root",
        type=Path,
        default=Path("data_msd"),
        help="folder of the tasks' folders (default: ./data_msd)",
    )
    add(
        "--keep_archive",
        action="store_true",
        help="keep <root>/<Task>.tar after unpacking (default: delete it)",
    )
    add(
        "--url",
        default=ARCHIVE_URL,
        help="the archive's http(s) address; {task}: the task (default: %(default)s)",
    )
    md5_help = (
        "digest of an archive other than the published one; 'none' takes any, but never "
        "continues a partial one"
    )
    add("--md5", type=str.lower, help=md5_help)
    add(
        "--retries",
        type=int,
        default=3,
        help="attempts after one that brought nothing (default: %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=10.0,
        help="seconds to connect, and between bytes (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.msd_task = list(ARCHIVES) if "all" in args.msd_task else list(dict.fromkeys(args.msd_task))
    several, md5 = len(args.msd_task) > 1, args.md5 or "none"
    complaints = {
        f"--url {args.url} is not an http or https address": not re.match(
            "https?://[^/]", args.url
        ),
        f"--url {args.url} needs {{task}} in it for several tasks": several
        and "{task}" not in args.url,
        f"--md5 {md5} is neither 32 hexadecimal digits nor 'none'": not re.fullmatch(
            "[0-9a-f]{32}|none", md5
        ),
        f"--md5 {md5} is of one archive, but --msd_task names several": several and md5 != "none",
        f"--retries {args.retries} must be 0 or more": args.retries < 0,
        f"--timeout {args.timeout} must be more than 0 and at most 3600 seconds": not 0
        < args.timeout
        <= 3600,
    }
    if any(complaints.values()):
        parser.error("; ".join(complaint for complaint, holds in complaints.items() if holds))
    return args


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"Python {sys.version.split()[0]} has no tarfile.data_filter: use 3.11.4 or newer"
        )
    failures = []
    for task in args.msd_task:
        try:
            fetch_task(task, args)
        except (UserError, OSError) as error:  # other tasks may still succeed
            remedy = (
                ""
                if isinstance(error, UserError)
                else (f": check the space and permissions of --root {args.root}")
            )
            failures.append(f"{task}: {error}{remedy}")
            logging.warning("%s failed", task)
        except KeyboardInterrupt:
            logging.warning(
                "interrupted: what has arrived is kept in %s, and the same command continues",
                args.root,
            )
            sys.exit(130)
    if failures:
        count = (
            f"{len(failures)} of {len(args.msd_task)} tasks failed: "
            if len(args.msd_task) > 1
            else ""
        )
        raise UserError(count + "; ".join(failures))


def fetch_task(task: str, args: argparse.Namespace) -> None:
    """Bring one task's folder into being, from wherever an earlier run stopped."""
    folder, archive = args.root / task, args.root / f"{task}.tar"
    if is_complete(folder):
        return
    args.root.mkdir(parents=True, exist_ok=True)
    md5 = None if args.md5 == "none" else args.md5 or ARCHIVES[task].md5
    was_there = archive.exists()
    if not was_there:
        download_archive(args.url.replace("{task}", task), archive, md5, args.retries, args.timeout)
    elif md5 and (digest := md5_of(archive)) != md5:
        remedy = f"delete it to download it again, or give --md5 {digest} if it is meant"
        raise UserError(f"{archive} has the md5 {digest}, not {md5}: {remedy}")
    if md5 is None:
        logging.warning("--md5 none: nothing vouches for %s but its number of cases", archive)
    unpack_archive(archive, folder, verified=md5 is not None)
    if was_there or args.keep_archive:
        logging.info("%s stays; delete it if you do not need it", archive)
    else:
        archive.unlink()
    logging.info("%s is complete", folder)


def is_complete(folder: Path) -> bool:
    """Tell whether nothing needs doing, and log that or what is amiss."""
    if not os.path.lexists(folder):
        return False
    try:
        training, tests = count_cases(folder)
    except UserError as error:
        if folder.is_symlink() or not folder.is_dir():
            raise UserError(
                f"{folder} is a link or a file, not the whole task ({error}): move it away"
            ) from error
        logging.warning("%s is incomplete and will be repaired: %s", folder, error)
        return False
    logging.info(
        "%s is complete, nothing to do (%d training, %d test cases)", folder, training, tests
    )
    return True


def count_cases(folder: Path) -> tuple[int, int]:
    """Count the training and test cases of ``dataset.json``; `UserError` unless every file of
    theirs is there.
    """
    if not (folder / "dataset.json").is_file():
        raise UserError("there is no dataset.json")
    description = read_json(folder / "dataset.json")
    try:
        training, tests = description["training"], description.get("test", [])
        names = [case[key] for case in training for key in ("image", "label")]
        names += [case["image"] if isinstance(case, dict) else case for case in tests]
        missing = [name for name in names if not holds_file(folder, name)]
    except (KeyError, TypeError) as error:
        raise UserError(
            "dataset.json must list 'training', with 'image' and 'label' each, and 'test'"
        ) from error
    if not training:
        raise UserError("dataset.json names no training case")
    if missing:
        count = f"{len(missing)} of the {len(names)} files in dataset.json"
        raise UserError(f"{count} are missing or empty, for example {missing[0]!a:.200}")
    return len(training), len(tests)


def holds_file(folder: Path, name: str) -> bool:
    """Tell whether a path of dataset.json is that of a file in the folder, and not an empty one."""
    path, parts = os.path.join(folder, name), PurePosixPath(name).parts
    return (
        "/" not in parts
        and ".." not in parts
        and os.path.isfile(path)
        and os.path.getsize(path) > 0
    )


def md5_of(path: Path) -> str:
    """Return the md5 of a file of any size."""
    logging.info("checking %s", path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download_archive(
    url: str, archive: Path, md5: str | None, retries: int, timeout: float
) -> None:
    """Download the archive, continuing a partial one; where the pieces do not fit, all is
    downloaded once more.
    """
    partial = archive.with_name(f"{archive.name}.partial")
    for _ in range(2):
        logging.info("downloading %s", url)
        # only an md5 tells what fits
        joined = complete_partial(url, partial, md5 is not None, retries, timeout)
        digest = md5_of(partial) if md5 else None
        if digest == md5:
            os.replace(partial, archive)
            return
        partial.unlink()
        if not joined:
            break
        logging.warning("%s was joined from pieces that do not fit; it was deleted", partial)
    remedy = f"it was deleted: run again, or give --md5 {digest} if this archive is meant"
    raise UserError(f"{url} sent an archive with the md5 {digest}, not {md5}; {remedy}")


def complete_partial(url: str, partial: Path, resume: bool, retries: int, timeout: float) -> bool:
    """Transfer until the partial file is whole, with growing pauses; return whether it is joined
    from pieces.
    """
    session = requests.Session()
    session.max_redirects = 5
    if url.startswith("https:"):
        del session.adapters["http://"]  # so that no redirect leaves https
    failures, furthest = 0, size_of(partial)
    while True:
        try:
            return transfer(session, url, partial, resume, timeout)
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            arrived = size_of(partial)
            failures = 1 if arrived > furthest else failures + 1
            furthest = max(furthest, arrived)
            if failures > retries:
                remedy = (
                    f"{arrived} bytes have arrived: try the same command later, or more "
                    "--retries or --timeout"
                )
                raise UserError(
                    f"{url} failed in attempt {failures} of {retries + 1}: {error}; {remedy}"
                ) from error
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
            logging.warning("%s; retry %d of %d in %g s", error, failures, retries, wait)
            time.sleep(wait)
        # ValueError: no host or port is called so
        except (requests.RequestException, ValueError) as error:
            raise UserError(
                f"{url} cannot be fetched or redirects where it must not ({error}): check --url"
            ) from error


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def transfer(
    session: requests.Session, url: str, partial: Path, resume: bool, timeout: float
) -> bool:
    """Make one attempt at what the partial file lacks; return whether the file is joined from
    pieces.
    """
    have = size_of(partial) if resume else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
        if have and response.status_code == 416:
            return True  # there is no more; whether this is the archive, its md5 tells
        check_answer(response)
        if response.status_code == 200:  # the file from its beginning
            have, total = 0, int(response.headers.get("Content-Length", 0))
        elif part := re.fullmatch(
            rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", "")
        ):
            total = int(part[1])
        else:
            partial.unlink(missing_ok=True)
            raise requests.ConnectionError(
                f"{url} sends another part than was asked for: starting over"
            )
        check_space(partial.parent, total - size_of(partial) + total)
        receive(response, partial, have, total)
    return have > 0


def check_answer(response: requests.Response) -> None:
    """Let only (a part of) an archive pass; 5xx and 429 may be retried, everything else is
    final.
    """
    answer = f"{response.url} answers {response.status_code} {response.reason!a}"
    if response.status_code >= 500 or response.status_code == 429:
        raise requests.ConnectionError(answer)
    if response.status_code not in (200, 206):
        raise UserError(f"{answer}: check --url, or try later")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise UserError(f"{response.url} answers with a web page, not with an archive: check --url")


def check_space(root: Path, needed: int) -> None:
    """Refuse what will not fit; the archives are not compressed, so unpacked they are about as
    large.
    """
    free = shutil.disk_usage(root).free
    if needed > free:
        sizes = f"{needed / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free"
        raise UserError(f"--root {root}: {sizes}: free some, or name a folder on another disk")


def receive(response: requests.Response, partial: Path, have: int, total: int) -> None:
    """Write the body after the ``have`` bytes of the file's ``total`` (0: the server does not
    say).
    """
    bar = tqdm(
        desc=partial.stem,
        total=total or None,
        initial=have,
        unit="B",
        unit_scale=True,
        disable=None,
    )
    with partial.open("ab" if have else "wb") as file, bar:
        for chunk in response.iter_content(CHUNK):
            have += file.write(chunk)
            bar.update(len(chunk))
            if have > (total or MAX_BYTES):
                partial.unlink()
                raise UserError(
                    f"{response.url} sends more than {total or MAX_BYTES} bytes; "
                    "deleted: check --url"
                )
    if have < total:
        raise requests.ConnectionError(f"{response.url} was cut at {have} of {total} bytes")


def unpack_archive(archive: Path, folder: Path, verified: bool) -> None:
    """Unpack beside the task's folder, check what came out, and put it in place."""
    check_space(folder.parent, archive.stat().st_size)
    unpacked = folder.with_name(f"{folder.name}.partial_extract")
    shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
    unpacked.mkdir()  # fails where something else is in the way, such as a link to elsewhere
    try:
        with tarfile.open(archive, "r:") as tar:
            members = checked_members(tar, folder.name)
            bar = tqdm(members, f"unpacking {folder.name}", unit=" files", disable=None)
            tar.extractall(unpacked, bar, filter="data")
        check_counts(unpacked / folder.name, ARCHIVES[folder.name], verified)
        put_in_place(unpacked / folder.name, folder)
    except UserError as error:
        raise UserError(f"{archive}: {error}; delete it to download it again") from error
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(
            f"{archive} is damaged or no uncompressed tar ({error!a}): delete it and run again"
        ) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def checked_members(tar: tarfile.TarFile, task: str) -> list[tarfile.TarInfo]:
    """Look at every member before one is written; return all but ``._*`` (macOS AppleDouble) files.

    The filter ``data`` looks at a member only when its turn comes, and lets links inside the folder
    pass.
    """
    members, size = {}, 0
    for number, member in enumerate(tar, start=1):
        path = PurePosixPath(member.name)
        size += member.size
        if number > MAX_MEMBERS or size > MAX_BYTES:
            fault = f"is more than {MAX_MEMBERS} members or {MAX_BYTES} bytes"
        elif not member.isdir() and (not member.isreg() or member.issparse() or member.size < 0):
            fault = "is no plain file or folder"
        elif path.name.startswith("._") or not path.parts:
            continue
        elif path.parts[0] != task or ".." in path.parts:
            fault = f"is not in {task}/"
        elif (key := str(path).casefold()) in members and not (
            member.isdir() and members[key].isdir()
        ):
            fault = "is there twice"  # or would be, on a disk that does not tell capitals
        else:
            members[key] = member
            continue
        raise UserError(
            f"member {member.name!a:.200} {fault}: nothing was unpacked, check --msd_task and --url"
        )
    return list(members.values())


def check_counts(folder: Path, published: Archive, verified: bool) -> None:
    """Check that no file is missing, and that there are as many cases as dataset.json says and were
    published.

    Where the md5 is right, another number is a remark, for publishers miscount: the description of
    Task08_HepaticVessel is quoted with 140 test cases, not 139.
    """
    found, right = count_cases(folder), (published.num_training, published.num_test)
    description = read_json(folder / "dataset.json")
    stated = description.get("numTraining", right[0]), description.get("numTest", right[1])
    if found == right == stated:
        return
    fault = (
        f"it holds {found} training and test cases, says that it holds {stated}, and {right} "
        "were published"
    )
    if not verified:
        raise UserError(
            f"{fault}: if this is meant, give the archive's digest with --md5, not 'none'"
        )
    logging.warning("%s: %s; taken as it is because its md5 is right", folder.name, fault)


def put_in_place(whole: Path, folder: Path) -> None:
    """Give the whole folder its final name, or its files to an incomplete folder that has the
    name.
    """
    if not folder.exists():
        os.replace(whole, folder)
        return
    # goes first and comes last: until then the folder counts as incomplete
    description = whole / "dataset.json"
    (folder / description.name).unlink(missing_ok=True)
    for path in [
        *(path for path in whole.rglob("*") if path.is_file() and path != description),
        description,
    ]:
        target = folder / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


if __name__ == "__main__":
    exit_on_user_error(main, parse_args())
