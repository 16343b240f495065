"""download_msd_datasets.py against a real server on the loopback that misbehaves, and archives that do."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
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
from dints.errors import UserError
from dints.tasks import ARCHIVES

TASK = "Task02_Heart"
SCRIPT = Path(downloader.__file__)
IMAGE = random.Random(0).randbytes(100_000)  # several chunks, so that a cut in the middle leaves something


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def heart_members(num_training: int = 2, num_test: int = 1, **described) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A small archive's members, dataset.json first; ``described`` overrides what that says."""
    training = [f"la_{number:03}.nii.gz" for number in range(num_training)]
    tests = [f"la_{number:03}.nii.gz" for number in range(num_training, num_training + num_test)]
    description = {
        "numTraining": num_training,
        "numTest": num_test,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in training],
        "test": [f"./imagesTs/{name}" for name in tests],
    } | described
    return [
        member(TASK, type=tarfile.DIRTYPE),
        member(f"{TASK}/dataset.json", json.dumps(description).encode()),
        *(member(f"{TASK}/imagesTr/{name}", IMAGE) for name in training),
        *(member(f"{TASK}/labelsTr/{name}", b"label") for name in training),
        *(member(f"{TASK}/imagesTs/{name}", b"test image") for name in tests),
    ]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    """An extended header as it lies in an archive, before the member that it belongs to."""
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


