"""`--packs auto`: each cluster has what reads the fewest bytes at a quality; bundles may mix both kinds of clusters."""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.inspect import describe, unlisted_files
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import Manifest, PackChoice, TriedWeights, read_manifest
from coreinfer.bundles.pack_choices import choice_in_words
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.bundles.token_shares import mean_ffn_bytes
from coreinfer.bundles.versions import THIN_VERSION
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.cli import summary
from coreinfer.compiler.estimate.machine import Machine
from coreinfer.compiler.estimate.plan import make_plan
from coreinfer.compiler.export.chosen import choose_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.shares import choice as choosing
from coreinfer.compiler.shares import search
from coreinfer.compiler.shares.choice import units_of
from coreinfer.compiler.shares.search import POOL
from coreinfer.compiler.shares.token_reads import ReadSizes
from coreinfer.evaluation.subjects import BundleSubject
from coreinfer.runtime.commands.bench import BenchOptions, bench
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from safetensors.torch import load_file, save_file

from .c_library import CModel, has_compilers
from .engine_inputs import PROMPT

PROMPT_IDS, NEXT_IDS = [1, 57, 200, 300, 21, 99, 140, 7], [9, 8, 77, 301]
LIMIT = 2e-3


@pytest.fixture(scope="module")
def auto_inputs(tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory) -> CompileConfig:
    """Options of a compile that chooses; what compiles have in common comes from a cache."""
    cache = tmp_path_factory.mktemp("auto-cache")
    given = replace(tiny_inputs("llama"), keep=None, packs="auto", effort="quick", max_kl=LIMIT)
    return replace(given, cache_dir=cache, clusters=2)


@pytest.fixture(scope="module")
def idle_inputs(auto_inputs: CompileConfig, tmp_path_factory: pytest.TempPathFactory) -> CompileConfig:
    """The same for a model of which a third of the neurons do nothing: narrow FFNs lose nothing, and read less."""
    folder = Path(shutil.copytree(auto_inputs.model, tmp_path_factory.mktemp("idle") / "model"))
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for name in (name for name in weights if name.endswith("down_proj.weight")):
        weights[name][:, 64:] = 0
    save_file(weights, file, metadata={"format": "pt"})
    return replace(auto_inputs, model=str(folder))


