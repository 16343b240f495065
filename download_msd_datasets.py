"""Fetch tasks of the Medical Segmentation Decathlon (MSD).

    python download_msd_datasets.py --msd_task Task09_Spleen

puts ``./data_msd/Task09_Spleen/{dataset.json,imagesTr,labelsTr,imagesTs}`` in place; ``--msd_task all`` fetches ten.

Nothing takes its final name before it is whole. The archive arrives as ``<Task>.tar.partial``, which the same command
continues after a cut, and becomes ``<Task>.tar`` when its md5 is right. It is unpacked in ``<Task>.partial_extract``,
and that becomes ``<Task>`` when every file that its dataset.json names is there. A folder that is complete is left
alone; one that is not is replaced, and files in it that do not come from the archive are moved along.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin, urlsplit

import requests
from tqdm import tqdm

from dints.data.formats import read_json
from dints.data.tasks import ARCHIVE_URL, ARCHIVES, Archive
from dints.errors import UserError, exit_on_user_error

CHUNK = 1 << 16  # bytes; what a cut connection loses at most
MAX_REDIRECTS = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before another attempt
MAX_MEMBERS, MAX_UNPACKED = 20_000, 100 * 10**9  # the largest task has under 3,000 members and 30 GB
MAX_NAME, MAX_PARTS = 200, 10  # characters of a name in an archive, and folders around it
NUMBER = "[0-9]{1,18}"  # of bytes, in a server's answer
MARKER = ".complete"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Download, check and unpack tasks of the Medical Segmentation Decathlon.",
        epilog="After an interruption, the same command continues.",
    )
    add = parser.add_argument_group("what, and where to").add_argument
    tasks_help = "one or several of %(choices)s (default: Task09_Spleen)"
    choices = [*ARCHIVES, "all"]
    add("--msd_task", nargs="+", choices=choices, default=["Task09_Spleen"], metavar="TASK", help=tasks_help)
    add("--root", type=Path, default=Path("data_msd"), help="folder of the tasks' folders (default: ./data_msd)")
    add("--keep_archive", action="store_true", help="keep <root>/<Task>.tar after unpacking (default: delete it)")
    add = parser.add_argument_group("where from").add_argument
    url_help = "a mirror's archive, http or https; {task} stands for the task's name (default: %(default)s)"
    add("--url", type=mirror_url, default=ARCHIVE_URL, help=url_help)
    md5_help = "digest of an archive other than the published one, or 'none' to take any (default: the published one)"
    add("--md5", type=md5_digest, help=md5_help)
    add = parser.add_argument_group("connection").add_argument
    retries_help = "further attempts after one that brought nothing (default: %(default)s)"
    add("--retries", type=int, default=3, help=retries_help)
    timeout_help = "seconds to wait for a connection, and for the next bytes (default: %(default)s)"
    add("--timeout", type=float, default=10.0, help=timeout_help)
    args = parser.parse_args(argv)
    args.msd_task = list(ARCHIVES) if "all" in args.msd_task else list(dict.fromkeys(args.msd_task))
    if complaints := "; ".join(contradictions(args)):
        parser.error(complaints)
    return args


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        failures = [failure for task in args.msd_task if (failure := attempt(plan_download(task, args)))]
    except KeyboardInterrupt:
        logging.warning("interrupted; what has arrived is kept in %s, and the same command continues", args.root)
        sys.exit(130)
    if failures:
        count = f"{len(failures)} of {len(args.msd_task)} tasks failed: " if len(args.msd_task) > 1 else ""
        raise UserError(count + "; ".join(failures))


def contradictions(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags beyond their types."""
    several = f"but --msd_task names {len(args.msd_task)} tasks"
    if len(args.msd_task) > 1 and "{task}" not in args.url:
        yield f"--url {args.url} has no {{task}} in it, {several}"
    if len(args.msd_task) > 1 and args.md5 not in (None, "none"):
        yield f"--md5 {args.md5} is one archive's digest, {several}"
    if args.retries < 0:
        yield f"--retries {args.retries} must be 0 or more"
    if not 0 < args.timeout <= 3600:
        yield f"--timeout {args.timeout} must be more than 0 and at most 3600 seconds"


