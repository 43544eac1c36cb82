"""One small file of facts per model family; this module looks them up.

`family_of(config)` is the only way in. A family says where its parts are, how its processor turns
images into tensors and placeholders, and how those tensors become features.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from cafe.errors import FamilyError
from cafe.model.families.base import Family, Grid, ProcessedImages
from cafe.model.families.gemma3 import Gemma3
from cafe.model.families.gemma4 import Gemma4
from cafe.model.families.glm4v import Glm4V, Glm46V
from cafe.model.families.idefics3 import Idefics3, SmolVLM
from cafe.model.families.internvl import InternVL
from cafe.model.families.lfm2_vl import Lfm2VL, Lfm3VL
from cafe.model.families.llava_next import LlavaNext
from cafe.model.families.llava_onevision import LlavaOnevision
from cafe.model.families.mistral3 import Mistral3
from cafe.model.families.qwen2_5_omni import Qwen25Omni
from cafe.model.families.qwen2_vl import Qwen2VL, Qwen25VL
from cafe.model.families.qwen3_5 import Qwen35, Qwen35MoE
from cafe.model.families.qwen3_vl import Qwen3VL, Qwen3VLMoE

_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LlavaOnevision(),
        LlavaNext(),
        Qwen2VL(),
        Qwen25VL(),
        Qwen25Omni(),
        Qwen3VL(),
        Qwen3VLMoE(),
        Qwen35(),
        Qwen35MoE(),
        Glm4V(),
        Glm46V(),
        Mistral3(),
        Lfm2VL(),
        Lfm3VL(),
        Gemma3(),
        Gemma4(),
        InternVL(),
        Idefics3(),
        SmolVLM(),
    )
}

__all__ = ["Family", "Grid", "ProcessedImages", "family_of", "part_that_answers"]


def part_that_answers(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the part that reads and answers, of a model that has others, too."""
    names = dict(family.whole for family in _FAMILIES.values() if family.whole is not None)
    name = names.get(str(config.model_type))
    return config if name is None else getattr(config, name)


def family_of(config: PretrainedConfig) -> Family:
    """The facts of a model's family.

    Raises:
        FamilyError: the family is not supported yet.
    """
    model_type = str(config.model_type)
    if model_type not in _FAMILIES:
        raise FamilyError(
            f"model type {model_type!r}: cafe has no facts for this family (it knows "
            f"{', '.join(_FAMILIES)}). What is missing: {Family.what_is_needed()}"
        )
    return _FAMILIES[model_type].configured(config)
