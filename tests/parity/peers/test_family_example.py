"""The family of docs/examples, in a file outside the package, whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from published import check, perturbed
from transformers import HeliumConfig, HeliumForCausalLM

from zoo.core.imports import import_source
from zoo.models.published.family import families

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "helium.py"


@pytest.fixture(scope="module")
def helium():  # a file is imported once
    import_source(str(EXAMPLE), "here")
    yield
    families.registry._classes.pop("helium")


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "mlp_bias": True, "num_key_value_heads": 2}])
def test_helium(options, tmp_path, helium):
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 6, "head_dim": 6, "vocab_size": 61}
    check(perturbed(HeliumForCausalLM(HeliumConfig(**{**sizes, **options}))), tmp_path)
