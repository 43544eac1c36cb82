"""Embeddings in fewer bits are those of sentence-transformers' own function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cafe.model.torchvision_pair  # noqa: F401 - before anything imports torchvision
from cafe.model.quantization import PRECISIONS, quantized, value_ranges
from cafe.model.vlm import CAFe

TEXTS = ["a big red cat", "yes", "no", "Describe this image.", "at the top left", "Compress"]


def unit(count: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from sentence_transformers.util.quantization import quantize_embeddings

    return quantize_embeddings


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("width", [16, 19])
def test_every_byte_is_theirs(theirs: Any, precision: Any, width: int):
    x = unit(200, width)
    x[3, 2] = 0  # neither positive nor negative
    x[:, 5] = 0.25  # a dimension without a range
    ours = quantized(x, precision)
    want = theirs(x, precision)
    assert ours.dtype == want.dtype
    assert np.array_equal(ours, want)
    assert len(np.unique(ours)) > 50, "not all alike"


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_given_ranges_are_kept_and_what_is_beyond_is_clipped(theirs: Any, precision: Any):
    known, new = unit(300, 12), 3 * unit(40, 12, seed=1)
    ranges = value_ranges(known)
    ours = quantized(new, precision, ranges)
    assert np.array_equal(ours, theirs(new, precision, ranges=ranges))
    assert np.array_equal(ours, theirs(new, precision, calibration_embeddings=known))
    assert {np.iinfo(precision).min, np.iinfo(precision).max} <= set(np.unique(ours).tolist())
    alone = quantized(new[0], precision, ranges)
    assert np.array_equal(alone, ours[0])


def test_a_bit_says_that_a_value_is_positive():
    bits = quantized(np.array([[0.5, -0.5, 0.0, 1e-9, -1, 1, 1, -1]], np.float32), "ubinary")
    assert bits.tolist() == [[0b10010110]]
    assert quantized(np.array([0.5] * 8, np.float32), "binary").tolist() == [127]


def test_half_precision_is_the_nearest():
    x = unit(5, 8)
    half = quantized(x, "float16")
    assert half.dtype == np.float16
    assert 0 < np.abs(half - x).max() <= 2**-11
    assert quantized(x, "float32") is x


def test_nothing_stays_nothing():
    none = np.zeros((0, 20), np.float32)
    shapes = {p: quantized(none, p).shape for p in PRECISIONS}  # type: ignore[arg-type]
    assert shapes == {p: (0, 3 if "binary" in p else 20) for p in PRECISIONS}


def test_ranges_need_two_embeddings_and_their_own_width():
    with pytest.raises(ValueError, match="need at least two embeddings"):
        quantized(unit(1, 4), "int8")
    with pytest.raises(ValueError, match="need at least two embeddings"):
        quantized(unit(3, 4)[0], "uint8")
    with pytest.raises(
        ValueError, match=r"ranges of shape \(2, 5\): .* 4 dimensions need \(2, 4\)"
    ):
        quantized(unit(3, 4), "int8", np.zeros((2, 5)))
    with pytest.raises(ValueError, match="precision 'int4': use one of float32"):
        quantized(unit(3, 4), "int4")  # type: ignore[arg-type]


# ------------------------------------------------------------------ as options of `encode`


@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary", "uint8"])
def test_encode_gives_what_sentence_transformers_would_make_of_it(
    small_model: CAFe, theirs: Any, precision: Any
):
    full = small_model.encode(TEXTS, truncate_dim=24)
    want = theirs(full, precision)
    found = small_model.encode(TEXTS, truncate_dim=24, precision=precision)
    assert np.array_equal(found, want)
    tensor = small_model.encode(TEXTS, truncate_dim=24, precision=precision, convert_to_tensor=True)
    assert np.array_equal(tensor.numpy(), want)


def test_one_text_has_the_bytes_that_it_has_in_a_list(small_model: CAFe):
    ranges = value_ranges(small_model.encode(TEXTS))
    for precision in ("int8", "binary", "float16"):
        many = small_model.encode(TEXTS[:2], precision=precision, ranges=ranges)
        one = small_model.encode(TEXTS[0], precision=precision, ranges=ranges)
        assert one.shape == many[0].shape
        # A rounding in the last bit may fall on the other side of a step.
        assert np.abs(one.astype(np.float32) - many[0]).max() <= (
            1 if precision == "int8" else 1e-3
        )


def test_a_tensor_is_the_array_and_can_be_trained_through(small_model: CAFe):
    array = small_model.encode(TEXTS)
    tensor = small_model.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.device == small_model.device
    assert np.array_equal(tensor.numpy(), array)
    assert not tensor.is_inference()
    weight = torch.ones(array.shape[1], requires_grad=True)
    (tensor @ weight).sum().backward()
    assert weight.grad is not None
    assert small_model.encode(TEXTS[0], convert_to_tensor=True).shape == array[0].shape
    assert small_model.encode([], convert_to_tensor=True).shape == (0, array.shape[1])


def test_an_unknown_precision_is_told_before_anything_is_computed(small_model: CAFe):
    with pytest.raises(ValueError, match="precision 'int4': use one of"):
        small_model.encode(["a"], precision="int4")  # type: ignore[arg-type]
