"""The downloader against a server on the loopback that misbehaves, and archives that do."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from commands import run

import download_msd_datasets as downloader
from dints.data.tasks import ARCHIVE_URL, ARCHIVES
from dints.errors import UserError

TASK = "Task02_Heart"
PARTIAL = f"{TASK}.tar.partial"


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in ({"size": len(content)} | fields).items():
        setattr(info, field, value)
    return info, content


def heart(image: bytes = b"image", **described) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Make a small archive's members; ``described`` overrides what dataset.json says."""
    pair = {"image": "./imagesTr/la_0.nii.gz", "label": "./labelsTr/la_0.nii.gz"}
    description = {"training": [pair], "test": ["./imagesTs/la_1.nii.gz"]} | described
    return [
        member(TASK, type=tarfile.DIRTYPE),
        member(f"{TASK}/dataset.json", json.dumps(description).encode()),
        member(f"{TASK}/imagesTr/la_0.nii.gz", image),
        member(f"{TASK}/labelsTr/la_0.nii.gz", b"label"),
        member(f"{TASK}/imagesTs/la_1.nii.gz", b"test image"),
    ]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


MEMBERS = heart(random.Random(0).randbytes(200_000))  # several chunks
ARCHIVE = tar_of(MEMBERS)
HALF = len(ARCHIVE) // 2


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.first = int(asked[1]) if asked else None
        self.server.ranges.append(self.first)
        (self.server.script.pop(0) if self.server.script else serve())(self)

    def respond(self, status: int, headers: dict, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Mirror(ThreadingHTTPServer):
    """A server of ARCHIVE; ``script`` holds how to answer the next requests.

    ``ranges`` holds the first byte that each request asked for, or None.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.ranges, self.released = [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{TASK}.tar"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_):
        self.released.set()
        self.shutdown()
        self.server_close()


def serve(content=ARCHIVE, cut=None, ranges=True, length=True, shift=0, stall=False):
    """Answer with ``content``, of which ``cut`` bytes arrive; ``stall`` keeps the line open.

    A Range request is answered ``shift`` bytes too late, or with all (not ``ranges``).
    """

    def answer(handler: Handler) -> None:
        asked, total = handler.first if ranges else None, len(content)
        first = 0 if asked is None else asked + shift
        if first >= total:
            return handler.respond(416, {"Content-Range": f"bytes */{total}"})
        headers = {"Content-Length": total - first} if length else {}
        if asked is not None:
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
        handler.respond(200 if asked is None else 206, headers, content[first:][:cut])
        if stall:
            handler.wfile.flush()
            handler.server.released.wait(20)

    return answer


def plain(status: int, body: bytes = b"", **headers):
    """Make an answer that is not the archive."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.respond(status, {"Content-Length": len(body)} | fields, body)


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch):
    monkeypatch.setattr(downloader, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def mirror():
    with Mirror() as mirror:
        yield mirror


def download(root: Path, *flags: object, archive: bytes | None = None) -> None:
    """Run for one task; ``archive`` is one that is there already."""
    if archive is not None:
        root.mkdir(exist_ok=True)
        (root / f"{TASK}.tar").write_bytes(archive)
    arguments = ["--msd_task", TASK, "--root", root, *flags]
    arguments += ["--md5", md5(ARCHIVE if archive is None else archive)]
    downloader.main(downloader.parse_args([str(argument) for argument in arguments]))


def assert_whole(root: Path, others: tuple[str, ...] = ()) -> None:
    """The task's folder holds the archive's files, and ``root`` nothing but it and ``others``."""
    files = [path for path in (root / TASK).rglob("*") if path.is_file()]
    found = {str(path.relative_to(root)): path.read_bytes() for path in files}
    assert found == {info.name: content for info, content in MEMBERS if info.isreg()}
    assert sorted(os.listdir(root)) == sorted([TASK, *others])


# The connection


@pytest.mark.fault("404, 500, timeouts, a server that hangs")
@pytest.mark.fault("server without Range, or that answers 200 to a Range request")
@pytest.mark.parametrize(
    ("left", "script", "ranges"),  # left by an earlier run; ... is some place in the archive
    [
        ("", [], [None]),
        ("half", [], [HALF]),
        ("half", [serve(ranges=False)], [HALF]),
        ("half", [serve(shift=1000)], [HALF, None]),
        ("half", [plain(302, Location="/elsewhere")], [HALF, HALF]),
        ("whole", [], [len(ARCHIVE)]),
        ("", [plain(500), plain(429)], [None, None, None]),
        ("", [serve(cut=HALF)], [None, ...]),
        ("", [serve(cut=HALF, stall=True), plain(503)], [None, ..., ...]),
        ("", [serve(cut=70_000)] * 3, [None, ..., ..., ...]),  # each time some more arrives
    ],
)
def test_recovers(mirror, tmp_path, left, script, ranges):
    if left:
        (tmp_path / PARTIAL).write_bytes(ARCHIVE[:HALF] if left == "half" else ARCHIVE)
    mirror.script = list(script)
    download(tmp_path, "--url", mirror.url, "--timeout", 0.3, "--retries", 2, "--keep_archive")
    assert_whole(tmp_path, others=(f"{TASK}.tar",))
    assert len(mirror.ranges) == len(ranges)
    for first, expected in zip(mirror.ranges, ranges, strict=True):
        assert first == expected or (expected is ... and 0 < first < len(ARCHIVE))


@pytest.mark.fault("404, 500, timeouts, a server that hangs")
@pytest.mark.fault("no md5 given; HTML with status 200; cut without a length; stale partial")
@pytest.mark.fault("file:// or http:// URL, redirect off https")
@pytest.mark.parametrize(
    ("script", "message", "num_requests", "kept"),
    [
        ([plain(404)], "answers 404 'Not Found', no archive: check --url", 1, HALF),
        ([plain(200, b"<html>", Content_Type="text/html")], "text/html, no archive", 1, HALF),
        ([plain(500)] * 9, "failed in attempt 3 of 3, at .*500", 3, HALF),
        ([serve(cut=0, stall=True)] * 9, "failed in attempt 3 of 3, at .*timed out", 3, HALF),
        ([serve(ARCHIVE[::-1])], f"not {md5(ARCHIVE)}, of .*deleted, run again", 1, None),
        (
            [serve(ranges=False, length=False, cut=HALF)],
            "deleted, run again, or give --md5",
            1,
            None,
        ),
        ([plain(302, Location="file:///etc/passwd")], "redirect of it is refused", 1, HALF),
        ([plain(302, Location="/again")] * 9, "Exceeded 5 redirects", 6, HALF),
        ([plain(200, b"x", Content_Length="9" * 18)], "GB are needed", 1, HALF),
    ],
)
def test_gives_up(mirror, tmp_path, script, message, num_requests, kept):
    (tmp_path / PARTIAL).write_bytes(ARCHIVE[:HALF])
    mirror.script = list(script)
    with pytest.raises(UserError, match=f"{TASK}: .*{message}"):
        download(tmp_path, "--url", mirror.url, "--retries", 2, "--timeout", 0.3)
    assert len(mirror.ranges) == num_requests and os.listdir(tmp_path) == [PARTIAL] * bool(kept)
    assert kept is None or (tmp_path / PARTIAL).stat().st_size == kept


def test_pauses_grow_and_are_short_again_after_progress(mirror, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(downloader, "LONGEST_WAIT", 0.03)
    monkeypatch.setattr(time, "sleep", waits.append)
    mirror.script = [plain(503)] * 3 + [serve(cut=HALF), plain(503)]
    download(tmp_path, "--url", mirror.url)
    assert waits == [0.01, 0.02, 0.03, 0.01, 0.02]


@pytest.mark.fault("file:// or http:// URL, redirect off https")
def test_https_is_not_left(mirror, tmp_path, monkeypatch):
    def redirect(_, request, **__):
        answer = requests.Response()
        answer.status_code, answer.request, answer.raw = 302, request, io.BytesIO()
        answer.headers["Location"] = mirror.url
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", redirect)
    with pytest.raises(UserError, match="No connection adapters .*http://127.0.0.1"):
        download(tmp_path, "--url", "https://host/x.tar")


# The archive


@pytest.mark.fault("disk too small")
def test_a_disk_must_hold_the_archive_and_what_is_in_it(mirror, tmp_path, monkeypatch):
    usage, said = namedtuple("usage", "free"), f"--root {tmp_path}: .* GB are needed"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * len(ARCHIVE) - 1))
    with pytest.raises(UserError, match=said):
        download(tmp_path, "--url", mirror.url)
    assert os.listdir(tmp_path) == []
    (tmp_path / PARTIAL).write_bytes(ARCHIVE[:1])
    download(tmp_path, "--url", mirror.url)
    assert_whole(tmp_path)


