import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.bundles.errors import BundleCorrupt, BundleNotFound
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.tensors import StoredTensor, TensorFile

from .bundle_factory import (
    FFN_DIM,
    HIDDEN_SIZE,
    LAYER_BUDGETS,
    SMALL_FILES,
    as_version_2,
    change_tensors,
    edit_manifest,
    flip_bit,
    list_again,
)

PACKS = ["clusters/000.safetensors", "clusters/001.safetensors"]
TENSOR_FILES = ["base.safetensors", "dense.safetensors", "router/encoder/table.safetensors", *PACKS]
ALL_FILES = [*SMALL_FILES, *TENSOR_FILES]
OPT_LIKE = {"gated": False, "ffn_bias": True, "dense": False, "ffn_format": "f32"}


def corruption(bundle_dir: Path) -> str:
    """The one line with which a bundle is refused."""
    with pytest.raises(BundleCorrupt) as caught:
        open_bundle(bundle_dir)
    message = str(caught.value)
    assert message.startswith(f"bundle {bundle_dir}: ")
    assert message.endswith("; copy or compile it again")
    assert "\n" not in message
    return message.removeprefix(f"bundle {bundle_dir}: ").removesuffix("; copy or compile it again")


def shapes(file: TensorFile) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.array.shape) for name, tensor in file.items()}