ARCHIVE = tar_of(heart_members())
OTHER_VERSION = tar_of(heart_members(3))
HALF = len(ARCHIVE) // 2


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Mirror:
    """A server of one file; ``script`` holds how to answer the next requests, afterwards it behaves."""

    def __init__(self):
        self.content, self.etag = ARCHIVE, '"one"'
        self.script, self.requests = [], []
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{TASK}.tar"

    def handler(mirror):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.requests.append(dict(self.headers))
                answer = mirror.script.pop(0) if mirror.script else serve()
                answer(mirror, self)
                self.close_connection = True

            def log_message(self, *_):
                pass

        return Handler

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def serve(status=None, cut=None, part=None, ranges=True, if_range=True, length=True, shift=0, stall=False, **headers):
    """An answer with the mirror's content, spoilt as told.

    Args:
        cut: send only so many bytes of the body.
        part: answer a Range request with no more than so many bytes of what was asked for.
        ranges, if_range: whether the request's Range and If-Range are respected.
        length: whether Content-Length is sent.
        shift: added to the first byte of a range.
        stall: keep the connection open after the cut.
    """

    def answer(mirror: Mirror, handler: BaseHTTPRequestHandler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        if asked and if_range and handler.headers.get("If-Range", mirror.etag) != mirror.etag:
            asked = None
        first = int(asked[1]) + shift if asked else 0
        total = len(mirror.content)
        body = mirror.content[first:][: part if asked else None]
        if asked and first >= total:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{total}")
            handler.end_headers()
            return
        handler.send_response(status or (206 if asked else 200))
        if asked:
            handler.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        if length:
            handler.send_header("Content-Length", str(len(body)))
        for name, value in ({"ETag": mirror.etag} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body[:cut])
        handler.wfile.flush()
        if stall:
            mirror.released.wait(20)

    return answer


def plain(status: int, body: bytes = b"", reason: str | None = None, **headers):
    """An answer that is not the archive."""

    def answer(_: Mirror, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status, reason)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def hang(mirror: Mirror, handler: BaseHTTPRequestHandler) -> None:
    mirror.released.wait(20)


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch):
    monkeypatch.setattr(downloader, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def mirror():
    mirror = Mirror()
    yield mirror
    mirror.close()


def download(root: Path, *flags: object, md5_of: bytes = ARCHIVE) -> None:
    """Run the script's main for one task, by default with the digest of the small archive."""
    digest = [] if "--md5" in flags else ["--md5", md5(md5_of)]
    arguments = ["--msd_task", TASK, "--root", root, *digest, *flags]
    downloader.main(downloader.parse_args([str(argument) for argument in arguments]))


def put_archive(root: Path, content: bytes) -> None:
    root.mkdir(exist_ok=True)
    (root / f"{TASK}.tar").write_bytes(content)


def assert_whole(root: Path, members=None, others: tuple[str, ...] = ()) -> None:
    """The task's folder holds the archive's files and the marker, and ``root`` nothing but it and ``others``."""
    expected = {info.name: content for info, content in members or heart_members() if info.isreg()}
    found = {str(path.relative_to(root)): path for path in (root / TASK).rglob("*") if path.is_file()}
    found.pop(f"{TASK}/{downloader.MARKER}")
    assert {name: path.read_bytes() for name, path in found.items()} == expected
    assert sorted(os.listdir(root)) == sorted([TASK, *others])


# What the connection may do.


@pytest.mark.parametrize(
    ("script", "ranges"),
    [
        pytest.param([], [None], id="well-behaved"),
        pytest.param([serve(cut=HALF)], [None, "partial"], id="cut"),
        pytest.param([serve(cut=70_000)] * 3, [None] + ["partial"] * 3, id="cut more often than --retries"),
        pytest.param([serve(cut=HALF), serve(part=50_000)], [None, "partial", "partial"], id="smaller part"),
        pytest.param([serve(cut=HALF), serve(ranges=False)], [None, "partial"], id="no Range support"),
        pytest.param([plain(500)], [None, None], id="500 then 200"),
        pytest.param([serve(cut=HALF), plain(503)], [None, "partial", "partial"], id="cut and 503"),
        pytest.param([plain(429)], [None, None], id="429 then 200"),
        pytest.param([serve(cut=HALF), serve(shift=1000)], [None, "partial", None], id="wrong part"),
        pytest.param([serve(cut=HALF), plain(416)], [None, "partial", None], id="416"),
        pytest.param([serve(length=False)], [None], id="no Content-Length"),
        pytest.param([serve(cut=HALF, stall=True)], [None, "partial"], id="stalled in the body"),
        pytest.param([serve(cut=0, stall=True)], [None, None], id="stalled after the headers"),
        pytest.param([plain(302, Location="/elsewhere")], [None, None], id="redirect"),
        pytest.param([serve(cut=HALF, ETag='W/"weak"')], [None, None], id="nothing that names the version"),
    ],
)
def test_recovers(mirror, tmp_path, script, ranges):
    mirror.script = list(script)
    download(tmp_path, "--url", mirror.url, "--timeout", 0.5, "--retries", 2)
    assert_whole(tmp_path)
    asked = [request.get("Range") for request in mirror.requests]
    assert [bool(value) for value in asked] == [bool(value) for value in ranges]
    starts = [int(value[len("bytes=") : -1]) for value in asked if value]
    assert all(0 < start < len(ARCHIVE) for start in starts) and starts == sorted(starts)
    assert all(request["Accept-Encoding"] == "identity" for request in mirror.requests)
    assert all(request["If-Range"] == '"one"' for request in mirror.requests if "Range" in request)


@pytest.mark.parametrize("if_range", [True, False])
def test_file_that_changes_between_attempts_starts_over(mirror, tmp_path, if_range):
    def serve_other_version(mirror, handler):
        mirror.content, mirror.etag = OTHER_VERSION, '"two"'
        serve(if_range=if_range)(mirror, handler)

    mirror.script = [serve(cut=HALF), serve_other_version]
    download(tmp_path, "--url", mirror.url, md5_of=OTHER_VERSION)
    assert_whole(tmp_path, heart_members(3))


def test_partial_of_an_earlier_run_is_continued_and_a_foreign_one_is_not(mirror, tmp_path):
    mirror.script = [serve(cut=HALF)]
    with pytest.raises(UserError, match="failed in attempt 1 of 1: "):
        download(tmp_path, "--url", mirror.url, "--retries", 0)
    arrived = (tmp_path / f"{TASK}.tar.partial").stat().st_size
    assert 0 < arrived <= HALF
    download(tmp_path, "--url", mirror.url, "--keep_archive")
    assert mirror.requests[1]["Range"] == f"bytes={arrived}-"
    assert_whole(tmp_path, others=(f"{TASK}.tar",))

    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / f"{TASK}.tar.partial").write_bytes(b"of another program")
    download(tmp_path, "--url", mirror.url)
    assert "Range" not in mirror.requests[2]
    assert_whole(tmp_path)