@pytest.mark.fault("member with ../, absolute path, symlink, hard link, device, FIFO")
@pytest.mark.parametrize(
    "bad",
    [
        member(f"{TASK}/../../evil", b"x"),
        member("/tmp/evil", b"x"),
        member(f"{TASK}/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member(f"{TASK}/._link", type=tarfile.SYMTYPE, linkname="dataset.json"),
        member(f"{TASK}/hard", type=tarfile.LNKTYPE, linkname=f"{TASK}/dataset.json"),
        member(f"{TASK}/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member(f"{TASK}/fifo", type=tarfile.FIFOTYPE),
        member(f"{TASK}/sparse", type=tarfile.GNUTYPE_SPARSE),
        member(f"{TASK}/one too many"),
    ],
    ids=lambda bad: f"{bad[0].name}-{bad[0].type.decode()}",
)
def test_nothing_of_a_bad_archive_is_written(tmp_path, monkeypatch, bad):
    """The bad member comes last: those before it must not have been written either."""
    root, unpacked = tmp_path / "root", []
    if bad[0].name.endswith("many"):
        monkeypatch.setattr(downloader, "MAX_MEMBERS", len(MEMBERS))
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: unpacked.append(True))
    with pytest.raises(UserError, match=f"'{re.escape(bad[0].name)}' is no plain file .*: nothing"):
        download(root, archive=tar_of([*heart(), bad]))
    assert unpacked == [] and os.listdir(tmp_path) == ["root"]
    assert os.listdir(root) == [f"{TASK}.tar"]


@pytest.mark.fault("member with ../, absolute path, symlink, hard link, device, FIFO")
def test_apple_double_files_leading_dots_and_modes_are_dropped(tmp_path):
    members = [member(f"./._{TASK}", b"apple"), member(".", type=tarfile.DIRTYPE)]
    for info, content in MEMBERS:
        folder, _, name = f"./{info.name}".rpartition("/")
        members.append(member(f"{folder}/{name}", content, type=info.type, mode=0o7777))
        members.append(member(f"{folder}/._{name}", b"apple"))
    download(tmp_path, archive=tar_of(members))
    assert_whole(tmp_path, others=(f"{TASK}.tar",))
    assert all(path.stat().st_mode & 0o7022 == 0 for path in (tmp_path / TASK).rglob("*"))


@pytest.mark.fault("archive cut at a member boundary")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of(heart()[:-1]), "1 of 3 files .* not there.*imagesTs/la_1.nii.gz"),
        (tar_of(heart()[2:]), "dataset.json does not exist"),
        (ARCHIVE[:HALF], "damaged"),
        (tar_of(heart(training=[{"image": "x"}])), "does not list"),
        (tar_of(heart(training=[], test=[])), "0 of 0 files"),
        (tar_of(heart(test=[f"../{TASK}/dataset.json"])), "1 of 3 files"),
        (tar_of(heart(test=["/etc/passwd", "x\0y", "x" * 5000])), "3 of 5 files"),
    ],
)
def test_archive_that_is_not_whole(tmp_path, content, message):
    with pytest.raises(UserError, match=f"{TASK}.tar.*{message}.*delete it"):
        download(tmp_path, archive=content)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]