def mirror_url(text: str) -> str:
    """The type of ``--url``."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(
            f"{text} is not an http or https address; an archive that is on this machine already is used if it lies at "
            "<root>/<Task>.tar"
        )
    return text


def md5_digest(text: str) -> str:
    """The type of ``--md5``."""
    if not re.fullmatch(r"none|[0-9a-f]{32}", text.lower()):
        raise argparse.ArgumentTypeError(f"{text} is neither 32 hexadecimal digits nor 'none'")
    return text.lower()


@dataclass(frozen=True)
class Download:
    """One task's archive: where it is, how a right one is known, and the files that it passes through.

    Attributes:
        md5: the digest that the archive must have; None: any archive is taken, and its counts must be ``published``'s.
        published: what the original archive holds.
        timeout: seconds, to connect and between bytes.
    """

    task: str
    root: Path
    url: str
    md5: str | None
    published: Archive
    retries: int = 3
    timeout: float = 10.0
    keep_archive: bool = False

    @property
    def folder(self) -> Path:
        return self.root / self.task

    @property
    def archive(self) -> Path:
        return self.root / f"{self.task}.tar"

    @property
    def partial(self) -> Path:
        return self.root / f"{self.task}.tar.partial"

    @property
    def version(self) -> Path:
        """Beside the partial file: which version of the server's file it is the beginning of."""
        return self.root / f"{self.task}.tar.partial.json"

    @property
    def unpacked(self) -> Path:
        return self.root / f"{self.task}.partial_extract"

    @property
    def replaced(self) -> Path:
        """The incomplete folder, during the moment in which a whole one takes its place."""
        return self.root / f"{self.task}.partial_replaced"


def plan_download(task: str, args: argparse.Namespace) -> Download:
    published = ARCHIVES[task]
    return Download(
        task=task,
        root=args.root,
        url=args.url.replace("{task}", task),
        md5=None if args.md5 == "none" else args.md5 or published.md5,
        published=published,
        retries=args.retries,
        timeout=args.timeout,
        keep_archive=args.keep_archive,
    )


def attempt(download: Download) -> str | None:
    """Fetch one task; returns what went wrong, if anything, because other tasks may still succeed."""
    try:
        fetch_task(download)
        return None
    except UserError as error:
        failure = f"{download.task}: {error}"
    except OSError as error:
        failure = f"{download.task}: {error}: check the space and permissions of --root {download.root}"
    logging.warning("%s failed", download.task)
    return failure


def fetch_task(download: Download) -> None:
    """Bring one task's folder into being, from wherever an earlier run stopped."""
    finish_replacement(download)
    if is_complete(download.folder):
        return
    probe_root(download.root)
    was_there = download.archive.exists()
    digest = check_archive(download) if was_there else download_archive(download)
    if download.md5 is None:
        logging.warning("%s: with --md5 none nothing vouches for the archive; its md5 is %s", download.task, digest)
    unpack_archive(download, digest)
    if was_there:
        logging.info("%s was there before this run and stays; delete it if you do not need it", download.archive)
    elif not download.keep_archive:
        download.archive.unlink()
    logging.info("%s is complete", download.folder)


def is_complete(folder: Path) -> bool:
    """Whether nothing needs doing; says so, or what is amiss."""
    if not os.path.lexists(folder):
        return False
    try:
        training, tests = whole_cases(folder)
    except UserError as error:
        if folder.is_symlink() or not folder.is_dir():
            raise UserError(
                f"{folder} is a link or a file that is not the whole task, move it away: {error}"
            ) from error
        logging.warning("%s is incomplete and will be replaced: %s", folder, error)
        return False
    marked = "" if (folder / MARKER).exists() else f"; accepted without {MARKER}: this script did not fetch it"
    logging.info("%s is complete, nothing to do (%d training, %d test cases%s)", folder, training, tests, marked)
    return True


def whole_cases(folder: Path) -> tuple[int, int]:
    """How many training and test cases ``dataset.json`` names; `UserError` unless every file of theirs is there."""
    if not (folder / "dataset.json").is_file():
        raise UserError("there is no dataset.json")
    description = read_json(folder / "dataset.json")
    try:
        images = {str(case["image"]) for case in description["training"]}
        labels = {str(case["label"]) for case in description["training"]}
        tests = {str(case["image"] if isinstance(case, dict) else case) for case in description.get("test", [])}
    except (KeyError, TypeError) as error:
        raise UserError(
            "'training' of dataset.json must list objects with 'image' and 'label', 'test' paths"
        ) from error
    names = images | labels | tests
    if not images or any(leaves_folder(name) for name in names):
        raise UserError("dataset.json names no training case, or files outside its folder")
    missing = sorted(name for name in names if not is_filled(folder / name))
    if missing:
        example = f"for example {missing[0] if missing[0].isprintable() else ascii(missing[0]):.200}"
        raise UserError(f"{len(missing)} of the {len(names)} files in dataset.json are missing or empty, {example}")
    return len(images), len(tests)