@pytest.mark.parametrize(("total", "requests"), [(len(ARCHIVE), 0), (None, 1)])
def test_partial_that_is_whole_is_not_downloaded_again(mirror, tmp_path, total, requests):
    """With an unknown size the server is asked, and answers 416."""
    (tmp_path / f"{TASK}.tar.partial").write_bytes(ARCHIVE)
    (tmp_path / f"{TASK}.tar.partial.json").write_text(json.dumps({"validator": '"one"', "total": total}))
    download(tmp_path, "--url", mirror.url)
    assert len(mirror.requests) == requests
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("script", "message", "num_requests", "kept"),
    [
        pytest.param([plain(404)], "404 'Not Found': check --url", 1, False, id="404"),
        pytest.param([plain(403)], "403 'Forbidden'", 1, False, id="403"),
        pytest.param([plain(500)] * 9, "failed in attempt 3 of 3: .*500", 3, False, id="500 for ever"),
        pytest.param([serve(stall=True, cut=0)] * 9, "failed in attempt 3 of 3: .*timed out", 3, False, id="stalled"),
        pytest.param([hang] * 9, "failed in attempt 3 of 3: .*timed out", 3, False, id="no answer at all"),
        pytest.param([serve(cut=HALF)] + [serve(cut=0)] * 9, "kB are kept", 3, True, id="cut for ever"),
        pytest.param([plain(200, ARCHIVE[::-1])], f"md5 .*, not {md5(ARCHIVE)}; it was deleted", 1, False, id="bytes"),
        pytest.param([serve(length=False, cut=HALF)], "md5 .* it was deleted", 1, False, id="cut without a length"),
        pytest.param([plain(200, b"<html>", Content_Type="text/html")], "answers with a web page", 1, False, id="HTML"),
        pytest.param([plain(200, b"<html>")], "it was deleted", 1, False, id="HTML that does not say so"),
        pytest.param(
            [plain(302, Location="ftp://x/y.tar")], "redirects to 'ftp://x/y.tar'", 1, False, id="redirect to ftp"
        ),
        pytest.param([plain(302, Location="/again")] * 9, "redirects more than 5 times", 6, False, id="redirect loop"),
        pytest.param([serve(status=206)], "answers 206", 1, False, id="206 unasked"),
        pytest.param([plain(302, Location="http://[/x.tar")], "cannot be fetched", 1, False, id="redirect to ["),
        pytest.param([plain(302, Location="http://x:99999/")], "cannot be fetched", 1, False, id="redirect to no port"),
        pytest.param([plain(302, Location=f"http://{'x' * 99}/")], "cannot be fetched", 1, False, id="to no name"),
        pytest.param(
            [plain(302, Location="file:///etc/passwd")], "redirects to 'file:///etc", 1, False, id="to a file"
        ),
        pytest.param([plain(302)], "answers 302", 1, False, id="redirect to nothing"),
        pytest.param(
            [plain(200, gzip.compress(ARCHIVE), Content_Encoding="gzip")], "Content-Encoding", 1, False, id="gzip"
        ),
        pytest.param([plain(200, b"x", Content_Length="9" * 5000)], "it was deleted", 1, False, id="absurd length"),
        pytest.param([plain(200, b"x", Content_Length="9" * 18)], "are needed", 1, False, id="length of no disk"),
        pytest.param([plain(404, reason="\x1b[2J")], r"answers 404 '\\x1b\[2J'", 1, False, id="terminal codes"),
    ],
)
def test_gives_up(mirror, tmp_path, script, message, num_requests, kept):
    mirror.script = list(script)
    with pytest.raises(UserError, match=message) as raised:
        download(tmp_path, "--url", mirror.url, "--retries", 2, "--timeout", 0.3)
    assert TASK in str(raised.value)
    assert len(mirror.requests) == num_requests
    assert any(path.stat().st_size for path in tmp_path.glob("*.partial")) == kept
    assert not (tmp_path / TASK).exists() and not (tmp_path / f"{TASK}.tar").exists()