# What an earlier run, or the user, left behind


@pytest.mark.fault("root exists")
def test_a_complete_folder_is_left_alone_and_an_incomplete_one_refused(mirror, tmp_path):
    download(tmp_path, "--url", mirror.url)
    label = tmp_path / TASK / "labelsTr" / "la_0.nii.gz"
    label.write_text("corrected by hand")
    download(tmp_path, "--url", mirror.url)
    assert mirror.ranges == [None] and label.read_text() == "corrected by hand"
    label.unlink()
    with pytest.raises(UserError, match=f"{TASK} is incomplete .*labelsTr.*: move it away"):
        download(tmp_path, "--url", mirror.url)


@pytest.mark.fault("interrupted extraction")
@pytest.mark.fault("permission denied at the final move")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(13, "denied")])
@pytest.mark.parametrize("function", ["tarfile.copyfileobj", "os.replace"])
def test_what_stops_the_extraction_loses_nothing(tmp_path, monkeypatch, function, error):
    def stop(*_):
        raise error

    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, UserError)) as stopped:
        patched.setattr(function, stop)
        download(tmp_path, archive=ARCHIVE)
    assert isinstance(error, KeyboardInterrupt) or "rights in --root" in str(stopped.value)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]
    (tmp_path / f"{TASK}.partial" / TASK).mkdir(parents=True)  # as SIGKILL leaves it
    download(tmp_path)
    assert_whole(tmp_path, others=(f"{TASK}.tar",))


# The command line


@pytest.mark.fault("file:// or http:// URL, redirect off https")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--msd_task Task11_Brain", "Task11_Brain"),
        ("--url file:///data/x.tar", "--url file:///data/x.tar is not an http or https address"),
        ("--msd_task all --url http://host/x.tar", "give --url with {task} in it"),
        ("--md5 123", "--md5 123 is not 32 hexadecimal digits"),
    ],
)
def test_bad_flags_are_refused_at_once(capsys, arguments, message):
    with pytest.raises(SystemExit):
        downloader.parse_args(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.fault("no md5 given; HTML with status 200; cut without a length; stale partial")
def test_other_tasks_follow_a_failure_and_published_digests_are_the_default(mirror, tmp_path):
    url = mirror.url.replace(TASK, "{task}")
    done = run("download_msd_datasets.py --msd_task all --root", tmp_path, "--url", url)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: Task01_BrainTumour: md5 ")
    expected = [archive.md5 for archive in ARCHIVES.values()]
    assert re.findall(r"not (\w{32}),", error) == expected and os.listdir(tmp_path) == []
    assert downloader.parse_args([]).fetching.url == ARCHIVE_URL
