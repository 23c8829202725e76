"""Bundles on the Hub, against a stand-in of it: what is fetched when, connections that break, damage, uploads."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from coreinfer import runtime
from coreinfer.bundles import BundleCorrupt, BundleError, BundleNotFound, ConfigError, read_manifest
from coreinfer.bundles.inspect import main as inspect_main
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.remote.opening import find_bundle
from coreinfer.bundles.remote.places import HubPlace, WebPlace, parse_place
from coreinfer.bundles.remote.push import push_bundle
from coreinfer.bundles.remote.push_command import main as push_main

from .bundle_factory import flip_bit
from .hub_server import Hub, serve_hub
from .model_factory import corpus_texts

REPO = "me/tiny"
# huggingface_hub uploads in a way that its HTTP library advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to, with an empty cache."""
    from huggingface_hub import constants

    with serve_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_stand_in")
        # Read when huggingface_hub was imported.
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield served


@pytest.fixture(scope="module")
def packs_only(tiny_bundle: Callable[..., Path]) -> Path:
    """A bundle without the dense FFN: a prompt needs one pack and no more."""
    return tiny_bundle("llama", dense=False)


def put(hub: Hub, bundle_dir: Path, repo: str = REPO) -> None:
    names = [LAYOUT.manifest, *read_manifest(bundle_dir).files]
    hub.repos[repo] = {name: (bundle_dir / name).read_bytes() for name in names}


def fetched_packs(hub: Hub) -> list[str]:
    return sorted(name for name in hub.sent if name.startswith(LAYOUT.clusters))