def test_pauses_grow_up_to_a_limit_and_are_short_again_after_progress(mirror, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(downloader, "FIRST_WAIT", 1)
    monkeypatch.setattr(downloader, "LONGEST_WAIT", 5)
    monkeypatch.setattr(time, "sleep", waits.append)
    mirror.script = [plain(503)] * 4 + [serve(cut=HALF)] + [plain(503)] * 2
    download(tmp_path, "--url", mirror.url, "--retries", 4)
    assert waits == [1, 2, 4, 5, 1, 2, 4]


def test_a_body_without_end_stops_before_the_disk_is_full(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(downloader, "MAX_UNPACKED", 100_000)
    mirror.script = [serve(length=False)]
    with pytest.raises(UserError, match=f"{TASK}.tar sends more than 100.0 kB"):
        download(tmp_path, "--url", mirror.url)
    assert os.listdir(tmp_path) == []


def test_wrong_bytes_in_the_resumed_part_are_noticed(mirror, tmp_path):
    def spoil(mirror, handler):
        mirror.content = ARCHIVE[:-1] + b"x"
        serve()(mirror, handler)

    mirror.script = [serve(cut=HALF), spoil]
    with pytest.raises(UserError, match="it was deleted"):
        download(tmp_path, "--url", mirror.url)
    assert os.listdir(tmp_path) == []


def test_refused_connection_names_the_url(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/{TASK}.tar"
        with pytest.raises(UserError, match=re.escape(url)):
            download(tmp_path, "--url", url, "--retries", 0)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_is_not_left(mirror, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    secure = Mirror()
    secure.server.socket = context.wrap_socket(secure.server.socket, server_side=True)
    url = secure.url.replace("http://127.0.0.1", "https://localhost")
    try:
        secure.script = [plain(302, Location=mirror.url)]
        with pytest.raises(UserError, match="redirects to 'http://127.0.0.1.*which is not https"):
            download(tmp_path / "data", "--url", url)
        assert mirror.requests == []
        download(tmp_path / "data", "--url", url)
        assert_whole(tmp_path / "data")
    finally:
        secure.close()


# What the disk may do.


def test_too_small_a_disk_is_refused_before_the_body_is_read(mirror, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, len(ARCHIVE) + 1))
    with pytest.raises(UserError, match=r"has 2\d\d\.\d kB free, but 4\d\d\.\d kB are needed"):
        download(tmp_path, "--url", mirror.url)
    assert os.listdir(tmp_path) == []
    # There is room for the rest where a part has arrived before.
    (tmp_path / f"{TASK}.tar.partial").write_bytes(ARCHIVE[:-1])
    (tmp_path / f"{TASK}.tar.partial.json").write_text(json.dumps({"validator": '"one"', "total": len(ARCHIVE)}))
    download(tmp_path, "--url", mirror.url)
    assert_whole(tmp_path)


def test_too_small_a_disk_for_unpacking(tmp_path, monkeypatch):
    put_archive(tmp_path, ARCHIVE)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(UserError, match="has 1.0 kB free"):
        download(tmp_path)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]


@pytest.mark.parametrize("place", ["a file", "below a file", "denied"])
def test_root_that_cannot_be_written_to(mirror, tmp_path, place):
    (tmp_path / "file").touch()
    root = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "root", "denied": Path("/sys/kernel")}[
        place
    ]
    if place == "denied" and not root.is_dir():
        pytest.skip("needs a folder that is closed even to root, such as Linux' /sys")
    with pytest.raises(UserError, match=f"--root {root} is not a folder that can be written to"):
        download(root, "--url", mirror.url)
    assert mirror.requests == []


def test_failure_of_the_final_move_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    put_archive(tmp_path, ARCHIVE)
    (tmp_path / TASK).mkdir()
    (tmp_path / TASK / "notes.txt").write_text("mine")
    real = os.replace

    def deny(source, target):
        if Path(source).parent.name == f"{TASK}.partial_extract":
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", deny)
    with pytest.raises(UserError, match=f"Permission denied.*{TASK}.*--root"):
        download(tmp_path)
    assert (tmp_path / TASK / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [TASK, f"{TASK}.tar"]


# What an archive may hold.


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member(f"{TASK}/../../evil", b"x"), "points out of the folder"),
        (member("../evil", b"x"), "points out of the folder"),
        (member("/tmp/evil", b"x"), "points out of the folder"),
        (member(f"{TASK}\\..\\evil", b"x"), "points out of the folder"),
        (member(f"{TASK}/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file or folder"),
        (member(f"{TASK}/._link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file or folder"),
        (member(f"{TASK}/link", type=tarfile.LNKTYPE, linkname=f"{TASK}/dataset.json"), "no plain file or folder"),
        (member(f"{TASK}/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "no plain file or folder"),
        (member(f"{TASK}/device", type=tarfile.BLKTYPE, devmajor=1, devminor=3), "no plain file or folder"),
        (member(f"{TASK}/fifo", type=tarfile.FIFOTYPE), "no plain file or folder"),
        (member(f"{TASK}/sparse", type=tarfile.GNUTYPE_SPARSE), "no plain file or folder"),
        (
            member(f"{TASK}/sparse", b"x", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}),
            "no plain file",
        ),
        (member("Task09_Spleen/file", b"x"), f"is not in {TASK}/"),
        (member("file", b"x"), f"is not in {TASK}/"),
        (member(f"{TASK}/dataset.json", b"{}"), "is there twice"),
        (member(f"{TASK}/dataset.json/x", b"{}"), "is there twice"),
        (member(f"{TASK}/dataset.json", type=tarfile.DIRTYPE), "is there twice"),
        (member(f"{TASK}/imagesTr", b"x"), "is there twice"),
        (member(TASK, b"x"), "is there twice"),
        (member(f"{TASK}/" + "x/" * 2000, type=tarfile.DIRTYPE), "is no name of a file"),
        (member(f"{TASK}/" + "x" * 256, b"x"), "is no name of a file"),
        (member(f"{TASK}/x\x00y", b"x", pax_headers={"path": f"{TASK}/x\x00y"}), "is no name of a file"),
        (member(f"{TASK}/\x1b[2J\n", b"x"), "is no name of a file"),
        (member(f"{TASK}/\udcff", b"x"), "is no name of a file"),
        (member(f"{TASK}/{downloader.MARKER}", b"x"), "is no name of a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0].name!a:.60}-{value[0].type.decode()}",
)
def test_nothing_of_a_bad_archive_is_written(tmp_path, bad, message):
    """The bad member comes last: those before it must not have been written either."""
    root = tmp_path / "root"
    content = tar_of([*heart_members(), bad])
    put_archive(root, content)
    with pytest.raises(UserError, match=f"member {re.escape(ascii(bad[0].name)[:60])}.* {message}"):
        download(root, md5_of=content)
    assert os.listdir(tmp_path) == ["root"] and os.listdir(root) == [f"{TASK}.tar"]


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"".join(header(tarfile.XHDTYPE, b"9 x=1234\n") for _ in range(2000)), id="2000 headers for one"),
        pytest.param(header(tarfile.XHDTYPE, b"11 size=-9\n") + header(tarfile.REGTYPE, b""), id="negative size"),
        pytest.param(header(tarfile.GNUTYPE_LONGNAME, b"x", 2**40), id="a name of 1 TB"),
        pytest.param(header(tarfile.XHDTYPE, b"x", 2**60), id="a header of 1 EB"),
    ],
)
def test_headers_that_exhaust_or_mislead_the_reader(tmp_path, start):
    content = start + ARCHIVE
    put_archive(tmp_path, content)
    with pytest.raises(UserError, match=f"{TASK}.tar"):
        download(tmp_path, md5_of=content)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]