@pytest.fixture(scope="module")
def mixed_bundle(idle_inputs: CompileConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose cluster 1 is thin, as its pack was said to read more than it does."""
    output, count = tmp_path_factory.mktemp("mixed") / "bundle", ReadSizes._cluster_bytes

    def dear(self: ReadSizes, packs: Any, cluster: int, measured: Any) -> float:
        return count(self, packs, cluster, measured) * (1 if packs is None or cluster != 1 else 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LEAST_TOKENS", 8)
        patch.setattr(ReadSizes, "_cluster_bytes", dear)
        # Without a cache, in which the bundle of an honest count may be.
        compile_model(replace(idle_inputs, output=output, cache_dir=None))
    return output


def hashes(folder: Path) -> dict[str, str]:
    """Of a bundle's files, but for the manifest and the report, which say what was asked for."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return {name: digest for name, digest in found.items() if name not in (LAYOUT.manifest, LAYOUT.report)}


def shares_of(manifest: Manifest) -> Any:
    """The record of token shares, without how it was chosen."""
    assert manifest.token_shares is not None
    return replace(manifest.token_shares, choices=())


def choices_of(manifest: Manifest) -> tuple[PackChoice, ...]:
    """How it was chosen."""
    assert manifest.token_shares is not None
    return manifest.token_shares.choices


def test_where_narrow_ffns_read_no_less_all_is_thin(
    auto_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LEAST_TOKENS", 8)
    auto, thin = (tmp_path / name for name in ("auto", "thin"))
    compile_model(replace(auto_inputs, output=auto))
    compile_model(replace(auto_inputs, output=thin, packs="thin", budgets=None, token_share="auto"))
    assert hashes(auto) == hashes(thin)
    got, expected = read_manifest(auto), read_manifest(thin)
    assert (got.clusters, got.plan, got.quality) == (expected.clusters, expected.plan, expected.quality)
    assert (got.schema_version, shares_of(got)) == (expected.schema_version, shares_of(expected))
    assert [choice.is_thin for choice in choices_of(got)] == [True, True]
    # 0.9 of three blocks of neurons are all of them, and less loses too much.
    assert [choice.tried_keeps for choice in choices_of(got)] == [(0.9, 0.8)] * 2
    assert not choices_of(expected)


def test_where_they_read_less_all_have_packs(
    idle_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LEAST_TOKENS", 8)
    auto, own = (tmp_path / name for name in ("auto", "own"))
    compile_model(replace(idle_inputs, output=auto))
    got = read_manifest(auto)
    choices = choices_of(got)
    assert len(choices) == 2
    for choice in choices:
        assert choice.own is not None
        assert not choice.is_thin
        assert choice.own.token_bytes < choice.thin.token_bytes
        assert max(choice.own.kl, choice.thin.kl) <= LIMIT
        assert choice.own.share == shares_of(got).clusters[choice.cluster]
    (keep,) = {choice.own.keep for choice in choices if choice.own is not None}
    compile_model(replace(idle_inputs, output=own, packs="own", keep=keep, controls=False))
    assert hashes(auto) == hashes(own)
    expected = read_manifest(own)
    assert (got.clusters, got.plan, got.quality) == (expected.clusters, expected.plan, expected.quality)
    assert (got.schema_version, shares_of(got)) == (expected.schema_version, shares_of(expected))


def test_packs_that_do_not_hold_in_the_end_are_left_out(
    idle_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pack depends a little on what the others keep: it is measured again, and not stored where it fails then."""
    monkeypatch.setattr(search, "LEAST_TOKENS", 8)
    tried, holding, best = [False], choosing._holding, choosing._best_of_own

    def best_of_own(*given: Any) -> Any:
        found = best(*given)
        tried[0] = True
        return found

    def lose(*given: Any) -> list[str]:
        return [name for name in holding(*given) if not (tried[0] and name == "cluster 1")]

    monkeypatch.setattr(choosing, "_best_of_own", best_of_own)
    monkeypatch.setattr(choosing, "_holding", lose)
    compile_model(replace(idle_inputs, output=tmp_path / "b", cache_dir=None))
    manifest = read_manifest(tmp_path / "b")
    assert find_problems(tmp_path / "b", manifest) == []
    assert unlisted_files(tmp_path / "b", manifest) == []
    assert [cluster.file is None for cluster in manifest.clusters] == [False, True]
    own, thin = choices_of(manifest)
    assert own.own is not None
    assert thin.own is None
    assert shares_of(manifest).clusters == (own.own.share, thin.thin.share)
    assert "cluster 1: of its own weights, as stored, it reads no less at this quality; it is thin" in caplog.text


def test_bytes_are_those_of_the_manifest(mixed_bundle: Path) -> None:
    """What was counted of a cluster on held-out text is near to what its share and its file's sizes say."""
    manifest = read_manifest(mixed_bundle)
    counts, record = token_bytes(manifest), manifest.token_shares
    assert record is not None
    for number, cluster in enumerate(manifest.clusters):
        choice, share = record.choices[number], record.clusters[number]
        tried = choice.thin if choice.is_thin else choice.own
        assert tried is not None
        planned = share * cluster.ffn_bytes + counts.attention_at(share) + counts.head + counts.other
        assert tried.token_bytes == pytest.approx(planned, rel=0.03)


def test_a_bundle_mixes_thin_clusters_and_packs(mixed_bundle: Path) -> None:
    bundle = open_bundle(mixed_bundle)
    manifest = bundle.manifest
    assert find_problems(mixed_bundle, manifest) == []
    assert manifest.schema_version == THIN_VERSION
    assert [cluster.file is None for cluster in manifest.clusters] == [False, True]
    assert manifest.has_thin
    assert [path.name for path in (mixed_bundle / LAYOUT.clusters).iterdir()] == ["000.safetensors"]
    assert manifest.clusters[0].ffn_bytes < manifest.clusters[1].ffn_bytes == manifest.ffn_bytes
    record, quality = manifest.token_shares, manifest.quality
    assert record is not None
    assert quality is not None
    assert [(found.weights, found.shares) for found in record.scores] == [
        *(("dense", kind) for kind in ("planned", "equal")),
        *(("clusters", kind) for kind in ("planned", "equal")),
    ]
    # At the shares that clusters decode with, as of thin ones.
    assert quality.clusters.kl == record.scores[2].score.kl
    assert all(entry.score.kl <= LIMIT for entry in quality.per_cluster)
    expected = [share * cluster.ffn_bytes for share, cluster in zip(record.clusters, manifest.clusters, strict=True)]
    assert min(expected) < mean_ffn_bytes(manifest) < max(expected)


def test_what_was_chosen_and_why_is_shown(mixed_bundle: Path) -> None:
    manifest = read_manifest(mixed_bundle)
    own, thin = (choice_in_words(choice) for choice in choices_of(manifest))
    assert re.fullmatch(r"own weights, keep 0\.\d+, .* a token, share .*, KL .*, less than thin .*", own)
    assert re.fullmatch(r"thin .*, no more than own weights, keep 0\.9, .*", thin)
    lines, said = [*describe(manifest)], [*summary(mixed_bundle, manifest, Progress())]
    report = (mixed_bundle / LAYOUT.report).read_text(encoding="utf-8")
    for words in (own, thin):
        assert any(words in line for line in lines)
        assert any(words in line for line in said)
        assert words in report
    assert any("1 of 2 clusters are thin" in line for line in lines)
    assert any("with a pack or by a thin cluster" in line for line in lines)
    assert any("with which 1 of 2 clusters decode" in line for line in said)
    assert "some clusters thin" in report
    assert "Layer budgets" in report


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_both_kinds_decode(engine: Any, mixed_bundle: Path) -> None:
    bundle = open_bundle(mixed_bundle)
    decoder: Any = (
        TorchDecoder(bundle, device="cpu", dtype="float32") if engine == "torch" else NativeDecoder(bundle, threads=1)
    )

    def decoded(choice: FfnChoice) -> list[Any]:
        decoder.truncate(0)
        decoder.use(DENSE)
        decoder.forward(PROMPT_IDS)
        decoder.use(choice)
        return [np.array(decoder.forward([token_id])) for token_id in NEXT_IDS]

    pack, thin, dense = (decoded(choice) for choice in (FfnChoice(cluster=0), FfnChoice(cluster=1), DENSE))
    np.testing.assert_array_equal(thin, dense)
    # Neurons that do nothing are all that the pack lacks, but for the rounding of its repair.
    np.testing.assert_allclose(pack, dense, atol=0.2)
    if engine == "native":
        decoder.use(FfnChoice(cluster=0))
        narrow = decoder.bytes_per_token(0)
        decoder.use(FfnChoice(cluster=1))
        assert decoder.bytes_per_token(0) - narrow == bundle.manifest.ffn_bytes - bundle.manifest.clusters[0].ffn_bytes


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_generations_of_both_kinds(engine: Any, mixed_bundle: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"} if engine == "torch" else {"threads": 1}
    loaded = runtime.load(mixed_bundle, engine=engine, **options)
    prompts = [example for cluster in loaded.manifest.clusters for example in cluster.examples]
    got = loaded.generate(prompts, raw=True, max_new_tokens=4, mode="similarity")
    assert {answer.cluster for answer in got} == {0, 1}
    if engine == "torch":
        assert [answer.token_share for answer in got] == [
            shares_of(loaded.manifest).clusters[answer.cluster] for answer in got
        ]
    alone = [loaded.generate(prompt, raw=True, max_new_tokens=4, mode="similarity") for prompt in prompts]
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in got]
    lossless = loaded.generate(prompts[0], raw=True, max_new_tokens=4, mode="lossless", token_share=1)
    dense = loaded.generate(prompts[0], raw=True, max_new_tokens=4, mode="dense", token_share=1)
    assert lossless.token_ids == dense.token_ids


def test_under_a_limit_of_memory_both_kinds_decode(mixed_bundle: Path) -> None:
    limited, free = (
        runtime.load(mixed_bundle, engine="native", threads=1, memory_mb=memory_mb) for memory_mb in (40, None)
    )
    for cluster in limited.manifest.clusters:
        texts = [
            engine.generate(cluster.examples[0], raw=True, max_new_tokens=4, mode="similarity", token_share=share)
            for engine, share in ((limited, None), (free, 1))
        ]
        assert texts[0].token_ids == texts[1].token_ids


@pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")
def test_in_c_both_kinds_decode(mixed_bundle: Path, open_in_c: Callable[..., CModel]) -> None:
    decoder, model = NativeDecoder(open_bundle(mixed_bundle), threads=2), open_in_c(mixed_bundle, num_threads=2)
    for cluster, choice in ((0, FfnChoice(cluster=0)), (1, DENSE)):
        decoder.truncate(0)
        decoder.use(choice)
        model.use(cluster)
        model.truncate(0)
        np.testing.assert_array_equal(model.feed(PROMPT_IDS), decoder.forward(PROMPT_IDS)[0])


def test_what_needs_packs_of_all_is_refused(mixed_bundle: Path) -> None:
    engine = runtime.load(mixed_bundle, engine="torch", device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="mode 'fused' chooses as many neurons as packs have, and some clusters"):
        engine.generate(PROMPT, raw=True, mode="fused")
    with pytest.raises(ConfigError, match="of which some clusters are thin and have no packs"):
        engine.generate(PROMPT, raw=True, mode="similarity", prompt_ffn="pack")
    with pytest.raises(ConfigError, match="--cluster 1: it is thin"):
        choose_model(mixed_bundle, cluster=1, dense=False)
    choose_model(mixed_bundle, cluster=0, dense=False)


def test_tools_read_mixed_bundles(mixed_bundle: Path) -> None:
    runs = bench(mixed_bundle, BenchOptions(threads=1, num_tokens=4, num_prompt_tokens=8, num_rounds=1)).runs
    assert [run.ffn for run in runs] == ["dense", "pack"]
    assert runs[1].bytes_per_token < runs[0].bytes_per_token
    subject = BundleSubject(mixed_bundle, modes=("dense", "similarity", "random"), engine="torch", dtype="float32")
    record = shares_of(read_manifest(mixed_bundle))
    assert subject.modes == ("dense", "similarity", f"dense, share {record.default:g}", "similarity, own shares")


def test_options_that_decide_the_same_are_refused(auto_inputs: CompileConfig, tmp_path: Path) -> None:
    assert auto_inputs.token_share == "auto"
    for options, named in (
        ({"token_share": 0.5}, "--token-share 0.5: expected auto with --packs auto"),
        ({"keep": 0.5}, "--keep: --packs auto chooses each cluster's keep ratio"),
        ({"budget_mb": 60.0}, "--budget-mb: --packs auto chooses by a quality"),
        ({"clusters": "auto"}, "--clusters auto: it compares packs of all clusters"),
        ({"dense": False}, "--no-dense: thin clusters, which --packs auto may choose"),
        ({"controls": True}, "--controls: they have the bytes of packs"),
        ({"experts": "narrow"}, "--experts narrow: --packs auto does not choose for mixtures"),
        ({"effort": "best"}, "--packs auto: packs that are healed are not compared yet"),
        ({"max_memory": 4.0}, "--token-share: gradients go through all of its weights"),
        ({"quantize": "int4", "by_neuron": True}, "--token-share: expected a FFN that is not stored neuron by neuron"),
        ({"budgets": "energy", "min_layer_keep": 0.6}, "--min-layer-keep 0.6: expected at most 0.5"),
    ):
        with pytest.raises(ConfigError, match=re.escape(named)):
            replace(auto_inputs, **options)
    with pytest.raises(ConfigError, match="rounding to int4 alone costs KL"):
        compile_model(replace(auto_inputs, output=tmp_path / "b", quantize="int4", max_kl=1e-7))


def test_mixtures_are_refused(
    tiny_inputs: Callable[[str], CompileConfig], auto_inputs: CompileConfig, tmp_path: Path
) -> None:
    config = replace(auto_inputs, model=tiny_inputs("qwen3_moe").model, output=tmp_path / "b")
    with pytest.raises(ConfigError, match="--packs auto: a token reads as many whole experts with a pack as without"):
        compile_model(config)


def test_clusters_with_little_text_are_chosen_for_together() -> None:
    assert units_of({"cluster 0": (0,), POOL: (1, 2)}, 4) == {"cluster 0": (0,), POOL: (1, 2, 3)}
    # What stands for them is other clusters' text: it says nothing of their packs.
    assert units_of({"cluster 0": (0,), POOL: (0, 1, 2)}, 3) == {"cluster 0": (0,)}
    assert units_of({POOL: (0, 2)}, 3) == {POOL: (0, 1, 2)}
    assert units_of({"cluster 0": (0,), "cluster 1": (1,)}, 2) == {"cluster 0": (0,), "cluster 1": (1,)}


def test_words_say_what_own_weights_lacked() -> None:
    thin = TriedWeights(keep=1, share=0.6, kl=0.09, top1=0.8, token_bytes=65_000_000)
    choice = PackChoice(cluster=3, judged_by=POOL, is_thin=True, thin=thin, own=None, tried_keeps=(0.9,))
    assert "own weights lose more than asked for (keep 0.9) (judged with clusters" in choice_in_words(choice)
    assert "too little held-out text" in choice_in_words(replace(choice, tried_keeps=()))


def test_the_tries_are_planned(auto_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LEAST_TOKENS", 8)
    config = replace(auto_inputs, output=tmp_path / "b", budgets="energy", cache_dir=None)
    machine = Machine(num_threads=2, float32_gflops=100.0, bfloat16_gflops=200.0, read_gbps=10.0)
    plan = make_plan(config, find_inputs(config), lambda: machine)
    names = [stage.name for stage in plan.stages]
    # Thin clusters, three keep ratios, and what was chosen.
    assert names.count("shares") == 5
    assert names.count("reconstruct") == 4
    assert plan.keep == pytest.approx(0.9, abs=0.01)
    assert plan.token_share is not None
    progress = Progress()
    compile_model(config, progress)
    assert {*progress.stage_seconds} <= {*names}
    one = replace(config, packs="own", keep=0.9, controls=False, output=tmp_path / "c")
    own = make_plan(one, find_inputs(one), lambda: machine)
    assert plan.seconds > own.seconds
