"""The table of key layouts says what the installed transformers says, for every family."""

import re

import pytest
from transformers.conversion_mapping import get_model_conversion_mapping

from exporter.gemma import FAMILIES as TABLE
from exporter.gemma import canonical_name
from tests.gemmas import FAMILIES, build_model

PREFIX_CHANGE = "PrefixChange"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rename_of_the_library_leaves_the_canonical_name_alone(family: str) -> None:
    """Whatever transformers turns into a module's name on load has the canonical name of that module."""
    model = build_model(family)
    known = TABLE[model.config.model_type]
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    for module_name in model.state_dict():
        saved = module_name
        for conversion in reversed(conversions):
            saved = conversion.reverse_transform().rename_source_key(saved)[0]
        assert canonical_name(saved, known) == canonical_name(module_name, known), (saved, module_name)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_modules_share_a_canonical_name(family: str) -> None:
    model = build_model(family)
    names = [canonical_name(name, TABLE[model.config.model_type]) for name in model.state_dict()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_canonical_name_is_its_own(family: str) -> None:
    model = build_model(family)
    known = TABLE[model.config.model_type]
    for name in model.state_dict():
        canonical = canonical_name(name, known)
        assert canonical_name(canonical, known) == canonical


@pytest.mark.parametrize("model_type", TABLE)
def test_every_rename_is_a_valid_anchored_pattern(model_type: str) -> None:
    """An unanchored rename would also change a tower of the same name further inside."""
    for pattern, _ in TABLE[model_type].renames:
        assert re.compile(pattern).pattern.startswith("^")
