"""The last layer is computed only where it is read, with the values of the whole layer."""

from __future__ import annotations

import threading

import torch

from cafe.model.last_layer import compute_last_layer_at, prepare
from cafe.model.rows.inputs import as_messages
from cafe.model.vlm import CAFe
from helpers.mixed_inputs import INPUTS, TEXTS


def test_the_last_layer_is_computed_where_it_is_read(small_model: CAFe):
    rows, vision = small_model.collator.embedding_rows(as_messages(INPUTS))
    sizes: list[int] = []
    mlp = small_model.model.model.language_model.layers[-1].mlp
    handle = mlp.gate_proj.register_forward_pre_hook(
        lambda _, x: sizes.append(x[0].shape[:-1].numel())
    )
    try:
        with torch.inference_mode():
            whole = small_model(rows, vision).flatten(0, 1)[rows.pooled]
            read = small_model.hidden_at(rows, vision)
    finally:
        handle.remove()
    assert (whole - read).abs().max() <= 1e-5
    assert sizes == [rows.input_ids.numel(), len(INPUTS)]


def test_reading_in_one_thread_leaves_the_others_alone(small_model: CAFe):
    """And a model that is wrapped twice reads as one that is wrapped once."""
    prepare(small_model.model.get_decoder())
    rows, vision = small_model.collator.embedding_rows(as_messages(TEXTS))
    with torch.inference_mode():
        want = small_model(rows, vision)
    found: list[torch.Tensor] = []

    def other() -> None:
        with torch.inference_mode():
            found.append(small_model(rows, vision))

    with compute_last_layer_at(rows.pooled, rows.input_ids.shape):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with torch.inference_mode():
            own = small_model(rows, vision)
    assert torch.equal(found[0], want)
    elsewhere = torch.ones(want.shape[0] * want.shape[1], dtype=torch.bool)
    elsewhere[rows.pooled] = False
    assert ((own - want).flatten(0, 1)[elsewhere].abs().max()) > 1e-2, "there it is nonsense"
