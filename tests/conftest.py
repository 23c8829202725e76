"""Fixtures that several test modules share."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coreinfer import runtime
from coreinfer.compiler import CompileConfig, compile_model

from .browser import open_browser
from .bundle_factory import one_at_a_time, with_more_positions, write_bundle, written_once
from .c_engine import CEngine
from .c_library import CModel, build_library
from .model_factory import save_corpus, save_encoder, save_model
from .quantized_factory import CASES, Weights, save_quantized

if TYPE_CHECKING:
    import openai
    from playwright.sync_api import Browser

    from .server_process import RunningServer


def pytest_configure() -> None:
    """Let Ctrl-C interrupt again: shells start background jobs without it, and the commands under test inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def c_library() -> Path:
    """Folder of the C library, with include/ and lib/."""
    return build_library()


@pytest.fixture
def open_in_c(c_library: Path) -> Callable[..., CModel]:
    """A function (bundle, **options) that opens a bundle by the C library."""
    return lambda bundle, **options: CModel(c_library, bundle, **options)


@pytest.fixture
def engine_in_c(c_library: Path) -> Callable[..., CEngine]:
    """The same, with the functions of coreinfer_engine.h."""
    return lambda bundle, **options: CEngine(c_library, bundle, **options)


@pytest.fixture(scope="session")
def bundle_template(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (**options of `write_bundle`) that writes each bundle once a session; only copies may be changed."""
    folder = tmp_path_factory.mktemp("bundle-templates")
    written: dict[str, Path] = {}

    def template(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in written:
            written[key] = write_bundle(folder / str(len(written)), **options)
        return written[key]

    return template


@pytest.fixture
def make_bundle(bundle_template: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function (name, **options of `write_bundle`) that puts a tiny whole bundle into the test's own folder."""

    def make(name: str = "bundle", **options: Any) -> Path:
        return Path(shutil.copytree(bundle_template(**options), tmp_path / name))

    return make


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """A function (*lines, name) that writes a JSON Lines file of what texts say and other objects are."""

    def write(*lines: object, name: str = "lines.jsonl") -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def bundle_dir(request: pytest.FixtureRequest, make_bundle: Callable[..., Path]) -> Path:
    """A tiny whole bundle; `parametrize("bundle_dir", [{"gated": False}], indirect=True)` passes options on."""
    return make_bundle(**getattr(request, "param", {}))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of pytest, the same for all processes of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_inputs(shared_folder: Path) -> Callable[[str], CompileConfig]:
    """A function (family) that gives the options of a tiny compile: 4 clusters, keep 0.67, no cache, target unset."""
    encoder, corpus, lock = shared_folder / "encoder", shared_folder / "corpus.txt", shared_folder / "inputs.lock"
    with one_at_a_time(lock):
        if not corpus.exists():
            save_encoder(shared_folder)
            save_corpus(corpus)

    def inputs(family: str) -> CompileConfig:
        model = shared_folder / family
        with one_at_a_time(lock):
            if not model.exists():
                save_model(model, family)
        return CompileConfig(
            model=str(model),
            output=shared_folder / "unset",
            clusters=4,
            keep=0.67,
            encoder=str(encoder),
            calibration=(str(corpus),),
            dtype="float32",
            budgets="uniform",
            quantize="bf16",
        )

    return inputs


@pytest.fixture(scope="session")
def tiny_bundle(tiny_inputs: Callable[[str], CompileConfig], shared_folder: Path) -> Callable[..., Path]:
    """A function (family, **CompileConfig fields) that compiles each tiny bundle once a run; do not change them.

    What compiles have in common comes from a cache; tests compare what is compiled without one with these.
    """
    folder, cache = shared_folder / "bundles", shared_folder / "cache"
    folder.mkdir(exist_ok=True)

    def write(family: str, output: Path, options: dict[str, Any]) -> None:
        given: dict[str, Any] = {"cache_dir": cache, **options, "output": output}
        compile_model(replace(tiny_inputs(family), **given))

    return written_once(folder, write)


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    """A tiny bundle for tests to which any will do; do not change it."""
    return tiny_bundle("llama")


@pytest.fixture(scope="session")
def long_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with room for longer texts, as tools need it; do not change it."""
    copy = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("long") / "long"))
    with_more_positions(copy, 2048)
    return copy


@pytest.fixture(scope="module")
def engine(bundle: Path) -> runtime.Engine:
    """The native engine on `bundle`."""
    return runtime.load(bundle, engine="native", threads=1)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator["RunningServer"]:
    """A server of `bundle`, whose answers have 64 tokens unless they are asked for otherwise."""
    # Not at the top: it needs packages that most tests do without, also where a GPU is checked.
    from .server_process import serving

    with serving(bundle, "--max-new-tokens", 64) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: "RunningServer") -> Iterator["openai.OpenAI"]:
    """OpenAI's own client of the server."""
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def model(bundle: Path) -> str:
    """The name that the server has for its bundle."""
    return bundle.name


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Headless Chromium; tests are skipped where there is none."""
    yield from open_browser()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for screenshots: COREINFER_SCREENSHOTS, else one of pytest's own."""
    folder = Path(os.environ.get("COREINFER_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny models gain nothing from threads, and lose much where other processes keep the cores busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Weights]]:
    """A function (case) that writes a model once and gives its folder and the weights that it stands for."""
    root = tmp_path_factory.mktemp("quantized")
    written: dict[str, tuple[Path, Weights]] = {}

    def save(case: str) -> tuple[Path, Weights]:
        if case not in written:
            written[case] = root / case, save_quantized(root / case, CASES[case])
        return written[case]

    return save


@pytest.fixture
def quantized_copy(quantized: Callable[[str], tuple[Path, Weights]], tmp_path: Path) -> Callable[[str], Path]:
    """A function (case) that gives a folder which a test may change."""
    return lambda case: Path(shutil.copytree(quantized(case)[0], tmp_path / case))