def is_filled(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:  # a name longer than any file's
        return False


def leaves_folder(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts


def probe_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            f"--root {root} is not a folder that can be written to ({error.strerror}): name another"
        ) from error


def check_archive(download: Download) -> str:
    """The md5 of the archive that is on disk already."""
    logging.info("%s is here already and is not downloaded again", download.archive)
    digest = md5_of(download.archive)
    if download.md5 not in (None, digest):
        raise UserError(
            f"{download.archive} has the md5 {digest}, not {download.md5}: delete it to download it anew, or give "
            f"--md5 {digest} if it is meant"
        )
    return digest


def download_archive(download: Download) -> str:
    """Download the archive, continuing a partial one; returns its md5."""
    logging.info("%s: downloading %s", download.task, download.url)
    complete_partial(download)
    digest = md5_of(download.partial)
    if download.md5 not in (None, digest):
        discard_partial(download)
        raise UserError(
            f"{download.url} sent an archive with the md5 {digest}, not {download.md5}; it was deleted: run again, or "
            f"give --md5 {digest} if this archive is meant"
        )
    os.replace(download.partial, download.archive)
    download.version.unlink(missing_ok=True)
    return digest


def md5_of(path: Path) -> str:
    """md5 of a file of any size."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, progress_bar(f"checking {path.name}", path.stat().st_size) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def progress_bar(title: str, total: int | None, initial: int = 0) -> tqdm:
    return tqdm(desc=title, total=total, initial=initial, unit="B", unit_scale=True, disable=None)


class TransferError(Exception):
    """A transfer stopped in a way that another attempt may mend."""


def complete_partial(download: Download) -> None:
    """Transfer until the partial file is whole, with growing pauses between attempts that fail."""
    retried = (
        TransferError,
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    )
    failures, furthest = 0, size_of(download.partial)
    with requests.Session() as session:
        while True:
            try:
                return transfer(session, download)
            except retried as error:
                arrived = size_of(download.partial)
                failures = 1 if arrived > furthest else failures + 1
                furthest = max(furthest, arrived)
                if failures > download.retries:
                    raise UserError(
                        f"{download.url} failed in attempt {failures} of {download.retries + 1}: {error}; "
                        f"{readable(arrived)} are kept: try the same command later, or more --retries or --timeout"
                    ) from error
                wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
                logging.warning("%s; retry %d of %d in %g s", error, failures, download.retries, wait)
                time.sleep(wait)
            except requests.RequestException as error:
                raise UserError(f"{download.url} cannot be fetched ({error}): check --url") from error


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def readable(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def transfer(session: requests.Session, download: Download) -> None:
    """One attempt: ask for what the partial file lacks, or for everything where it cannot be continued.

    Raises:
        UserError: another attempt would not help.
        TransferError, requests.RequestException: it may.
    """
    have, version = resume_point(download)
    if have and have == version["total"]:
        return
    headers = {"Accept-Encoding": "identity"}  # so that lengths are those of the file
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version["validator"]}
    with open_url(session, download, headers) as response:
        first, total = body_range(response)
        if response.status_code == 416 and have and have == total:
            return
        stale = have and (response.status_code == 416 or not continues(response, have, version))
        if not stale:
            check_answer(response, have)
            receive(response, download, first, total)
    if stale:
        logging.info("%s: the partial file does not fit what the server holds; starting over", download.task)
        discard_partial(download)
        transfer(session, download)


def resume_point(download: Download) -> tuple[int, dict]:
    """Bytes in the partial file that can be built on; ``validator`` and ``total`` of the file that they are from."""
    have = size_of(download.partial)
    try:
        version = json.loads(download.version.read_text(encoding="utf-8"))
        validator, total = version["validator"], version["total"]
        usable = validator is not None or total == have
    except (OSError, ValueError, KeyError, TypeError):
        usable = False  # nothing tells which version of the server's file the bytes are from
    if have and not usable:
        logging.info("%s is of unknown origin; starting over", download.partial)
    return (have, version) if usable else (0, {})


def discard_partial(download: Download) -> None:
    download.partial.unlink(missing_ok=True)
    download.version.unlink(missing_ok=True)


def open_url(session: requests.Session, download: Download, headers: dict[str, str]) -> requests.Response:
    """GET without reading the body; redirects are followed by hand, because none may leave https (or a given http)."""
    url, schemes = download.url, {"https", urlsplit(download.url).scheme}
    for _ in range(MAX_REDIRECTS + 1):
        try:
            response = session.get(url, headers=headers, timeout=download.timeout, stream=True, allow_redirects=False)
        except ValueError as error:  # no host has such a name or port; here or in what this redirects to
            raise UserError(f"{url!a} cannot be fetched ({error}): check --url") from error
        if not response.is_redirect:
            return response
        response.close()
        url = urljoin(url, response.headers["Location"])
        if urlsplit(url).scheme not in schemes:
            raise UserError(
                f"{download.url} redirects to {url!a}, which is not {' or '.join(sorted(schemes))}: check --url"
            )
    raise UserError(f"{download.url} redirects more than {MAX_REDIRECTS} times: check --url")


def body_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte of a response's body within the file, and the size of the whole file; None where it is not said."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(NUMBER, length) else None
    stated = re.fullmatch(rf"bytes (?:({NUMBER})-{NUMBER}|\*)/({NUMBER}|\*)", response.headers.get("Content-Range", ""))
    first, total = stated.groups() if stated else (None, None)
    return int(first) if first else None, int(total) if total and total != "*" else None


def continues(response: requests.Response, have: int, version: dict) -> bool:
    """Whether an answer to a Range request can be used: it is no range at all, or the missing one of the same file."""
    if response.status_code != 206:
        return True
    first, total = body_range(response)
    same_file = validator_of(response) in (None, version["validator"]) and total in (None, version["total"] or total)
    return first == have and same_file


def validator_of(response: requests.Response) -> str | None:
    """What names the version of the file in ``If-Range``: never a weak ETag (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def check_answer(response: requests.Response, have: int) -> None:
    """Let only (the missing part of) an archive pass; 5xx and 429 may be retried, everything else is final."""
    answer = f"{response.url} answers {response.status_code} {response.reason!a}"
    if response.status_code >= 500 or response.status_code == 429:
        raise TransferError(answer)
    if response.status_code != 200 and not (have and response.status_code == 206):
        raise UserError(f"{answer}: check --url, or try later")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise UserError(f"{response.url} answers with a web page, not with an archive: check --url")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":  # lengths would not be those of the file, and a little could become very much
        raise UserError(f"{response.url} answers with the Content-Encoding {encoding!a}, not asked for: check --url")


def receive(response: requests.Response, download: Download, first: int, total: int | None) -> None:
    """Append the body to the partial file; byte ``first`` of ``total`` comes first."""
    if first == 0:
        if download.partial.exists():
            logging.info("%s: the server does not continue the partial file; starting over", download.task)
        discard_partial(download)
    if total is None:
        logging.warning("%s does not say how large it is: free space cannot be checked before", download.url)
    else:
        check_space(download, total - first, total)
    previous = resume_point(download)[1] if first else {}
    version = {
        "validator": validator_of(response) or previous.get("validator"),
        "total": total or previous.get("total"),
    }
    write_text(download.version, json.dumps(version))
    with download.partial.open("ab") as file, progress_bar(download.task, total, first) as bar:
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > MAX_UNPACKED:
                discard_partial(download)
                raise UserError(f"{download.url} sends more than {readable(MAX_UNPACKED)}; it was deleted: check --url")
    if version["total"] not in (None, size_of(download.partial)):
        raise TransferError(f"{download.url} was cut at {size_of(download.partial)} of {version['total']} bytes")


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_space(download: Download, to_download: int, to_unpack: int) -> None:
    """Refuse what will not fit; the archives are not compressed, so unpacked they are about as large."""
    free = shutil.disk_usage(download.root).free
    if to_download + to_unpack > free:
        raise UserError(
            f"--root {download.root} has {readable(free)} free, but {readable(to_download + to_unpack)} are needed "
            f"({readable(to_download)} to download, {readable(to_unpack)} unpacked): free some, or name another disk"
        )


def unpack_archive(download: Download, digest: str) -> None:
    """Unpack beside the task's folder, check what came out, and put it in place.

    Raises:
        UserError: the archive holds something other than plain files of its task (nothing is written then), is cut, or
            lacks cases.
    """
    shutil.rmtree(download.unpacked, ignore_errors=True)
    if os.path.lexists(download.unpacked):  # a link, or another's: whatever is written there would be elsewhere
        raise UserError(f"{download.unpacked} is in the way and cannot be removed: move it away")
    try:
        with tarfile.open(download.archive, "r:") as tar:
            members = checked_members(tar, download.task)
            check_space(download, 0, sum(member.size for member in members))
            write_members(tar, members, download)
        check_cases(download)
        write_text(download.unpacked / download.task / MARKER, f"{digest}\n")
        put_in_place(download)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        reason = ascii(str(error) or type(error).__name__)
        raise UserError(
            f"{download.archive} is damaged or not an uncompressed tar archive ({reason}): delete it and run again"
        ) from error
    except UserError as error:
        raise UserError(f"{download.archive}: {error}") from error
    finally:
        shutil.rmtree(download.unpacked, ignore_errors=True)


def checked_members(tar: tarfile.TarFile, task: str) -> list[tarfile.TarInfo]:
    """The members to unpack, after a look at every one; ``._*`` (macOS AppleDouble) files are left out."""
    members, files, folders, size = [], set(), set(), 0
    for number, member in enumerate(tar, start=1):
        size += max(member.size, 0)
        if number > MAX_MEMBERS or size > MAX_UNPACKED:
            raise UserError(f"more than {MAX_MEMBERS} members or {readable(MAX_UNPACKED)}: this is not an MSD archive")
        parts = PurePosixPath(member.name).parts
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse() and member.size >= 0
        if leaves_folder(member.name):
            raise untrusted(member, "points out of the folder")
        if not plain and not member.isdir():
            raise untrusted(member, "is no plain file or folder")
        if not member.name.isprintable() or len(parts) > MAX_PARTS or any(len(part) > MAX_NAME for part in parts):
            raise untrusted(member, "is no name of a file of MSD")
        if not parts or parts[-1].startswith("._"):
            continue
        if parts[0] != task:
            raise UserError(
                f"member {member.name!a:.200} is not in {task}/: nothing was unpacked, check --msd_task and --url"
            )
        if parts[1:] == (MARKER,):
            raise untrusted(member, "is no name of a file of MSD")
        folders.update(parts[:depth] for depth in range(1, len(parts)))
        if parts in files or (plain and parts in folders) or not files.isdisjoint(parts[:n] for n in range(len(parts))):
            raise untrusted(member, "is there twice")
        (files if plain else folders).add(parts)
        members.append(member)
    return members


def untrusted(member: tarfile.TarInfo, fault: str) -> UserError:
    return UserError(f"member {member.name!a:.200} {fault}: nothing was unpacked, do not trust it")


def write_members(tar: tarfile.TarFile, members: list[tarfile.TarInfo], download: Download) -> None:
    """Write contents only: owners, modes and times of the archive do not matter here."""
    with progress_bar(f"unpacking {download.task}", sum(member.size for member in members)) as bar:
        for member in members:
            target = download.unpacked.joinpath(*PurePosixPath(member.name).parts)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, target.open("xb") as file:
                shutil.copyfileobj(source, file)
            bar.update(member.size)


def check_cases(download: Download) -> None:
    """Every file that dataset.json names is there, and the numbers of cases are the stated and the published ones.

    Numbers that disagree are an error only where no digest vouches for the archive. With a right digest they are a
    remark, for publishers miscount: the description of Task08_HepaticVessel is quoted with 140 test cases, not 139.
    """
    folder = download.unpacked / download.task
    try:
        training, tests = whole_cases(folder)
    except UserError as error:
        raise UserError(f"{error}: the archive is not whole, delete it and run again") from error
    description = read_json(folder / "dataset.json")
    for found, what, key, published in (
        (training, "training", "numTraining", download.published.num_training),
        (tests, "test", "numTest", download.published.num_test),
    ):
        stated = description.get(key, published)
        if found == published == stated:
            continue
        text = f"it holds {found} {what} cases; its {key} is {stated}, and the published archive has {published}"
        if download.md5 is None:
            raise UserError(f"{text}: if this is meant, give the archive's digest with --md5, not 'none'")
        logging.warning("%s: %s; taken as it is because its md5 is right", download.task, text)


def put_in_place(download: Download) -> None:
    """Rename the whole folder to its final name; an incomplete one that is there steps aside until it has."""
    if download.folder.exists():
        os.replace(download.folder, download.replaced)
    try:
        os.replace(download.unpacked / download.task, download.folder)
    finally:
        finish_replacement(download)


def finish_replacement(download: Download) -> None:
    """Undo or complete a replacement, wherever it stopped: files that the new folder does not have are moved to it."""
    if not download.replaced.exists():
        return
    if not download.folder.exists():
        os.replace(download.replaced, download.folder)
        return
    kept = 0
    for parent, folders, files in os.walk(download.replaced):
        for path in (Path(parent, name) for name in [*files, *folders]):
            target = download.folder / path.relative_to(download.replaced)
            if (path.is_symlink() or path.is_file()) and not os.path.lexists(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
                kept += 1
    shutil.rmtree(download.replaced)
    logging.info("%s: the incomplete folder was replaced; %d files of your own were kept", download.task, kept)


if __name__ == "__main__":
    exit_on_user_error(main, parse_args())