def test_modes_and_owners_of_an_archive_do_not_count(tmp_path):
    """No file that runs, runs as its owner, or that others may write to."""
    members = heart_members()
    for info, _ in members:
        info.mode, info.uid, info.gid = 0o7777, 12345, 12345
    put_archive(tmp_path, tar_of(members))
    umask = os.umask(0o022)
    try:
        download(tmp_path, md5_of=tar_of(members))
    finally:
        os.umask(umask)
    for path in (tmp_path / TASK).rglob("*"):
        status = path.stat()
        assert status.st_mode & 0o7777 == (0o755 if path.is_dir() else 0o644)
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())


def test_a_link_in_the_place_of_the_unpacked_folder_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    put_archive(tmp_path / "root", ARCHIVE)
    (tmp_path / "root" / f"{TASK}.partial_extract").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{TASK}.partial_extract"):
        download(tmp_path / "root")
    assert os.listdir(tmp_path / "elsewhere") == []


def test_caps_on_an_archive(tmp_path, monkeypatch):
    huge = member(f"{TASK}/huge")
    huge[0].size = 10**12
    content = huge[0].tobuf() + ARCHIVE
    put_archive(tmp_path, content)
    with pytest.raises(UserError, match="more than 20000 members or 100.0 GB"):
        download(tmp_path, md5_of=content)
    put_archive(tmp_path, ARCHIVE)
    monkeypatch.setattr(downloader, "MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="more than 3 members"):
        download(tmp_path)


def test_apple_double_files_and_leading_dots_are_dropped(tmp_path):
    members = [member("./._" + TASK, b"apple"), member(".", type=tarfile.DIRTYPE)]
    for info, content in heart_members():
        members.append(member("./" + info.name, content, type=info.type))
        if info.isreg():
            folder, name = info.name.rsplit("/", 1)
            members.append(member(f"./{folder}/._{name}", b"apple"))
    content = tar_of(members)
    put_archive(tmp_path, content)
    download(tmp_path, md5_of=content)
    assert_whole(tmp_path, others=(f"{TASK}.tar",))


@pytest.mark.parametrize("digest", ["none", "right"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            tar_of(heart_members()[:-1]), "1 of the 5 files .* missing .*imagesTs/la_002.nii.gz", id="last member lost"
        ),
        pytest.param(tar_of(heart_members()[:3]), "4 of the 5 files .* missing", id="labels lost"),
        pytest.param(
            tar_of([member(f"{TASK}/imagesTr/la_000.nii.gz", IMAGE)]), "no .*dataset.json", id="no dataset.json"
        ),
        pytest.param(ARCHIVE[:HALF], "damaged", id="cut in a member"),
        pytest.param(b"<html>not a tar</html>", "damaged", id="not a tar"),
        pytest.param(b"", "damaged", id="empty"),
        pytest.param(tar_of(heart_members(training=[{"image": "x"}])), "must list objects", id="without label"),
        *(
            pytest.param(tar_of(heart_members(test=[name])), "files outside its folder", id=f"names {name!r}")
            for name in ("../../x", "/etc/passwd", "imagesTs/../../../x", "..\\x")
        ),
        *(
            pytest.param(tar_of(heart_members(test=[name])), "missing or empty", id=f"names {name[:9]!r}")
            for name in ("x\x00y", "\ud800", "x" * 5000, "", ".", "\x1b[2J")
        ),
        *(
            pytest.param(tar_of(heart_members(**{key: value})), "must list objects", id=f"{key} {value!r}")
            for key, values in (("training", (None, 5, ["x"], {"x": 1}, [[]])), ("test", (None, 5)))
            for value in values
        ),
        pytest.param(tar_of(heart_members(training=[])), "names no training case", id="no training case"),
    ],
)
def test_archive_that_is_not_whole(tmp_path, content, message, digest):
    put_archive(tmp_path, content)
    with pytest.raises(UserError, match=message) as raised:
        download(tmp_path, "--md5", "none" if digest == "none" else md5(content))
    assert "\x1b" not in str(raised.value)
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        (heart_members(2, 1), "2 training cases; its numTraining is 2, and the published archive has 20"),
        (heart_members(20, 9), "9 test cases; its numTest is 9, and the published archive has 10"),
        (heart_members(20, 10, numTest=11), "10 test cases; its numTest is 11, and the published archive has 10"),
        (heart_members(20, 10), None),
    ],
    ids=["few", "one test case less", "dataset.json disagrees", "all"],
)
def test_counts_without_and_with_a_digest(tmp_path, caplog, members, problem):
    """Without a digest only the published numbers vouch for an archive; with one they are a remark."""
    content = tar_of(shrink(members))
    put_archive(tmp_path, content)
    if problem:
        with pytest.raises(UserError, match=problem):
            download(tmp_path, "--md5", "none")
        assert os.listdir(tmp_path) == [f"{TASK}.tar"]
        download(tmp_path, md5_of=content)
        assert problem in caplog.text
    else:
        download(tmp_path, "--md5", "none")
        assert "nothing vouches" in caplog.text and md5(content) in caplog.text
    assert (tmp_path / TASK / downloader.MARKER).read_text().strip() == md5(content)


