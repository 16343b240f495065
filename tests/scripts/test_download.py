"""download_msd_datasets.py against a real server on the loopback that misbehaves, and archives that
do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import download_msd_datasets as downloader
from dints.data.tasks import ARCHIVE_URL, ARCHIVES
from dints.errors import UserError

TASK = "Task02_Heart"
SCRIPT = Path(downloader.__file__)
# several chunks, so that a cut in the middle leaves something
IMAGE = random.Random(0).randbytes(100_000)


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in ({"size": len(content)} | fields).items():
        setattr(info, field, value)
    return info, content


def heart_members(
    num_training=2, num_test=1, image=IMAGE, **described
) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Make a small archive's members, dataset.json second; ``described`` overrides what that
    says.
    """
    names = [f"la_{number:03}.nii.gz" for number in range(num_training + num_test)]
    training, tests = names[:num_training], names[num_training:]
    description = {
        "numTraining": num_training,
        "numTest": num_test,
        "training": [
            {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in training
        ],
        "test": [f"./imagesTs/{name}" for name in tests],
    } | described
    return [
        member(TASK, type=tarfile.DIRTYPE),
        member(f"{TASK}/dataset.json", json.dumps(description).encode()),
        *(member(f"{TASK}/imagesTr/{name}", image) for name in training),
        *(member(f"{TASK}/labelsTr/{name}", b"label") for name in training),
        *(member(f"{TASK}/imagesTs/{name}", b"test image") for name in tests),
    ]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(kind: bytes, content: bytes, **fields) -> bytes:
    """Make an extended header as it lies in an archive, before the member that it belongs to."""
    info, _ = member("header", content, type=kind, **fields)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


ARCHIVE = tar_of(heart_members())
OTHER_VERSION = tar_of(heart_members(3))
HALF = len(ARCHIVE) // 2
ALL_MEMBERS = heart_members(20, 10, b"image")  # as many as were published


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.first = int(asked[1]) if asked else None
        self.server.ranges.append(self.first)
        answer = self.server.script.pop(0) if self.server.script else serve()
        # Whatever is compressed has another length than the file.
        (answer if self.headers["Accept-Encoding"] == "identity" else plain(406))(self)

    def respond(
        self, status: int, headers: dict, body: bytes = b"", reason: str | None = None
    ) -> None:
        self.send_response(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Mirror(ThreadingHTTPServer):
    """A server of one file; ``script`` holds how to answer the next requests, afterwards it
    behaves.

    ``ranges`` holds the first byte that each request asked for, or None.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.script, self.ranges, self.released = ARCHIVE, [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{TASK}.tar"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_):
        self.released.set()
        self.shutdown()
        self.server_close()


def serve(content=None, cut=None, part=None, ranges=True, length=True, shift=0, stall=False):
    """Make an answer with the mirror's content, spoilt as told.

    ``content`` is the mirror's from now on. Only ``cut`` bytes of the body are sent, and with
    ``stall`` the connection stays open. A Range request is answered with ``part`` bytes, ``shift``
    bytes too late, or with all (not ``ranges``).
    """

    def answer(handler: Handler) -> None:
        mirror, asked = handler.server, handler.first if ranges else None
        mirror.content = content or mirror.content
        total, first = len(mirror.content), 0 if asked is None else asked + shift
        if first >= total:
            return handler.respond(416, {"Content-Range": f"bytes */{total}"})
        body = mirror.content[first:][: None if asked is None else part]
        headers = {"Content-Length": len(body)} if length else {}
        if asked is not None:
            headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{total}"
        handler.respond(200 if asked is None else 206, headers, body[:cut])
        if stall:
            hang(handler)

    return answer


def plain(status: int, body: bytes = b"", reason: str | None = None, **headers):
    """Make an answer that is not the archive."""
    fields = {
        name.replace("_", "-"): value
        for name, value in ({"Content_Length": len(body)} | headers).items()
    }
    return lambda handler: handler.respond(status, fields, body, reason)


def hang(handler: Handler) -> None:
    handler.wfile.flush()
    handler.server.released.wait(20)


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch):
    monkeypatch.setattr(downloader, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def mirror():
    with Mirror() as mirror:
        yield mirror


def download(root: Path, *flags: object, archive: bytes | None = None) -> None:
    """Run the script's main for one task, and for the small archive unless ``archive`` is, which is
    there already.
    """
    if archive is not None:
        root.mkdir(exist_ok=True)
        (root / f"{TASK}.tar").write_bytes(archive)
    digest = [] if "--md5" in flags else ["--md5", md5(ARCHIVE if archive is None else archive)]
    arguments = ["--msd_task", TASK, "--root", root, *digest, *flags]
    downloader.main(downloader.parse_args([str(argument) for argument in arguments]))


def assert_whole(root: Path, members=None, others: tuple[str, ...] = ()) -> None:
    """The task's folder holds the archive's files, and ``root`` nothing but it and ``others``."""
    expected = {info.name: content for info, content in members or heart_members() if info.isreg()}
    found = {
        str(path.relative_to(root)): path for path in (root / TASK).rglob("*") if path.is_file()
    }
    assert {name: path.read_bytes() for name, path in found.items()} == expected
    assert sorted(os.listdir(root)) == sorted([TASK, *others])


def rows(*tests: tuple) -> list:
    """Make the rows of a table, each named by its first cell."""
    return [pytest.param(*cells, id=name) for name, *cells in tests]


# What the connection may do.


@pytest.mark.fault("404, 500, timeouts, a server that hangs")
@pytest.mark.fault("server without Range, or that answers 200 to a Range request")
@pytest.mark.fault("no md5 given; HTML with status 200; cut without a length; stale partial")
@pytest.mark.parametrize(
    # left: by an earlier run; ranges: what is asked for, where it is known before
    ("left", "script", "ranges"),
    rows(
        ("well-behaved", b"", [], [None]),
        ("cut", b"", [serve(cut=HALF)], [None, ...]),
        ("cut more often than --retries", b"", [serve(cut=70_000)] * 3, [None, ..., ..., ...]),
        ("smaller part", b"", [serve(cut=HALF), serve(part=50_000)], [None, ..., ...]),
        ("no Range support", ARCHIVE[:HALF], [serve(ranges=False)], [HALF]),
        ("500 then 200", b"", [plain(500)], [None, None]),
        ("429 then 200", b"", [plain(429)], [None, None]),
        ("cut and 503", b"", [serve(cut=HALF), plain(503)], [None, ..., ...]),
        ("wrong part", ARCHIVE[:HALF], [serve(shift=1000)], [HALF, None]),
        ("part of unknown place", ARCHIVE[:HALF], [plain(206, b"x" * 9)], [HALF, None]),
        ("416", ARCHIVE[:HALF], [plain(416)], [HALF, None]),
        ("no Content-Length", b"", [serve(length=False)], [None]),
        ("stalled in the body", b"", [serve(cut=HALF, stall=True)], [None, ...]),
        ("stalled after the headers", b"", [serve(cut=0, stall=True)], [None, None]),
        (
            "part behind a redirect",
            ARCHIVE[:HALF],
            [plain(302, Location="/elsewhere")],
            [HALF, HALF],
        ),
        (
            "another version now",
            b"",
            [serve(OTHER_VERSION, cut=HALF), serve(ARCHIVE)],
            [None, ..., None],
        ),
        ("partial of an earlier run", ARCHIVE[:HALF], [], [HALF]),
        ("partial of another version", OTHER_VERSION[:HALF], [], [HALF, None]),
        ("partial of another program", b"not an archive", [], [14, None]),
        ("partial that is too long", ARCHIVE + b"x", [], [len(ARCHIVE) + 1, None]),
        ("partial that is whole", ARCHIVE, [], [len(ARCHIVE)]),
    ),
)
def test_recovers(mirror, tmp_path, left, script, ranges):
    if left:
        (tmp_path / f"{TASK}.tar.partial").write_bytes(left)
    mirror.script = list(script)
    download(tmp_path, "--url", mirror.url, "--timeout", 0.3, "--retries", 2, "--keep_archive")
    assert_whole(tmp_path, others=(f"{TASK}.tar",))
    starts = [
        first for first, expected in zip(mirror.ranges, ranges, strict=True) if expected is ...
    ]
    assert [first for first in mirror.ranges if first not in starts] == [
        first for first in ranges if first is not ...
    ]
    assert all(0 < first < len(ARCHIVE) for first in starts) and starts == sorted(starts)


@pytest.mark.fault("no md5 given; HTML with status 200; cut without a length; stale partial")
def test_without_a_digest_nothing_is_continued(mirror, tmp_path, caplog):
    """Two versions might be joined, and nothing would tell."""
    mirror.script = [serve(tar_of(ALL_MEMBERS), cut=20_000)]
    (tmp_path / f"{TASK}.tar.partial").write_bytes(ARCHIVE[:HALF])
    download(tmp_path, "--url", mirror.url, "--md5", "none")
    assert mirror.ranges == [None, None] and "nothing vouches" in caplog.text
    assert_whole(tmp_path, ALL_MEMBERS)


@pytest.mark.fault("404, 500, timeouts, a server that hangs")
@pytest.mark.fault("no md5 given; HTML with status 200; cut without a length; stale partial")
@pytest.mark.fault("file:// or http:// URL, redirect off https")
@pytest.mark.parametrize(
    ("script", "message", "num_requests"),
    rows(
        ("404", [plain(404)], "404 'Not Found': check --url", 1),
        ("416 unasked", [plain(416)], "answers 416", 1),
        ("500 for ever", [plain(500)] * 9, "failed in attempt 3 of 3: .*500", 3),
        ("stalled", [serve(stall=True, cut=0)] * 9, "failed in attempt 3 of 3: .*timed out", 3),
        ("no answer at all", [hang] * 9, "failed in attempt 3 of 3: .*timed out", 3),
        ("cut for ever", [serve(cut=HALF)] + [serve(cut=0)] * 9, r"\d+ bytes have arrived", 3),
        (
            "other bytes",
            [plain(200, ARCHIVE[::-1])],
            f"md5 .*, not {md5(ARCHIVE)}; it was deleted",
            1,
        ),
        (
            "other bytes twice, cut",
            [serve(OTHER_VERSION, cut=HALF), serve()] * 9,
            "it was deleted",
            4,
        ),
        ("cut without a length", [serve(length=False, cut=HALF)], "md5 .* it was deleted", 1),
        ("HTML", [plain(200, b"<html>", Content_Type="text/html")], "answers with a web page", 1),
        ("HTML that does not say so", [plain(200, b"<html>")], "it was deleted", 1),
        (
            "redirect to ftp",
            [plain(302, Location="ftp://x/y.tar")],
            "redirects where .*ftp://x/y.tar",
            1,
        ),
        (
            "redirect to a file",
            [plain(302, Location="file:///etc/passwd")],
            "redirects where .*file:///etc",
            1,
        ),
        ("redirect loop", [plain(302, Location="/again")] * 9, "Exceeded 5 redirects", 6),
        ("redirect to [", [plain(302, Location="http://[/x.tar")], "cannot be fetched", 1),
        ("redirect to no port", [plain(302, Location="http://x:99999/")], "cannot be fetched", 1),
        (
            "redirect to no name",
            [plain(302, Location=f"http://{'x' * 99}/")],
            "cannot be fetched",
            1,
        ),
        ("absurd length", [plain(200, b"x", Content_Length="9" * 5000)], "cannot be fetched", 1),
        (
            "body without end",
            [serve(bytes(10**6), length=False)],
            f"{TASK}.tar sends more than 400000 bytes",
            1,
        ),
        ("length of no disk", [plain(200, b"x", Content_Length="9" * 18)], "GB are needed", 1),
        ("terminal codes", [plain(404, reason="\x1b[2J")], r"answers 404 '\\x1b\[2J'", 1),
    ),
)
def test_gives_up(mirror, tmp_path, monkeypatch, script, message, num_requests):
    monkeypatch.setattr(downloader, "MAX_BYTES", 400_000)
    mirror.script = list(script)
    with pytest.raises(UserError, match=message) as raised:
        download(tmp_path, "--url", mirror.url, "--retries", 2, "--timeout", 0.3)
    assert f"{TASK}: " in str(raised.value) and len(mirror.ranges) == num_requests
    kept = {name for name in os.listdir(tmp_path) if (tmp_path / name).stat().st_size}
    assert kept == ({f"{TASK}.tar.partial"} if "have arrived" in message else set())


def test_pauses_grow_up_to_a_limit_and_are_short_again_after_progress(
    mirror, tmp_path, monkeypatch
):
    waits = []
    monkeypatch.setattr(downloader, "FIRST_WAIT", 1)
    monkeypatch.setattr(downloader, "LONGEST_WAIT", 5)
    monkeypatch.setattr(time, "sleep", waits.append)
    mirror.script = [plain(503)] * 4 + [serve(cut=HALF)] + [plain(503)] * 2
    download(tmp_path, "--url", mirror.url, "--retries", 4)
    assert waits == [1, 2, 4, 5, 1, 2, 4]


@pytest.mark.fault("file:// or http:// URL, redirect off https")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_is_not_left(mirror, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=localhost"
    )
    flags = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *flags], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with Mirror() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        url = secure.url.replace("http://127.0.0.1", "https://localhost")
        secure.script = [plain(302, Location=mirror.url), plain(302, Location=url)]
        with pytest.raises(UserError, match="redirects where it must not .*http://127.0.0.1"):
            download(tmp_path / "data", "--url", url)
        assert mirror.ranges == []
        download(tmp_path / "data", "--url", url)
        assert_whole(tmp_path / "data")


# What the disk may do.


@pytest.mark.fault("disk too small")
def test_too_small_a_disk(mirror, tmp_path, monkeypatch):
    usage, told = namedtuple("usage", "free"), f"--root {tmp_path}: .* GB are needed"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(len(ARCHIVE) + 1))
    mirror.script = [serve(cut=0, stall=True)]  # the headers are enough
    with pytest.raises(UserError, match=told):
        download(tmp_path, "--url", mirror.url)
    assert os.listdir(tmp_path) == []
    # There is room for the rest where a part has arrived before.
    (tmp_path / f"{TASK}.tar.partial").write_bytes(ARCHIVE[:-1])
    download(tmp_path, "--url", mirror.url, "--keep_archive")
    assert_whole(tmp_path, others=(f"{TASK}.tar",))
    shutil.rmtree(tmp_path / TASK)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(len(ARCHIVE) - 1))
    with pytest.raises(UserError, match=told):
        download(tmp_path)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]


@pytest.mark.parametrize(
    ("name", "link"), [("", False), (TASK, False), (TASK, True), (f"{TASK}.partial_extract", True)]
)
def test_what_is_in_the_way_is_named_and_left(mirror, tmp_path, name, link):
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "root" / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "elsewhere") if link else path.touch()
    with pytest.raises(UserError, match=str(path)):
        download(tmp_path / "root", "--url", mirror.url)
    assert os.listdir(tmp_path / "elsewhere") == [] and (path.is_symlink() or path.is_file())


# What an archive may hold.


@pytest.mark.fault("member with ../, absolute path, symlink, hard link, device, FIFO")
@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (member(f"{TASK}/../../evil", b"x"), f"is not in {TASK}/"),
        (member(f"{TASK}/../{TASK}/evil", b"x"), f"is not in {TASK}/"),
        (member("../evil", b"x"), f"is not in {TASK}/"),
        (member("/tmp/evil", b"x"), f"is not in {TASK}/"),
        (member("Task09_Spleen/file", b"x"), f"is not in {TASK}/"),
        (
            member(f"{TASK}/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "is no plain file or folder",
        ),
        (
            member(f"{TASK}/inner", type=tarfile.SYMTYPE, linkname="dataset.json"),
            "is no plain file or folder",
        ),
        (
            member(f"{TASK}/._link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "is no plain file or folder",
        ),
        (
            member(f"{TASK}/hard", type=tarfile.LNKTYPE, linkname=f"{TASK}/dataset.json"),
            "is no plain file or folder",
        ),
        (
            member(f"{TASK}/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
            "is no plain file or folder",
        ),
        (
            member(f"{TASK}/device", type=tarfile.BLKTYPE, devmajor=1, devminor=3),
            "is no plain file or folder",
        ),
        (member(f"{TASK}/fifo", type=tarfile.FIFOTYPE), "is no plain file or folder"),
        (member(f"{TASK}/sparse", type=tarfile.GNUTYPE_SPARSE), "is no plain file or folder"),
        (member(f"./{TASK}//dataset.json", b"{}"), "is there twice"),
        (member(f"{TASK}/dataset.json", type=tarfile.DIRTYPE), "is there twice"),
        (member(TASK, b"x"), "is there twice"),
        (member(f"{TASK}/LabelsTr/la_000.nii.gz", b"x"), "is there twice"),  # but for capitals
    ],
    ids=lambda value: (
        value if isinstance(value, str) else f"{value[0].name}-{value[0].type.decode()}"
    ),
)
def test_nothing_of_a_bad_archive_is_written(tmp_path, monkeypatch, bad, fault):
    """The bad member comes last: those before it must not have been written either."""
    root, unpacked = tmp_path / "root", []
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: unpacked.append(True))
    with pytest.raises(
        UserError, match=f"member '{re.escape(bad[0].name)}' {fault}: nothing was unpacked"
    ):
        download(root, archive=tar_of([*heart_members(), bad]))
    assert (
        unpacked == [] and os.listdir(tmp_path) == ["root"] and os.listdir(root) == [f"{TASK}.tar"]
    )


@pytest.mark.fault("member with ../, absolute path, symlink, hard link, device, FIFO")
@pytest.mark.parametrize(
    "content", [member(f"{TASK}/x", size=10**12)[0].tobuf() + ARCHIVE, tar_of(ALL_MEMBERS)]
)
def test_caps_on_an_archive(tmp_path, monkeypatch, content):
    monkeypatch.setattr(downloader, "MAX_MEMBERS", 50)  # of 52
    with pytest.raises(
        UserError, match="more than 50 members or 100000000000 bytes: nothing was unpacked"
    ):
        download(tmp_path, archive=content)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]


@pytest.mark.fault("member with ../, absolute path, symlink, hard link, device, FIFO")
def test_apple_double_files_leading_dots_modes_and_owners_are_dropped(tmp_path):
    """No file stays that runs as its owner, or that others may write to."""
    members = [member("./._" + TASK, b"apple"), member(".", type=tarfile.DIRTYPE)]
    for info, content in heart_members():
        folder, _, name = f"./{info.name}".rpartition("/")
        members.append(
            member(f"{folder}/{name}", content, type=info.type, mode=0o7777, uid=12345, gid=12345)
        )
        members.append(member(f"{folder}/._{name}", b"apple"))
    download(tmp_path, archive=tar_of(members))
    assert_whole(tmp_path, others=(f"{TASK}.tar",))
    for status in (path.stat() for path in (tmp_path / TASK).rglob("*")):
        assert status.st_mode & 0o7022 == 0 and (status.st_uid, status.st_gid) == (
            os.getuid(),
            os.getgid(),
        )


@pytest.mark.fault("archive cut at a member boundary")
@pytest.mark.parametrize("digest", [["--md5", "none"], []], ids=["no digest", "right digest"])
@pytest.mark.parametrize(
    ("content", "message"),
    rows(
        (
            "last member lost",
            tar_of(heart_members()[:-1]),
            "1 of the 5 files .* missing .*imagesTs/la_002.nii.gz",
        ),
        (
            "no end",
            ARCHIVE[: ARCHIVE.rindex(f"{TASK}/imagesTs".encode())],
            "1 of the 5 files .* missing",
        ),
        ("labels lost", tar_of(heart_members()[:3]), "4 of the 5 files .* missing"),
        ("no dataset.json", tar_of(heart_members()[2:]), "no dataset.json"),
        ("cut in a member", ARCHIVE[:HALF], "damaged"),
        ("no tar", b"<html>not a tar</html>", "damaged"),
        ("empty", b"", "damaged"),
        ("no label", tar_of(heart_members(training=[{"image": "x"}])), "must list"),
        ("no training case", tar_of(heart_members(training=[])), "names no training case"),
        *(
            (
                f"names {name!a:.9}",
                tar_of(heart_members(test=[name])),
                "1 of the 5 files .* missing or empty",
            )
            for name in (
                "../../x",
                "/etc/passwd",
                f"../{TASK}/dataset.json",
                "x\0y",
                "\ud800",
                "x" * 5000,
                ".",
                "\x1b",
            )
        ),
        *(
            (f"training {value!r}", tar_of(heart_members(training=value)), "must list")
            for value in (None, 5, ["x"])
        ),
        *(
            (f"test {value!r}", tar_of(heart_members(test=value)), "must list")
            for value in (None, 5, [5])
        ),
        # Headers that exhaust or mislead the reader.
        ("2000 headers", header(tarfile.XHDTYPE, b"9 x=1234\n") * 2000 + ARCHIVE, "damaged"),
        (
            "size -9",
            header(tarfile.XHDTYPE, b"11 size=-9\n") + header(b"0", b"") + ARCHIVE,
            "no plain file",
        ),
        ("a name of 1 TB", header(tarfile.GNUTYPE_LONGNAME, b"x", size=2**40) + ARCHIVE, "damaged"),
        ("a name with NUL", tar_of([member("x", pax_headers={"path": f"{TASK}/x\0y"})]), "damaged"),
    ),
)
def test_archive_that_is_not_whole(tmp_path, content, message, digest):
    with pytest.raises(UserError, match=f"{TASK}.tar.*{message}.*delete it") as raised:
        download(tmp_path, *digest, archive=content)
    assert "\x1b" not in str(raised.value) and os.listdir(tmp_path) == [f"{TASK}.tar"]


@pytest.mark.fault("archive cut at a member boundary")
@pytest.mark.parametrize(
    ("training", "tests", "described", "fault"),
    [
        (
            2,
            1,
            {},
            r"it holds \(2, 1\) .* says that it holds \(2, 1\), and \(20, 10\) were "
            r"published",
        ),
        (20, 9, {"numTest": 10}, r"it holds \(20, 9\) .* says that it holds \(20, 10\)"),
        (20, 10, {"numTest": "11"}, r"it holds \(20, 10\) .* says that it holds \(20, '11'\)"),
    ],
)
def test_counts_without_and_with_a_digest(tmp_path, caplog, training, tests, described, fault):
    """Without a digest only the published numbers vouch for an archive; with one they are a
    remark.
    """
    members = heart_members(training, tests, b"image", **described)
    with pytest.raises(UserError, match=f"{fault}.*give the archive's digest with --md5"):
        download(tmp_path, "--md5", "none", archive=tar_of(members))
    assert os.listdir(tmp_path) == [f"{TASK}.tar"] and "taken as it is" not in caplog.text
    download(tmp_path, archive=tar_of(members))
    assert re.search(f"{fault}.*; taken as it is because its md5 is right", caplog.text)
    assert_whole(tmp_path, members, others=(f"{TASK}.tar",))


@pytest.mark.fault("no md5 given; HTML with status 200; cut without a length; stale partial")
def test_published_digests_are_the_default(mirror, tmp_path):
    """Of an archive that is downloaded, and of one that is here already."""
    (tmp_path / f"{TASK}.tar").write_bytes(ARCHIVE)
    flags = [
        "--msd_task",
        "all",
        "--root",
        str(tmp_path),
        "--url",
        mirror.url.replace(TASK, "{task}"),
    ]
    with pytest.raises(
        UserError, match=f"{TASK}.tar has the md5 {md5(ARCHIVE)}, not .*: delete it"
    ) as raised:
        downloader.main(downloader.parse_args(flags))
    assert str(raised.value).startswith("10 of 10 tasks failed: Task01_BrainTumour: ")
    assert re.findall(r"not (\w{32})[;:]", str(raised.value)) == [
        archive.md5 for archive in ARCHIVES.values()
    ]
    assert (
        os.listdir(tmp_path) == [f"{TASK}.tar"]
        and (tmp_path / f"{TASK}.tar").read_bytes() == ARCHIVE
    )
    assert downloader.parse_args([]).url == ARCHIVE_URL and ARCHIVE_URL.startswith("https://")


# What an earlier run, or the user, left behind.


@pytest.mark.fault("root exists")
def test_complete_folder_is_left_alone(mirror, tmp_path, caplog):
    """Also one behind a link."""
    caplog.set_level("INFO")
    download(tmp_path / "shared", "--url", mirror.url)
    label = tmp_path / "shared" / TASK / "labelsTr" / "la_000.nii.gz"
    label.write_text("corrected by hand")
    download(tmp_path / "shared", "--url", mirror.url)
    (tmp_path / TASK).symlink_to(tmp_path / "shared" / TASK)
    download(tmp_path, "--url", mirror.url)
    assert caplog.text.count("nothing to do (2 training, 1 test cases)") == 2
    assert (
        mirror.ranges == [None]
        and (tmp_path / TASK).is_symlink()
        and label.read_text() == "corrected by hand"
    )


@pytest.mark.fault("root exists")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("imagesTr/la_001.nii.gz", None),
        ("labelsTr/la_001.nii.gz", ""),
        ("dataset.json", None),
        ("dataset.json", "["),
    ],
)
def test_incomplete_folder_is_repaired_and_own_files_are_kept(mirror, tmp_path, name, content):
    download(tmp_path, "--url", mirror.url)
    folder = tmp_path / TASK
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    own = {
        folder / path: path
        for path in ("notes.txt", "imagesTr/own.nii.gz", "predictions/deep/x.txt")
    }
    for path, text in own.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "link").symlink_to(tmp_path)
    download(tmp_path, "--url", mirror.url)
    for path, text in own.items():
        assert path.read_text() == text
        path.unlink()
    assert (folder / "link").readlink() == tmp_path
    (folder / "link").unlink()
    assert_whole(tmp_path)


@pytest.mark.fault("interrupted extraction")
@pytest.mark.fault("permission denied at the final move")
@pytest.mark.parametrize("calls", [0, 3, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(13, "Permission denied")])
@pytest.mark.parametrize("function", ["tarfile.copyfileobj", "os.replace"])
def test_what_stops_the_extraction_loses_nothing(tmp_path, monkeypatch, function, error, calls):
    """Files are unpacked, and then moved to a folder that a user has written to, and that lacks no
    more than a file.
    """
    folder, notes = tmp_path / TASK, tmp_path / TASK / "notes.txt"
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as tar:
        tar.extractall(tmp_path, filter="data")
    for path in [notes, *folder.rglob("*.nii.gz")]:
        path.write_text("of another version, or mine")
    (folder / "imagesTr" / "la_000.nii.gz").unlink()
    module, name = function.split(".")
    left = [getattr(sys.modules[module], name)] * calls

    def stop(*args):
        if not left:
            raise error
        left.pop()(*args)

    with monkeypatch.context() as patched, pytest.raises((SystemExit, UserError)) as stopped:
        patched.setattr(function, stop)
        download(tmp_path, archive=ARCHIVE)
    told = re.search("Permission denied.*--root", str(stopped.value))
    assert told if isinstance(error, OSError) else stopped.value.code == 130
    assert not downloader.is_complete(folder)
    assert sorted(os.listdir(tmp_path)) == [TASK, f"{TASK}.tar"]
    # After SIGKILL the temporary folder is there too.
    (tmp_path / f"{TASK}.partial_extract" / TASK).mkdir(parents=True)
    (tmp_path / f"{TASK}.partial_extract" / TASK / "dataset.json").write_text("{")
    download(tmp_path)
    assert notes.read_text() == "of another version, or mine"
    notes.unlink()
    assert_whole(tmp_path, others=(f"{TASK}.tar",))


@pytest.mark.fault("permission denied at the final move")
def test_failure_of_the_final_move_is_an_error(tmp_path, monkeypatch):
    def deny(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", deny)
    with pytest.raises(
        UserError, match=f"Permission denied: '{tmp_path / TASK}': check .* of --root {tmp_path}"
    ):
        download(tmp_path, archive=ARCHIVE)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]


# The command line.


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.fault("file:// or http:// URL, redirect off https")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--msd_task Task11_Brain", "Task11_Brain"),
        ("--url file:///data/x.tar", "--url file:///data/x.tar is not an http or https address"),
        ("--url host/x.tar", "--url host/x.tar is not an http or https address"),
        ("--url https:///x.tar", "--url https:///x.tar is not an http or https address"),
        ("--msd_task all --url http://host/x.tar", "--url http://host/x.tar needs {task} in it"),
        ("--md5 123", "--md5 123 is neither 32 hexadecimal digits nor 'none'"),
        (
            f"--msd_task {TASK} Task03_Liver --md5 {'A' * 32}",
            f"--md5 {'a' * 32} is of one archive, but",
        ),
        ("--retries -1 --timeout 0", "--retries -1 must be 0 or more; --timeout 0.0 must be"),
        ("--timeout nan", "--timeout nan must be"),
    ],
)
def test_bad_flags_are_refused_at_once(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        downloader.parse_args(arguments.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_old_python_is_told(mirror, tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(UserError, match="has no tarfile.data_filter: use 3.11.4 or newer"):
        download(tmp_path, "--url", mirror.url)
    assert mirror.ranges == []


def test_several_tasks_go_on_after_a_failure(mirror, tmp_path):
    mirror.script = [plain(404), serve(tar_of(ALL_MEMBERS)), plain(404)]
    tasks = ("Task04_Hippocampus", TASK, "Task05_Prostate")
    flags = (
        "--root",
        tmp_path / "new" / "root",
        "--url",
        mirror.url.replace(TASK, "{task}"),
        "--md5",
        "none",
    )
    result = run("--msd_task", *tasks, *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    told = (
        "error: 2 of 3 tasks failed: Task04_Hippocampus: http.*; Task05_Prostate: "
        "http.*/Task05_Prostate.tar answers"
    )
    assert re.match(told, result.stderr.splitlines()[-1])
    assert len(mirror.ranges) == 3
    assert_whole(tmp_path / "new" / "root", ALL_MEMBERS)


def test_ctrl_c_is_continued_by_the_same_command(mirror, tmp_path):
    mirror.script = [serve(cut=HALF, stall=True)]
    flags = ("--msd_task", TASK, "--root", tmp_path, "--md5", md5(ARCHIVE), "--url", mirror.url)
    command = [sys.executable, SCRIPT, *map(str, flags)]
    # A shell in the background ignores SIGINT and hands that on.
    heed_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_sigint
    ) as process:
        deadline = time.monotonic() + 20
        while (
            not downloader.size_of(tmp_path / f"{TASK}.tar.partial") and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 130, stderr
    assert (
        stderr.splitlines()[-1].startswith("interrupted: what has arrived is kept in")
        and "Traceback" not in stderr
    )
    result = run(*flags)
    assert result.returncode == 0, result.stderr
    assert mirror.ranges[0] is None and mirror.ranges[1] > 0
    assert_whole(tmp_path)
    result = run(*flags)
    assert result.returncode == 0 and "is complete, nothing to do" in result.stderr
    assert len(mirror.ranges) == 2