# Addresses


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf:me/tiny", HubPlace(repo="me/tiny")),
        ("hf:me/tiny-1.2_x@v1/a", HubPlace(repo="me/tiny-1.2_x", revision="v1/a")),
        (Path("hf:me/tiny"), HubPlace(repo="me/tiny")),
        ("https://a.org/b/c/", WebPlace(address="https://a.org/b/c")),
        (Path("https://a.org/b"), WebPlace(address="https://a.org/b")),
        ("s3://bucket/b", WebPlace(address="s3://bucket/b")),
        ("build/bundle", None),
        ("hf", None),
    ],
)
def test_addresses(text: str | Path, place: HubPlace | WebPlace | None) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize("text", ["hf:", "hf:me", "hf:me/tiny/more", "hf:me/tiny@", "hf:me/ti ny"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected hf:USER/NAME"):
        parse_place(text)


@pytest.mark.parametrize(
    "text",
    ["gs://bucket/b", Path("file:///b"), "HTTPS://a.org/b", "HF:me/tiny", "https://", Path("s3://"), "https:///"],
)
def test_addresses_that_bundles_are_not_fetched_from(text: str | Path) -> None:
    with pytest.raises(ConfigError, match=rf"{text}: expected a folder, hf:USER/NAME, https://HOST/PATH or s3://"):
        parse_place(text)


def test_a_folder_with_the_name_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs:/bucket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_place("gs:/bucket") is None


def test_commands_that_take_folders_know_addresses() -> None:
    shown = CliRunner().invoke(inspect_main, ["https://a.org/b"])
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: https:/a.org/b is an address, which only coreinfer-run, coreinfer-serve and")


# Loading


def test_only_what_the_first_prompt_needs_is_fetched(hub: Hub, packs_only: Path) -> None:
    put(hub, packs_only)
    engine = runtime.load(f"hf:{REPO}", threads=1)
    assert fetched_packs(hub) == []
    prompt = corpus_texts()[0]
    ours = runtime.load(packs_only, threads=1).generate(prompt, max_new_tokens=8, seed=1)
    assert engine.generate(prompt, max_new_tokens=8, seed=1).text == ours.text
    manifest = read_manifest(packs_only)
    pack = manifest.pack_files[ours.cluster]
    assert fetched_packs(hub) == [pack]
    # Base, router, tokenizer, manifest and one pack; not the report.
    others = {cluster.file for cluster in manifest.clusters} - {pack} | {LAYOUT.report}
    expected = sum(record.bytes for name, record in manifest.files.items() if name not in others)
    assert sum(hub.sent.values()) == expected + (packs_only / LAYOUT.manifest).stat().st_size


def test_other_packs_come_with_their_prompts(hub: Hub, packs_only: Path) -> None:
    put(hub, packs_only)
    engine = runtime.load(f"hf:{REPO}", threads=1)
    clusters = {engine.generate(prompt, max_new_tokens=2, mode="similarity").cluster for prompt in corpus_texts()[:4]}
    manifest = read_manifest(packs_only)
    assert fetched_packs(hub) == sorted(manifest.pack_files[cluster] for cluster in clusters)
    assert all(hub.sent[name] == manifest.files[name].bytes for name in fetched_packs(hub))


def test_what_was_fetched_is_not_fetched_again(hub: Hub, packs_only: Path) -> None:
    put(hub, packs_only)
    for _ in range(2):
        runtime.load(f"hf:{REPO}", threads=1).generate(corpus_texts()[0], max_new_tokens=2)
        once = dict(hub.sent)
    hub.sent.clear()
    runtime.load(f"hf:{REPO}", threads=1).generate(corpus_texts()[0], max_new_tokens=2)
    assert once
    assert sum(hub.sent.values()) == 0


def test_a_dense_bundle_brings_its_dense_ffn(hub: Hub, bundle: Path) -> None:
    put(hub, bundle)
    engine = runtime.load(f"hf:{REPO}", threads=1)
    assert hub.sent[LAYOUT.dense] == read_manifest(bundle).files[LAYOUT.dense].bytes
    assert engine.generate(corpus_texts()[0], max_new_tokens=2, mode="dense").text is not None
    assert fetched_packs(hub) == []


def test_a_connection_that_breaks_goes_on_where_it_was(
    hub: Hub, packs_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # Whole chunks are kept; by default they have 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16)
    put(hub, packs_only)
    hub.breaks[LAYOUT.base] = 2
    engine = runtime.load(f"hf:{REPO}", threads=1)
    size = read_manifest(packs_only).files[LAYOUT.base].bytes
    assert size % 64 == 0
    assert hub.sent[LAYOUT.base] == size
    asked = [asked for name, asked in hub.ranges if name == LAYOUT.base]
    assert asked == [f"bytes={size // 2}-", f"bytes={size // 4 * 3}-"]
    assert engine.generate(corpus_texts()[0], max_new_tokens=2).text is not None


def test_damage_on_the_way_is_fetched_again(hub: Hub, packs_only: Path) -> None:
    put(hub, packs_only)
    hub.damaged[LAYOUT.base] = 1
    runtime.load(f"hf:{REPO}", threads=1)
    assert hub.sent[LAYOUT.base] == 2 * read_manifest(packs_only).files[LAYOUT.base].bytes


def test_a_damaged_file_is_refused_before_it_is_used(hub: Hub, packs_only: Path) -> None:
    put(hub, packs_only)
    manifest = read_manifest(packs_only)
    for pack in manifest.pack_files:
        hub.damaged[pack] = 2
    engine = runtime.load(f"hf:{REPO}", threads=1)
    with pytest.raises(BundleCorrupt, match=r"hf:me/tiny: clusters/00\d.safetensors: expected sha256"):
        engine.generate(corpus_texts()[0], max_new_tokens=2)
    # The Hub is in order again: so is the engine.
    assert engine.generate(corpus_texts()[0], max_new_tokens=2).text is not None


def test_another_commit_brings_what_changed(hub: Hub, packs_only: Path, tiny_bundle: Callable[..., Path]) -> None:
    put(hub, packs_only)
    first = find_bundle(f"hf:{REPO}").folder
    commit = hub.commit(REPO)
    put(hub, tiny_bundle("llama", dense=False, quantize="int8"))
    second = find_bundle(f"hf:{REPO}").folder
    assert first != second
    assert first.name == commit
    assert read_manifest(second).quantization["ffn"].format == "int8"


@pytest.mark.parametrize("place", ["hf:me/none", f"hf:{REPO}@none"])
def test_what_is_not_there(place: str, hub: Hub, packs_only: Path) -> None:
    put(hub, packs_only)
    with pytest.raises(BundleNotFound, match=rf"{place}: no manifest.json there") as caught:
        runtime.load(place)
    assert "\n" not in str(caught.value)


def test_a_repository_that_holds_no_bundle(hub: Hub) -> None:
    hub.repos[REPO] = {"model.safetensors": b"weights"}
    with pytest.raises(BundleNotFound, match=f"hf:{REPO}: no manifest.json there"):
        runtime.load(f"hf:{REPO}")


@pytest.mark.parametrize("repo", ["me--you/tiny", "-me/tiny", "me/tiny.git", "me/ti..ny"])
def test_names_that_the_hub_does_not_have(repo: str, hub: Hub, bundle: Path) -> None:
    with pytest.raises(ConfigError, match=f"hf:{repo}: .*'{repo}'"):
        runtime.load(f"hf:{repo}")
    with pytest.raises(ConfigError, match=f"hf:{repo}: .*'{repo}'"):
        push_bundle(bundle, HubPlace(repo=repo), private=False)
    assert hub.repos == {}


def test_loading_from_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(BundleError, match=rf"hf:{REPO}: manifest.json cannot be fetched \(.*refused") as caught:
        runtime.load(f"hf:{REPO}")
    assert not isinstance(caught.value, BundleNotFound)


def test_an_older_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    # Releases of huggingface_hub before 2, which tokenizers takes too, come with httpx.
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigError, match=rf"hf:{REPO} needs the package httpx2; pip install 'coreinfer\[remote\]'"):
        runtime.load(f"hf:{REPO}")


# Pushing


def test_a_pushed_bundle_is_the_bundle(hub: Hub, bundle: Path) -> None:
    done = push_bundle(bundle, HubPlace(repo=REPO), private=False)
    manifest = read_manifest(bundle)
    files = hub.repos[REPO]
    assert {*files} == {LAYOUT.manifest, "README.md", *manifest.files}
    assert all(files[name] == (bundle / name).read_bytes() for name in manifest.files)
    assert done.commit == hub.commit(REPO)
    assert done.num_bytes == sum(record.bytes for record in manifest.files.values())
    card = files["README.md"].decode()
    assert f'runtime.load("hf:{REPO}")' in card
    assert manifest.clusters[0].label in card
    prompt = corpus_texts()[0]
    texts = [runtime.load(place, threads=1).generate(prompt, max_new_tokens=4).text for place in (bundle, f"hf:{REPO}")]
    assert texts[0] == texts[1]


def test_packs_of_an_earlier_push_are_deleted(hub: Hub, bundle: Path, tiny_bundle: Callable[..., Path]) -> None:
    push_bundle(bundle, HubPlace(repo=REPO), private=False)
    hub.repos[REPO]["notes.txt"] = b"of its owner"
    push_bundle(tiny_bundle("llama", clusters=1, dense=False), HubPlace(repo=REPO), private=False)
    files = hub.repos[REPO]
    assert [name for name in files if name.startswith(LAYOUT.clusters)] == [LAYOUT.cluster(0)]
    assert LAYOUT.dense not in files
    assert files["notes.txt"] == b"of its owner"
    assert len(hub.commits) == 2


def test_a_damaged_bundle_is_not_pushed(hub: Hub, make_bundle: Callable[..., Path]) -> None:
    bundle_dir = make_bundle()
    flip_bit(bundle_dir / LAYOUT.base)
    with pytest.raises(BundleCorrupt, match=r"base.safetensors: expected sha256"):
        push_bundle(bundle_dir, HubPlace(repo=REPO), private=False)
    assert hub.repos == {}


def test_a_hub_that_cannot_be_reached(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(BundleError, match=f"hf:{REPO}: cannot be pushed"):
        push_bundle(bundle, HubPlace(repo=REPO), private=False)


def test_the_command(hub: Hub, bundle: Path) -> None:
    done = CliRunner().invoke(push_main, [str(bundle), f"hf:{REPO}", "--message", "Hello"])
    assert done.exit_code == 0, done.output
    assert re.fullmatch(rf"pushed \d+ files, [\d.]+ MB, to hf:{REPO}, commit [0-9a-f]{{12}}\n", done.stdout)
    assert hub.commits == ["Hello"]
    wrong = CliRunner().invoke(push_main, [str(bundle), "me/tiny"])
    assert (wrong.exit_code, wrong.stderr) == (2, "error: me/tiny: expected hf:USER/NAME or hf:USER/NAME@REVISION\n")
