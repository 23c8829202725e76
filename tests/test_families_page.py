"""docs/families.md says what the tables in the code say."""

from pathlib import Path

import pytest
from coreinfer.bundles.errors import UnsupportedModelError
from coreinfer.bundles.families import FAMILIES, family_of_config
from coreinfer.compiler.export.gguf_header import ARCHITECTURES as WRITTEN
from coreinfer.compiler.models.gguf.config import ARCHITECTURES as READ

from . import model_factory

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("\n\n- ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| family")
]
# Families of which files have another architecture's name.
NAMED_IN_GGUF = {
    "ministral": "llama",
    "olmo3": "olmo2",
    "gpt_neox": "gptneox",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
}


def test_each_family_has_its_row() -> None:
    assert [(row[0], row[1]) for row in ROWS] == [(family.name, ", ".join(family.model_types)) for family in FAMILIES]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_is_read_and_written_as_gguf(row: list[str]) -> None:
    name, from_gguf, to_gguf = row[0], row[3], row[4]
    assert (from_gguf != "no") == (NAMED_IN_GGUF.get(name, name) in READ)
    assert (to_gguf != "no") == (name in WRITTEN)


def test_each_model_type_is_built_by_the_tests() -> None:
    built = {
        model_factory.tiny_config(family).model_type for family in (*model_factory.FAMILIES, *model_factory.MIXTURES)
    }
    assert built == {model_type for family in FAMILIES for model_type in family.model_types}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        *((model_type, "a mixture of experts") for model_type in ("qwen2_moe", "granitemoeshared", "deepseek_v3")),
        *((model_type, "not a transformer FFN everywhere") for model_type in ("falcon_h1", "lfm2", "granitemoehybrid")),
        ("paligemma", "reads more than text"),
        ("bloom", "supported families: opt"),
    ],
)
def test_what_is_not_here_is_refused_by_name(model_type: str, reason: str) -> None:
    assert model_type in PAGE
    with pytest.raises(UnsupportedModelError, match=f"model tiny: model_type '{model_type}'.*{reason}"):
        family_of_config({"model_type": model_type}, "tiny")