def shrink(members):
    """The same members with images of 10 bytes."""
    return [member(info.name, data[:10], type=info.type) if data is IMAGE else (info, data) for info, data in members]


def test_published_digests_are_the_default(mirror, tmp_path):
    args = downloader.parse_args(["--msd_task", "all", "--root", str(tmp_path)])
    plans = [downloader.plan_download(task, args) for task in args.msd_task]
    assert [plan.md5 for plan in plans] == [archive.md5 for archive in ARCHIVES.values()]
    assert plans[8].url == "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task09_Spleen.tar"
    with pytest.raises(UserError, match=f"not {ARCHIVES[TASK].md5}"):
        downloader.main(downloader.parse_args(["--msd_task", TASK, "--root", str(tmp_path), "--url", mirror.url]))


# What an earlier run, or the user, left behind.


def test_complete_folder_is_left_alone(mirror, tmp_path, caplog):
    caplog.set_level("INFO")
    download(tmp_path, "--url", mirror.url)
    (tmp_path / TASK / "labelsTr" / "la_000.nii.gz").write_text("corrected by hand")
    download(tmp_path, "--url", mirror.url)
    assert "nothing to do (2 training, 1 test cases)" in caplog.text and "accepted" not in caplog.text
    (tmp_path / TASK / downloader.MARKER).unlink()
    download(tmp_path, "--url", mirror.url)
    assert "accepted without .complete" in caplog.text
    assert len(mirror.requests) == 1
    assert (tmp_path / TASK / "labelsTr" / "la_000.nii.gz").read_text() == "corrected by hand"


