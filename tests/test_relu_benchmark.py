"""benchmarks/relu.py on a tiny shape: what is active is what was asked for, and a pack computes what the model does."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from coreinfer.bundles import open_bundle

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "hidden_size": 512,
    "ffn_dim": 320,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 96,
}


@pytest.fixture
def relu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("relu")
    shapes = {"1b": importlib.import_module("contenders.relu_bundle").ReluShape(name="1b", **TINY)}
    monkeypatch.setattr(module, "SHAPES", shapes)
    return module


def run(relu: Any, folder: Path, *options: object) -> tuple[list[str], Any]:
    common = ["--work", folder, "--threads", 1, "--rounds", 1, "--tokens", 4, "--shares", "0.1,0.2,0.5"]
    result = CliRunner().invoke(relu.main, [str(one) for one in (*common, *options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    return lines, json.loads(lines[-1])


def test_packs_hold_what_is_active(relu: Any, tmp_path: Path) -> None:
    lines, found = run(relu, tmp_path)
    assert found["read_gbps"] > 0
    dense, *others = found["rows"]
    packs, by_neuron = others[:3], others[3:]
    assert [row["share"] for row in packs] == [0.1, 0.2, 0.5]
    for row in packs:
        assert row["active"] == pytest.approx(row["share"], abs=0.001)
        assert row["covered"] == 1
        # Down projections are rounded again, in groups of other neighbours.
        assert row["logits_off"] < 0.01
        assert 0 < row["bytes_per_token"] < dense["bytes_per_token"]
        assert row["decode_tok_s"] > 0
    for row, pack in zip(by_neuron, packs, strict=True):
        assert (row["share"], row["active"], row["covered"]) == (pack["share"], pack["active"], 1)
        # What is left out is zero; prompts' inputs may be rounded otherwise than single tokens'.
        assert row["logits_off"] < 2e-3
        assert pack["bytes_per_token"] < row["bytes_per_token"] < dense["bytes_per_token"]
        assert row["times_dense"] > 0
    assert by_neuron[0]["bytes_per_token"] < by_neuron[2]["bytes_per_token"]
    assert [row["share"] for row in found["cited"]["rows"]] == [None, 0.1, 0.2, 0.3]
    # The cited figure stands where the share is the same, and nowhere else.
    assert ["x" if " | " in line else "" for line in lines[2:6]] == ["x", "x", "x", ""]
    assert packs[0]["times_cited_at_equal_read"] > 0
    assert not any("times_cited_at_equal_read" in row for row in (packs[2], *by_neuron))


def test_other_shapes_have_no_cited_figures(relu: Any, tmp_path: Path) -> None:
    found = run(relu, tmp_path, "--layers", 1)[1]
    assert found["cited"]["rows"] == []
    bundle = open_bundle(min(tmp_path.iterdir()))
    assert bundle.manifest.model.num_layers == 1
    assert bundle.manifest.clusters[1].layer_budgets == (64,)


def test_a_pack_of_another_kind_lacks_neurons(relu: Any, tmp_path: Path) -> None:
    """The check can fail: text of the widest kind with the narrowest pack."""
    run(relu, tmp_path)
    bundle = open_bundle(min(tmp_path.iterdir()))
    decoder = relu.NativeDecoder(bundle, threads=1)
    ids = relu.kind_ids(bundle, 2, 16)
    active = decoder.prompt_statistics(ids, ["output-aware"])[1]["output-aware"] > 0
    assert active.mean() == pytest.approx(0.5, abs=0.01)
    assert active[0, bundle.pack(0)["layers.0.neuron_ids"].array].all()
    assert active[0].sum() > len(bundle.pack(0)["layers.0.neuron_ids"].array)
