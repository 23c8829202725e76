"""Bundles on a web server and in S3: what is fetched when, connections that break, an interrupted download."""

import functools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles import BundleCorrupt, BundleError, BundleNotFound, read_manifest
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.remote import web
from coreinfer.bundles.remote.opening import find_bundle

from .bundle_factory import flip_bit
from .model_factory import corpus_texts

pytest.importorskip("aiohttp")


class Site:
    """A server of one folder that answers ranges.

    Attributes:
        sent: path -> bytes of its contents that were sent.
        breaks: path -> how often its connection is still to break, after half of what was asked for.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.breaks: Counter[str] = Counter()
        self.knows_ranges = True
        self.address = ""


class _Handler(SimpleHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Say nothing."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, asked, name = path.read_bytes(), self.headers["Range"], self.path.lstrip("/")
        start, end = 0, len(data)
        if asked and self.site.knows_ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), int(last or len(data) - 1) + 1
        body = data[start:end]
        self.send_response(206 if asked and self.site.knows_ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.site.breaks[name]:
            self.site.breaks[name] -= 1
            body = body[: len(body) // 2]
        self.site.sent[name] += len(body)
        self.wfile.write(body)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Path], Site]]:
    """A function (folder) that serves it; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(web, "_PAUSE_SECONDS", 0.01)
    servers: list[ThreadingHTTPServer] = []

    def start(folder: Path) -> Site:
        site = Site()
        handler = type("Handler", (_Handler,), {"site": site})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))))
        site.address = f"http://127.0.0.1:{servers[-1].server_address[1]}"
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def packs_only(tiny_bundle: Callable[..., Path]) -> Path:
    """A bundle without the dense FFN: a prompt needs one pack and no more."""
    return tiny_bundle("llama", dense=False)


def test_a_bundle_on_a_web_server(serve: Callable[[Path], Site], packs_only: Path) -> None:
    site = serve(packs_only)
    prompt = corpus_texts()[0]
    ours = runtime.load(packs_only, threads=1).generate(prompt, max_new_tokens=8, seed=1)
    for _ in range(2):
        theirs = runtime.load(site.address, threads=1).generate(prompt, max_new_tokens=8, seed=1)
        assert theirs.text == ours.text
        # The second time all but the manifest is there.
        manifest = read_manifest(packs_only)
        pack = manifest.pack_files[ours.cluster]
        assert [name for name in site.sent if name.startswith(LAYOUT.clusters)] == [pack]
        assert site.sent[pack] == manifest.files[pack].bytes
        assert LAYOUT.report not in site.sent


def test_broken_connections_go_on_where_they_were(
    serve: Callable[[Path], Site], packs_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_RANGE_BYTES", 10_000)
    site = serve(packs_only)
    site.breaks[LAYOUT.base] = 2
    find_bundle(site.address)
    # Each break cost half a range.
    assert site.sent[LAYOUT.base] == read_manifest(packs_only).files[LAYOUT.base].bytes + 2 * 5_000


def test_an_interrupted_download_is_resumed_by_the_next_process(
    serve: Callable[[Path], Site], packs_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_RANGE_BYTES", 10_000)
    site = serve(packs_only)
    site.breaks[LAYOUT.base] = 1000
    size = read_manifest(packs_only).files[LAYOUT.base].bytes
    real = web._attempted

    def after_two_ranges(place: Any, name: str, read: Any) -> bytes:
        if name == LAYOUT.base and site.breaks[name] == 1000 and site.sent[name] < 20_000:
            site.breaks[name] = 0
            try:
                return real(place, name, read)
            finally:
                site.breaks[name] = 1000
        return real(place, name, read)

    monkeypatch.setattr(web, "_attempted", after_two_ranges)
    with pytest.raises(BundleError, match=r"base.safetensors cannot be fetched .* run the same again"):
        find_bundle(site.address)
    site.breaks.clear()
    site.sent.clear()
    find_bundle(site.address)
    assert site.sent[LAYOUT.base] == size - 20_000


def test_a_server_without_ranges_is_read_whole(
    serve: Callable[[Path], Site], packs_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_RANGE_BYTES", 10_000)
    site = serve(packs_only)
    site.knows_ranges = False
    engine = runtime.load(site.address, threads=1)
    assert engine.generate(corpus_texts()[0], max_new_tokens=2).text is not None
    assert site.sent[LAYOUT.base] == read_manifest(packs_only).files[LAYOUT.base].bytes


def test_a_damaged_file_is_refused(serve: Callable[[Path], Site], make_bundle: Callable[..., Path]) -> None:
    bundle_dir = make_bundle()
    flip_bit(bundle_dir / LAYOUT.base)
    site = serve(bundle_dir)
    with pytest.raises(BundleCorrupt, match=rf"{site.address}: base.safetensors: expected sha256"):
        find_bundle(site.address)
    assert site.sent[LAYOUT.base] == 2 * (bundle_dir / LAYOUT.base).stat().st_size


def test_a_file_cut_short_on_the_server(serve: Callable[[Path], Site], make_bundle: Callable[..., Path]) -> None:
    bundle_dir = make_bundle()
    path = bundle_dir / LAYOUT.base
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"base.safetensors: expected \d+ bytes from byte 0 on, got 100"):
        find_bundle(serve(bundle_dir).address)


def test_a_bundle_that_was_replaced_is_another(
    serve: Callable[[Path], Site], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = make_bundle("first"), make_bundle("second", seed=1)
    site = serve(tmp_path)
    (tmp_path / "now").symlink_to(first)
    folders = [find_bundle(f"{site.address}/now").folder]
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to(second)
    folders.append(find_bundle(f"{site.address}/now").folder)
    assert folders[0] != folders[1]
    assert (folders[1] / LAYOUT.base).read_bytes() == (second / LAYOUT.base).read_bytes()


def test_no_bundle_there(serve: Callable[[Path], Site], tmp_path: Path) -> None:
    site = serve(tmp_path)
    with pytest.raises(BundleNotFound, match=rf"{site.address}/none: no manifest.json there"):
        runtime.load(f"{site.address}/none")


def test_no_server_there(serve: Callable[[Path], Site]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/bundle"
        with pytest.raises(BundleError, match=rf"{address}: manifest.json cannot be fetched"):
            runtime.load(address)


# S3


@contextmanager
def local_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local S3 with an empty bucket, known to this process and those that it starts."""
    # It keeps connections to the server that another test had.
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**names, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="shelf")
    yield client
    server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """See `local_s3`; what is fetched from it is kept in a folder of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with local_s3(monkeypatch) as client:
        yield client


@pytest.mark.filterwarnings("ignore")
def test_a_bundle_in_s3(s3: Any, packs_only: Path, tmp_path: Path) -> None:
    for path in packs_only.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "shelf", f"tiny/{path.relative_to(packs_only).as_posix()}")
    prompt = corpus_texts()[0]
    ours = runtime.load(packs_only, threads=1).generate(prompt, max_new_tokens=8, seed=1)
    assert runtime.load("s3://shelf/tiny", threads=1).generate(prompt, max_new_tokens=8, seed=1).text == ours.text
    packs = [path.name for path in (tmp_path / "cache").rglob("clusters/*")]
    assert packs == [Path(read_manifest(packs_only).pack_files[ours.cluster]).name]
    with pytest.raises(BundleNotFound, match=r"s3://shelf/none: no manifest.json there"):
        runtime.load("s3://shelf/none")
