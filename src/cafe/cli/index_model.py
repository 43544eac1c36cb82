"""A model and its facts, compared with those of an index before the weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cafe.index import Index, ModelFacts
    from cafe.model.vlm import CAFe


def open_model(
    name: str, index: Index | None = None, device: str | None = None
) -> tuple[CAFe, ModelFacts]:
    """Load model `name`; with its facts.

    Raises DataError, before the weights are loaded where it shows, when `index` was made by
    another model.
    """
    from cafe.index import model_facts
    from cafe.index.fingerprint import weights_fingerprint
    from cafe.model.adapter import base_of, is_adapter
    from cafe.model.location import lasting_name, locate

    lasting = lasting_name(name)
    directories = [locate(name)]
    if is_adapter(directories[0]):
        directories.append(locate(base_of(directories[0])))
    if index is not None:
        weights = weights_fingerprint(directories)
        index.check_model(replace(index.model, name=lasting, weights=weights))

    from cafe.model.vlm import CAFe

    where: dict[str, Any] = {} if device is None else {"device": device}
    vlm = CAFe.from_pretrained(name, **where)
    facts = model_facts(lasting, directories, vlm.embedding_contract(), vlm.embedding_dimension)
    if index is not None:
        index.check_model(facts)
    return vlm, facts
