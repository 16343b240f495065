"""Fetch tasks of the Medical Segmentation Decathlon (MSD).

    python download_msd_datasets.py --msd_task Task09_Spleen

puts ``./data_msd/Task09_Spleen/{dataset.json,imagesTr,labelsTr,imagesTs}`` in place; ``--msd_task
all`` fetches ten. After an interruption, the same command continues: the archive arrives as
``<Task>.tar.partial``, and becomes ``<Task>.tar`` when its md5 is right; it is unpacked in
``<Task>.partial``, and that becomes ``<Task>`` when every file of its dataset.json is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dints.data.tasks import ARCHIVE_URL, ARCHIVES
from dints.options import Settings, number, option, parse


@dataclass(frozen=True, kw_only=True)
class FetchingSettings(Settings):
    """Fetching."""

    msd_task: tuple[str, ...] = option(
        f"one or several of {', '.join(ARCHIVES)}, or all",
        common=True,
        default=("Task09_Spleen",),
        nargs="+",
        choices=(*ARCHIVES, "all"),
        metavar="TASK",
    )
    root: Path = option(
        "folder of the tasks' folders", common=True, default=Path("data_msd"), type=Path
    )
    keep_archive: bool = option("keep ROOT/<Task>.tar after unpacking", default=False)
    url: str = option("the archive's http(s) address; {task}: the task", default=ARCHIVE_URL)
    md5: str | None = option(
        "digest of the archive (default: that of the published one)", default=None, type=str.lower
    )
    retries: int = option("attempts after one that brought nothing", default=3, type=number(int, 0))
    timeout: float = option(
        "seconds to connect, and between bytes", default=10.0, type=number(float, 0.01, 3600)
    )

    def complaints(self) -> Iterable[str]:
        if not re.match("https?://[^/]", self.url):
            yield f"--url {self.url} is not an http or https address"
        if self.md5 is not None and not re.fullmatch("[0-9a-f]{32}", self.md5):
            yield f"--md5 {self.md5} is not 32 hexadecimal digits"
        if len(self.tasks) > 1 and (self.md5 or "{task}" not in self.url):
            yield "several tasks: leave --md5 out, and give --url with {task} in it"

    @property
    def tasks(self) -> Sequence[str]:
        return tuple(ARCHIVES) if "all" in self.msd_task else tuple(dict.fromkeys(self.msd_task))


@dataclass(frozen=True, kw_only=True)
class DownloadSettings(Settings):
    """What download_msd_datasets.py goes by."""

    fetching: FetchingSettings


def parse_args(argv: list[str] | None = None) -> DownloadSettings:
    return parse(DownloadSettings, __doc__, argv)


if __name__ == "__main__":  # before the imports below take time
    SETTINGS = parse_args()

import hashlib
import logging
import os
import shutil
import tarfile
import time
from pathlib import PurePosixPath

import requests
from tqdm import tqdm

from dints.data.formats import read_json
from dints.errors import UserError, exit_on_user_error

CHUNK = 1 << 16  # bytes; what a cut connection loses at most
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before another attempt
MAX_MEMBERS = 20_000  # the largest task has under 3,000
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

log = logging.getLogger("download")


def main(settings: DownloadSettings) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given, failures = settings.fetching, []
    for task in given.tasks:
        try:
            fetch_task(task, given)
        except UserError as error:  # other tasks may still succeed
            failures.append(f"{task}: {error}")
        except OSError as error:
            failures.append(f"{task}: {error}: check the space and rights in --root {given.root}")
    if failures:
        raise UserError("; ".join(failures))


def fetch_task(task: str, settings: FetchingSettings) -> None:
    """Make one task's folder, from wherever an earlier run stopped."""
    folder, archive = settings.root / task, settings.root / f"{task}.tar"
    if os.path.lexists(folder):
        if faults := missing_from(folder):
            raise UserError(f"{folder} is incomplete ({faults}): move it away and run again")
        log.info("%s is complete, nothing to do", folder)
        return
    settings.root.mkdir(parents=True, exist_ok=True)
    md5, was_there = settings.md5 or ARCHIVES[task].md5, archive.exists()
    if was_there:
        check_md5(archive, md5, f"{archive}: delete it and run again")
    else:
        partial, url = Path(f"{archive}.partial"), settings.url.replace("{task}", task)
        download(url, partial, settings.retries, settings.timeout)
        try:
            check_md5(partial, md5, f"{url}: what it sent is deleted, run again")
        except UserError:
            partial.unlink()
            raise
        os.replace(partial, archive)
    unpack(archive, folder)
    if not (was_there or settings.keep_archive):
        archive.unlink()
    log.info("%s is complete", folder)


def missing_from(folder: Path) -> str:
    """Say which files of a task are missing; nothing if it is complete."""
    try:
        description = read_json(folder / "dataset.json")
        names = [case[key] for case in description["training"] for key in ("image", "label")]
        tests = description.get("test", [])
        names += [case["image"] if isinstance(case, dict) else case for case in tests]
        missing = [name for name in names if not holds_file(folder, name)]
    except UserError as error:
        return str(error)
    except (KeyError, TypeError):
        return "dataset.json does not list 'training', with 'image' and 'label' each, and 'test'"
    if missing or not names:
        example = f", for example {missing[0]!a:.200}" if missing else ""
        return f"{len(missing)} of {len(names)} files in dataset.json are not there{example}"
    return ""