def ffn_shapes(layer: int, width: int, dtype: str, roles: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of one layer, written out here rather than taken from the code that checks them."""
    every: dict[str, tuple[str, tuple[int, ...]]] = {
        "gate": (dtype, (width, HIDDEN_SIZE)),
        "up": (dtype, (width, HIDDEN_SIZE)),
        "down": (dtype, (HIDDEN_SIZE, width)),
        "up_bias": ("F32", (width,)),
        "down_bias": ("F32", (HIDDEN_SIZE,)),
        "neuron_ids": ("I32", (width,)),
        "scores": ("F32", (FFN_DIM,)),
        "column_norms": ("F32", (FFN_DIM,)),
    }
    return {f"layers.{layer}.{role}": every[role] for role in roles}


def test_a_gated_bundle_opens_with_every_part(bundle_dir: Path) -> None:
    bundle = open_bundle(bundle_dir)
    assert bundle.path == bundle_dir
    assert bundle.manifest == read_manifest(bundle_dir)
    assert set(bundle.base) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert bundle.dense is not None
    roles = ["gate", "up", "down"]
    dense = ffn_shapes(0, FFN_DIM, "BF16", [*roles, "column_norms"])
    assert shapes(bundle.dense) == dense | ffn_shapes(1, FFN_DIM, "BF16", [*roles, "column_norms"])
    assert len(bundle.packs) == 2
    for pack in bundle.packs:
        narrow = ffn_shapes(0, LAYER_BUDGETS[0], "BF16", [*roles, "neuron_ids", "scores"])
        assert shapes(pack) == narrow | ffn_shapes(1, LAYER_BUDGETS[1], "BF16", [*roles, "neuron_ids", "scores"])
    assert not np.array_equal(bundle.packs[0]["layers.0.up"].array, bundle.packs[1]["layers.0.up"].array)


@pytest.mark.parametrize("bundle_dir", [OPT_LIKE], indirect=True)
def test_an_ungated_bundle_with_biases_and_no_dense_ffn_opens(bundle_dir: Path) -> None:
    bundle = open_bundle(bundle_dir)
    assert bundle.dense is None
    roles = ["up", "down", "up_bias", "down_bias", "neuron_ids", "scores"]
    narrow = ffn_shapes(0, LAYER_BUDGETS[0], "F32", roles) | ffn_shapes(1, LAYER_BUDGETS[1], "F32", roles)
    assert [shapes(pack) for pack in bundle.packs] == [narrow, narrow]


def test_small_files_are_read_by_name(bundle_dir: Path) -> None:
    bundle: Bundle = open_bundle(str(bundle_dir))
    for name, content in SMALL_FILES.items():
        assert bundle.has(name)
        assert bundle.read_bytes(name) == content
    assert not bundle.has("manifest.json")


def test_the_optional_files_are_optional(bundle_dir: Path) -> None:
    for name in ("report.html", "tokenizer/chat_template.jinja", "dense.safetensors"):
        (bundle_dir / name).unlink()
    list_again(bundle_dir)
    with edit_manifest(bundle_dir) as data:
        data["plan"]["dense"] = False
    bundle = open_bundle(bundle_dir)
    assert bundle.dense is None
    assert not bundle.has("tokenizer/chat_template.jinja")


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (remove, "missing"),
    (empty, "bytes, got 0"),
    (truncate, "bytes, got"),
    (grow, "bytes, got"),
    (flip_bit, "expected sha256"),
    (make_folder, "is no file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_damaged_file_is_named(bundle_dir: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    assert name in read_manifest(bundle_dir).files
    damage(bundle_dir / name)
    problem = corruption(bundle_dir)
    assert problem.startswith(f"{name}: ")
    assert message in problem
    assert "(2)" not in problem


def test_every_file_of_a_bundle_is_covered_above(bundle_dir: Path) -> None:
    assert set(read_manifest(bundle_dir).files) == set(ALL_FILES)


@pytest.mark.parametrize("position", [0, -1])
def test_one_bit_at_either_end_is_found(bundle_dir: Path, position: int) -> None:
    path = bundle_dir / PACKS[0]
    flip_bit(path, position % path.stat().st_size)
    assert corruption(bundle_dir).startswith(f"{PACKS[0]}: expected sha256")


def test_all_damaged_files_are_named_in_one_error(bundle_dir: Path) -> None:
    flip_bit(bundle_dir / PACKS[1])
    (bundle_dir / "tokenizer/tokenizer.json").unlink()
    truncate(bundle_dir / "base.safetensors")
    problem = corruption(bundle_dir)
    assert problem.startswith("3 problems: (1) ")
    for name in (PACKS[1], "tokenizer/tokenizer.json", "base.safetensors"):
        assert problem.count(f"{name}: ") == 1


def test_damage_and_misfit_are_named_together(bundle_dir: Path) -> None:
    change_tensors(bundle_dir, PACKS[0], lambda tensors: tensors.pop("layers.1.scores"))
    flip_bit(bundle_dir / PACKS[1])
    problem = corruption(bundle_dir)
    assert f"{PACKS[0]}: tensor 'layers.1.scores' is missing" in problem
    assert f"{PACKS[1]}: expected sha256" in problem


def test_a_file_with_a_colon_in_its_name_is_reported_once(bundle_dir: Path) -> None:
    name = "clusters/a:b.safetensors"
    (bundle_dir / PACKS[0]).rename(bundle_dir / name)
    list_again(bundle_dir)
    with edit_manifest(bundle_dir) as data:
        data["clusters"][0]["file"] = name
    open_bundle(bundle_dir)
    (bundle_dir / name).unlink()
    assert corruption(bundle_dir) == f"{name}: missing"


def test_without_checksums_sizes_and_shapes_are_still_checked(bundle_dir: Path) -> None:
    manifest = read_manifest(bundle_dir)
    flip_bit(bundle_dir / "report.html")
    assert find_problems(bundle_dir, manifest, checksums=False) == []
    open_bundle(bundle_dir, checksums=False)
    truncate(bundle_dir / "report.html")
    change_tensors(bundle_dir, PACKS[0], lambda tensors: tensors.pop("layers.0.up"), listed=False)
    with edit_manifest(bundle_dir) as data:
        data["files"][PACKS[0]]["bytes"] = (bundle_dir / PACKS[0]).stat().st_size
    with pytest.raises(BundleCorrupt) as caught:
        open_bundle(bundle_dir, checksums=False)
    assert "report.html: expected" in str(caught.value)
    assert f"{PACKS[0]}: tensor 'layers.0.up' is missing" in str(caught.value)


OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "C:\\x", "C:x", "a\\..\\..\\x", "..", "", "a\0b", "a\nb", "\ud800"]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
@pytest.mark.parametrize("place", ["files", "clusters"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle_dir: Path, name: str, place: str) -> None:
    (bundle_dir.parent / "x").write_bytes(b"secret")
    with edit_manifest(bundle_dir) as data:
        if place == "files":
            data["files"][name] = {"sha256": "00" * 32, "bytes": 6}
        else:
            data["clusters"][0]["file"] = name
    assert corruption(bundle_dir) == f"manifest names {name!r}, which is no path inside the bundle"


REQUIRED = [name for name in ALL_FILES if name not in ("report.html", "tokenizer/chat_template.jinja")]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_part_that_the_manifest_does_not_list_is_named(bundle_dir: Path, name: str) -> None:
    """Among them: the plan promises a dense FFN, and there is none."""
    (bundle_dir / name).unlink()
    list_again(bundle_dir)
    assert corruption(bundle_dir) == f"manifest lists no {name}"


def test_a_bundle_of_version_2_opens(bundle_dir: Path) -> None:
    expected = open_bundle(bundle_dir).manifest
    with edit_manifest(bundle_dir) as data:
        as_version_2(data)
    assert open_bundle(bundle_dir).manifest == expected


def test_a_cluster_needs_a_budget_for_each_layer(bundle_dir: Path) -> None:
    with edit_manifest(bundle_dir) as data:
        data["clusters"][1]["layer_budgets"].pop()
    assert corruption(bundle_dir) == "manifest.clusters[1].layer_budgets: expected 2 layers, got 1"


def test_each_pack_has_its_cluster_s_budgets(bundle_dir: Path) -> None:
    with edit_manifest(bundle_dir) as data:
        data["clusters"][1]["layer_budgets"] = [64, 50]
    problem = corruption(bundle_dir)
    assert f"{PACKS[1]}: tensor 'layers.0.neuron_ids': expected I32 [64], got I32 [96]" in problem
    assert PACKS[0] not in problem


def test_a_bundle_needs_a_cluster_and_a_budget_for_each_layer(bundle_dir: Path) -> None:
    with edit_manifest(bundle_dir) as data:
        data["clusters"] = []
        data["plan"]["layer_budgets"].append(10)
    problem = corruption(bundle_dir)
    assert "manifest lists no clusters" in problem
    assert "manifest.plan.layer_budgets: expected 2 layers, got 3" in problem


def replaced(name: str, tensor: StoredTensor) -> Callable[[dict[str, StoredTensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def zeros(dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(dtype, np.zeros(shape, np.uint16 if dtype == "BF16" else np.float32))


@pytest.mark.parametrize(
    ("file", "tensor", "value", "message"),
    [
        (PACKS[0], "layers.1.up", zeros("BF16", 49, HIDDEN_SIZE), "expected BF16 [50, 64], got BF16 [49, 64]"),
        (PACKS[1], "layers.0.gate", zeros("F32", 96, HIDDEN_SIZE), "expected BF16 [96, 64], got F32 [96, 64]"),
        (PACKS[1], "layers.0.down", zeros("BF16", 96, HIDDEN_SIZE), "expected BF16 [64, 96], got BF16 [96, 64]"),
        ("dense.safetensors", "layers.0.up", zeros("BF16", 64, 64), "expected BF16 [128, 64], got BF16 [64, 64]"),
        ("base.safetensors", "model.norm.weight", zeros("F32", 64, 1), "expected F32 [64], got F32 [64, 1]"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_named(
    bundle_dir: Path, file: str, tensor: str, value: StoredTensor, message: str
) -> None:
    change_tensors(bundle_dir, file, replaced(tensor, value))
    assert corruption(bundle_dir) == f"{file}: tensor {tensor!r}: {message}"


@pytest.mark.parametrize("file", ["base.safetensors", "dense.safetensors", *PACKS])
def test_missing_and_unknown_tensors_are_both_named(bundle_dir: Path, file: str) -> None:
    gone = next(iter(TensorFile(bundle_dir / file)))

    def rename(tensors: dict[str, StoredTensor]) -> None:
        tensors["stranger"] = tensors.pop(gone)

    change_tensors(bundle_dir, file, rename)
    problem = corruption(bundle_dir)
    assert f"(1) {file}: tensor {gone!r} is missing" in problem
    assert f"(2) {file}: tensor 'stranger' is unknown" in problem


def test_a_tensor_file_with_a_sound_checksum_that_is_no_tensor_file(bundle_dir: Path) -> None:
    (bundle_dir / PACKS[0]).write_bytes(b"x" * 100)
    list_again(bundle_dir)
    assert PACKS[0] in corruption(bundle_dir)


def bad_ids(*, position: int, value: int) -> Callable[[dict[str, StoredTensor]], object]:
    def change(tensors: dict[str, StoredTensor]) -> None:
        ids = np.arange(LAYER_BUDGETS[1], dtype=np.int32)
        ids[position] = value
        tensors["layers.1.neuron_ids"] = StoredTensor("I32", ids)

    return change


@pytest.mark.parametrize(
    ("position", "value"),
    [(-1, FFN_DIM), (0, -1), (10, 9), (10, 8), (-1, 0), (-1, 2**31 - 1), (0, -(2**31))],
    ids=["too large", "negative", "twice", "descending", "last is first", "largest", "smallest"],
)
def test_neuron_ids_that_are_no_ascending_ids_are_named(bundle_dir: Path, position: int, value: int) -> None:
    change_tensors(bundle_dir, PACKS[1], bad_ids(position=position, value=value))
    assert corruption(bundle_dir) == f"{PACKS[1]}: layers.1.neuron_ids: expected ascending ids below {FFN_DIM}"


def test_neuron_ids_whose_steps_overflow_are_named(bundle_dir: Path) -> None:
    """Forged: every difference is positive in 32 bits, and only ids in the middle lie outside."""
    ids = np.array([0, 2**30, -(2**31), -(2**30), *range(1, 47)], np.int32)
    assert (np.diff(ids) > 0).all()
    change_tensors(bundle_dir, PACKS[0], replaced("layers.1.neuron_ids", StoredTensor("I32", ids)))
    assert corruption(bundle_dir) == f"{PACKS[0]}: layers.1.neuron_ids: expected ascending ids below {FFN_DIM}"


def test_the_last_neuron_id_may_be_kept(bundle_dir: Path) -> None:
    change_tensors(bundle_dir, PACKS[1], bad_ids(position=-1, value=FFN_DIM - 1))
    open_bundle(bundle_dir)


def test_no_bundle_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, reason in [("absent", "does not exist"), ("file", "is a file"), ("empty", "has no manifest.json")]:
        with pytest.raises(BundleNotFound, match=reason) as caught:
            open_bundle(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_bundle_may_be_moved_and_reached_by_a_link(bundle_dir: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(bundle_dir, tmp_path / "elsewhere"))
    (tmp_path / "link").symlink_to(moved)
    assert open_bundle(tmp_path / "link").manifest == open_bundle(moved).manifest


def test_two_bundles_side_by_side(make_bundle: Callable[..., Path]) -> None:
    first, second = (open_bundle(make_bundle(f"bundle-{seed}", seed=seed)) for seed in (0, 1))
    assert first.manifest.files["base.safetensors"] != second.manifest.files["base.safetensors"]
    assert first.manifest.files["report.html"] == second.manifest.files["report.html"]


# Packs that are checked when they are first used


@pytest.mark.parametrize("kind", ["int4", "int8", "int8-planes"])
def test_packed_parts_of_another_shape_are_named(kind: str, make_bundle: Callable[..., Path]) -> None:
    bundle_dir = make_bundle(ffn_format=kind)

    def cut(tensors: dict[str, StoredTensor]) -> None:
        scales = tensors["layers.1.down.scale"].array
        tensors["layers.1.down.scale"] = StoredTensor("F16", scales[:, 1:].copy())

    change_tensors(bundle_dir, PACKS[0], cut)
    expected = "expected F16 [4, 2, 16], got F16 [4, 1, 16]"
    assert corruption(bundle_dir) == f"{PACKS[0]}: tensor 'layers.1.down.scale': {expected}"