@pytest.mark.parametrize("damage", ["missing", "empty", "dataset.json missing", "dataset.json malformed"])
@pytest.mark.parametrize("marker", [True, False])
def test_incomplete_folder_is_repaired_and_own_files_are_kept(mirror, tmp_path, damage, marker):
    download(tmp_path, "--url", mirror.url)
    folder = tmp_path / TASK
    if damage == "missing":
        (folder / "imagesTr" / "la_001.nii.gz").unlink()
    elif damage == "empty":
        (folder / "labelsTr" / "la_001.nii.gz").write_bytes(b"")
    elif damage == "dataset.json missing":
        (folder / "dataset.json").unlink()
    else:
        (folder / "dataset.json").write_text('{"training": [')
    if not marker:
        (folder / downloader.MARKER).unlink()
    own = {"notes.txt": "mine", "imagesTr/own.nii.gz": "image", "predictions/deep/x.txt": "result"}
    for name, text in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link").symlink_to(tmp_path)
    download(tmp_path, "--url", mirror.url)
    for name, text in own.items():
        assert (folder / name).read_text() == text
        (folder / name).unlink()
    assert (folder / "link").readlink() == tmp_path
    (folder / "link").unlink()
    assert_whole(tmp_path)


def test_complete_folder_behind_a_link_is_left_alone(mirror, tmp_path):
    download(tmp_path / "shared", "--url", mirror.url)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / TASK).symlink_to(tmp_path / "shared" / TASK)
    download(tmp_path / "own", "--url", mirror.url)
    assert len(mirror.requests) == 1 and (tmp_path / "own" / TASK).is_symlink()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_folder_that_is_a_file_or_a_link_is_refused(mirror, tmp_path, kind):
    root = tmp_path / "root"
    root.mkdir()
    if kind == "file":
        (root / TASK).touch()
    else:
        (root / TASK).symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link or a file that is not the whole task"):
        download(root, "--url", mirror.url)
    assert mirror.requests == []


def test_archive_with_another_digest_is_refused_and_stays(mirror, tmp_path):
    put_archive(tmp_path, OTHER_VERSION)
    with pytest.raises(UserError, match=f"{TASK}.tar has the md5 {md5(OTHER_VERSION)}, not {md5(ARCHIVE)}: delete it"):
        download(tmp_path, "--url", mirror.url)
    assert mirror.requests == []
    assert (tmp_path / f"{TASK}.tar").read_bytes() == OTHER_VERSION