def holds_file(folder: Path, name: str) -> bool:
    """Tell whether dataset.json names a file in the folder that is not empty."""
    path = os.path.join(folder, name)
    outside = ".." in PurePosixPath(name).parts or os.path.isabs(name)
    return not outside and os.path.isfile(path) and os.path.getsize(path) > 0


def check_md5(path: Path, md5: str, remedy: str) -> None:
    log.info("checking %s", path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != md5:
        raise UserError(f"md5 {digest}, not {md5}, of {remedy}, or give --md5 {digest} if meant")


def download(url: str, partial: Path, retries: int, timeout: float) -> None:
    """Continue the partial file until it is whole; pauses grow while nothing arrives."""
    log.info("downloading %s", url)
    session = requests.Session()
    session.max_redirects = 5
    if url.startswith("https:"):
        del session.adapters["http://"]  # so that no redirect leaves https
    failures, furthest = 0, size_of(partial)
    while True:
        try:
            return transfer(session, url, partial, timeout)
        except BROKEN as error:
            arrived = size_of(partial)
            failures = 1 if arrived > furthest else failures + 1
            furthest = max(furthest, arrived)
            if failures > retries:
                raise UserError(
                    f"{url} failed in attempt {failures} of {retries + 1}, at {arrived} bytes "
                    f"({error}): run again later, or with more --retries or --timeout"
                ) from error
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
            log.warning("%s; retry %d of %d in %g s", error, failures, retries, wait)
            time.sleep(wait)
        except (requests.RequestException, ValueError) as error:  # no host or port is called so
            raise UserError(
                f"{url} or a redirect of it is refused ({error}): check --url"
            ) from error


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def transfer(session: requests.Session, url: str, partial: Path, timeout: float) -> None:
    """Make one attempt at what the partial file lacks."""
    have = size_of(partial)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
        if have and response.status_code == 416:
            return  # there is no more; whether this is the archive, its md5 tells
        check_answer(response)
        length, place = (response.headers.get(k, "") for k in ("Content-Length", "Content-Range"))
        if response.status_code == 200:  # the file from its beginning
            have, total = 0, int(length or 0)
        elif part := re.fullmatch(rf"bytes {have}-\d+/(\d+)", place):
            total = int(part[1])
        else:
            partial.unlink(missing_ok=True)
            raise requests.ConnectionError(f"{url} sends another part than was asked for")
        check_space(partial.parent, 2 * total - size_of(partial))  # the rest, and all unpacked
        bar = tqdm(
            desc=partial.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None
        )
        with partial.open("ab" if have else "wb") as file, bar:
            for chunk in response.iter_content(CHUNK):
                have += file.write(chunk)
                bar.update(len(chunk))
    if have < total:
        raise requests.ConnectionError(f"{url} was cut at {have} of {total} bytes")


def check_answer(response: requests.Response) -> None:
    """Let only (a part of) an archive pass; 5xx and 429 may be retried, all else is final."""
    kind = response.headers.get("Content-Type", "")
    answer = f"{response.url} answers {response.status_code} {response.reason!a} {kind}".strip()
    if response.status_code >= 500 or response.status_code == 429:
        raise requests.ConnectionError(answer)
    if response.status_code not in (200, 206) or kind.startswith("text/html"):
        raise UserError(f"{answer}, no archive: check --url, or try later")


def check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"--root {root}: {needed / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free: "
            "free some, or name a folder on another disk"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack beside the task's folder, check what came out, and give it its name."""
    check_space(folder.parent, archive.stat().st_size)  # it is not compressed
    unpacked = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
    unpacked.mkdir()  # fails where something else is in the way, such as a link to elsewhere
    try:
        with tarfile.open(archive, "r:") as tar:
            members = checked_members(tar, folder.name)
            bar = tqdm(members, f"unpacking {folder.name}", unit=" files", disable=None)
            tar.extractall(unpacked, bar, filter="data")
        if faults := missing_from(unpacked / folder.name):
            raise UserError(f"{archive} is not whole ({faults}): delete it and run again")
        os.replace(unpacked / folder.name, folder)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(
            f"{archive} is damaged or no uncompressed tar ({error!a}): delete it and run again"
        ) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def checked_members(tar: tarfile.TarFile, task: str) -> list[tarfile.TarInfo]:
    """Return all members but macOS's ``._*`` files; refuse the archive for a bad one.

    The filter ``data`` looks at a member only when its turn comes, and lets links inside pass.
    """
    members = []
    for member in tar:
        path = PurePosixPath(member.name)
        plain = member.isdir() or (member.isreg() and not member.issparse() and member.size >= 0)
        inside = not path.parts or path.parts[0] in (task, f"._{task}") and ".." not in path.parts
        if not (plain and inside) or len(members) == MAX_MEMBERS:
            raise UserError(
                f"{tar.name}: member {member.name!a:.200} is no plain file or folder in {task}/, "
                f"or one beyond {MAX_MEMBERS}: nothing was unpacked, check --msd_task and --url"
            )
        if path.parts and not path.name.startswith("._"):
            members.append(member)
    return members


if __name__ == "__main__":
    exit_on_user_error(main, SETTINGS)