def test_interrupted_unpacking_leaves_no_folder_and_is_done_again(mirror, tmp_path, monkeypatch):
    real, calls = shutil.copyfileobj, []

    def interrupt(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(shutil, "copyfileobj", interrupt)
        download(tmp_path, "--url", mirror.url)
    assert stopped.value.code == 130
    assert os.listdir(tmp_path) == [f"{TASK}.tar"]
    # After SIGKILL the temporary folder is there too.
    (tmp_path / f"{TASK}.partial_extract" / TASK).mkdir(parents=True)
    (tmp_path / f"{TASK}.partial_extract" / TASK / "dataset.json").write_text("{")
    download(tmp_path, "--url", mirror.url)
    assert len(mirror.requests) == 1
    assert_whole(tmp_path, others=(f"{TASK}.tar",))


@pytest.mark.parametrize("swapped", [False, True])
def test_run_killed_in_the_moment_of_replacement(mirror, tmp_path, swapped):
    """The old folder stands aside; the new one is not in place yet, or is."""
    download(tmp_path, "--url", mirror.url)
    replaced = tmp_path / f"{TASK}.partial_replaced"
    if swapped:
        replaced.mkdir()
    else:
        os.replace(tmp_path / TASK, replaced)
        (replaced / "dataset.json").unlink()
    (replaced / "notes.txt").write_text("mine")
    download(tmp_path, "--url", mirror.url)
    assert (tmp_path / TASK / "notes.txt").read_text() == "mine"
    (tmp_path / TASK / "notes.txt").unlink()
    assert_whole(tmp_path)


# The command line.


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_help_is_quick_and_names_every_flag(tmp_path):
    start = time.monotonic()
    result = run("-h", cwd=tmp_path)
    assert time.monotonic() - start < 5
    assert result.returncode == 0
    for word in ("msd_task", "root", "keep_archive", "url", "md5", "retries", "timeout"):
        assert f"--{word}" in result.stdout
    assert "Task09_Spleen" in result.stdout and "amazonaws.com/{task}.tar" in result.stdout
    script = "import sys, download_msd_datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--msd_task Task11_Brain", "Task11_Brain"),
        ("--url file:///data/x.tar", "file:///data/x.tar is not an http or https address"),
        ("--url ftp://host/x.tar", "ftp://host/x.tar is not an http or https address"),
        ("--url host/x.tar", "host/x.tar is not an http or https address"),
        ("--url https:///x.tar", "https:///x.tar is not an http or https address"),
        ("--msd_task all --url http://host/x.tar", "has no {task} in it, but --msd_task names 10 tasks"),
        ("--md5 123", "123 is neither 32 hexadecimal digits nor 'none'"),
        (f"--msd_task {TASK} Task03_Liver --md5 {'0' * 32}", "is one archive's digest, but --msd_task names 2 tasks"),
        ("--retries -1 --timeout 0", "--retries -1 must be 0 or more; --timeout 0.0 must be"),
        ("--timeout nan", "--timeout nan must be"),
    ],
)
def test_bad_flags_are_refused_at_once(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        downloader.parse_args(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_several_tasks_go_on_after_a_failure(mirror, tmp_path):
    url = mirror.url.replace(TASK, "{task}")
    mirror.script = [plain(404), serve(), plain(404)]
    tasks = ("Task04_Hippocampus", TASK, "Task05_Prostate")
    result = run("--msd_task", *tasks, "--root", tmp_path, "--url", url, "--md5", "none")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    # The small archive lacks cases, and without a digest that is an error.
    assert last.startswith("error: 3 of 3 tasks failed: Task04_Hippocampus: http")
    assert f"{TASK}: {tmp_path / TASK}.tar: it holds 2 training cases" in last and "Task05_Prostate: http" in last
    assert len(mirror.requests) == 3


def test_script_from_download_to_folder(mirror, tmp_path):
    flags = ("--msd_task", TASK, "--root", tmp_path / "new" / "root", "--md5", md5(ARCHIVE))
    result = run(*flags, "--url", mirror.url, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_whole(tmp_path / "new" / "root")
    result = run(*flags, "--url", mirror.url)
    assert result.returncode == 0 and "is complete, nothing to do" in result.stderr
    assert len(mirror.requests) == 1


def test_ctrl_c_is_continued_by_the_same_command(mirror, tmp_path):
    mirror.script = [serve(cut=HALF, stall=True)]
    flags = ("--msd_task", TASK, "--root", tmp_path, "--md5", md5(ARCHIVE), "--url", mirror.url)
    command = [sys.executable, SCRIPT, *map(str, flags), "--timeout", "30"]
    # A shell in the background ignores SIGINT and hands that on.
    heed_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_sigint) as process:
        deadline = time.monotonic() + 20
        while not downloader.size_of(tmp_path / f"{TASK}.tar.partial") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 130, stderr
    assert "interrupted; what has arrived is kept in" in stderr and "Traceback" not in stderr
    assert (tmp_path / f"{TASK}.tar.partial").stat().st_size > 0
    result = run(*flags)
    assert result.returncode == 0, result.stderr
    assert mirror.requests[1]["Range"].startswith("bytes=")
    assert_whole(tmp_path)
