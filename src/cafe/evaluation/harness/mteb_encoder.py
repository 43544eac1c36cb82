"""A `CAFe` as mteb's model: an encoder of texts, images and inputs with both.

    import mteb
    from cafe.evaluation.harness.mteb_encoder import load_encoder

    mteb.evaluate(load_encoder("demo/model"), mteb.get_tasks(tasks=["Flickr30kT2IRetrieval"]))

mteb can load the directory directly, through sentence-transformers, but takes every such model for
a text-only one and silently skips tasks with images.

With `load_encoder(…, multi_vector=True)` mteb searches by the vectors of all tokens (ViDoRe, say).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.errors import DataError
from cafe.evaluation.model_calls import ModelCalls
from cafe.evaluation.task import Encode
from cafe.model.token_vectors import TokenEncoder
from cafe.types import Conversation, Image, Part, user

if TYPE_CHECKING:
    from jaxtyping import Float
    from mteb.models.model_meta import ModelMeta

MODALITIES = ("text", "image")


class MtebEncoder:
    """The `EncoderProtocol` of mteb.

    encode   gives the embeddings
    meta     `mteb_model_meta`: says which tasks suit the model, and names its results
    """

    def __init__(self, encode: Encode, meta: ModelMeta) -> None:
        self._encode = encode
        self.mteb_model_meta = meta

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, precision: str = "float32", **_: Any
    ) -> Float[np.ndarray, "n d"]:
        """Embeddings of a loader's batches, each a dict of lists: `text`, `image` or both.

        Task, split and prompt type are not used: where mteb has an instruction it is in the text,
        and both sides of a search are embedded alike. Nor is a batch size used: the loader has one.

        Raises:
            DataError: an input that has neither text nor image; a precision other than float32.
        """
        if precision != "float32":
            raise DataError(f"mteb's precision={precision!r}: embeddings are float32; leave it out")
        return np.concatenate([self._encode(list(batch_inputs(batch))) for batch in inputs])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, "n m"]:
        """Cosines of all pairs."""
        return _units(embeddings1) @ _units(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, " n"]:
        """Cosines of row i of both."""
        return (_units(embeddings1) * _units(embeddings2)).sum(axis=-1)


class MtebTokenEncoder(MtebEncoder):
    """The same for late interaction: tokens' vectors, compared by MaxSim."""

    def __init__(
        self, encode_tokens: Callable[[Sequence[Conversation]], list[np.ndarray]], meta: ModelMeta
    ) -> None:
        super().__init__(encode_tokens, meta)  # type: ignore[arg-type]
        self._encode_tokens = encode_tokens

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, precision: str = "float32", **_: Any
    ) -> Float[np.ndarray, "n t d"]:
        """Unit vectors of a loader's batches, with zeros after an item's last (`MtebEncoder`)."""
        if precision != "float32":
            raise DataError(f"mteb's precision={precision!r}: vectors are float32; leave it out")
        items = [v for batch in inputs for v in self._encode_tokens(list(batch_inputs(batch)))]
        longest = max(len(vectors) for vectors in items)
        padded = np.zeros((len(items), longest, items[0].shape[1]), dtype=np.float32)
        for place, vectors in zip(padded, items, strict=True):
            place[: len(vectors)] = vectors
        return padded

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, "n m"]:
        """MaxSim of all pairs; the first ones are the queries."""
        return TokenEncoder.max_sim(_unpadded(embeddings1), _unpadded(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, " n"]:
        """MaxSim of item i of both."""
        pairs = zip(_unpadded(embeddings1), _unpadded(embeddings2), strict=True)
        return np.array([TokenEncoder.max_sim([a], [b])[0, 0] for a, b in pairs])


def _unpadded(embeddings: Any) -> list[Float[np.ndarray, "_ d"]]:
    return [item[np.abs(item).sum(axis=-1) > 0] for item in np.asarray(embeddings)]


def load_encoder(
    name_or_dir: str | Path, *, device: str | None = None, multi_vector: bool = False
) -> MtebEncoder:
    """A directory, a hub id or "tiny", ready for `mteb.evaluate` and `mteb.mock_run`.

    Args:
        name_or_dir: the model.
        device: as in `CAFe.from_pretrained`.
        multi_vector: compare the vectors of tokens (`CAFe.encode_tokens`), not embeddings.

    Raises:
        DataError: mteb is not installed.
        CheckpointError: as in `CAFe.from_pretrained`, or the model has no token vectors.
    """
    from cafe.model.token_vectors import projection_needed
    from cafe.model.vlm import CAFe

    name = str(name_or_dir)
    model = CAFe.from_pretrained(name_or_dir, device=device)
    meta = model_meta(
        name if name.count("/") == 1 and not Path(name).is_dir() else f"cafe/{Path(name).name}",
        embed_dim=model.embedding_dimension,
        max_tokens=model.collator.max_tokens,
        n_parameters=sum(p.numel() for p in model.parameters()),
    )
    if multi_vector:
        from mteb.models.model_meta import ScoringFunction

        known = {
            "embed_dim": projection_needed(model.model).out_features,
            "similarity_fn_name": ScoringFunction.MAX_SIM,
            "model_type": ["late-interaction"],
        }
        return MtebTokenEncoder(model.encode_tokens, meta.model_copy(update=known))
    return MtebEncoder(ModelCalls(model).encode, meta)


def model_meta(name: str, **known: Any) -> ModelMeta:
    """Metadata for mteb of a model that reads text and images and is compared by cosine.

    Args:
        name: As mteb requires it: owner/model.
        known: Other fields of mteb's `ModelMeta`.

    Raises:
        DataError: mteb is not installed.
    """
    require_mteb()
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    return ModelMeta.create_empty(
        {
            "name": name,
            "modalities": list(MODALITIES),
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch", "Transformers", "safetensors"],
            **known,
        }
    )


def require_mteb() -> None:
    """Raises DataError when mteb is not installed."""
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"mteb cannot be imported ({error}): pip install 'cafe-vlm[mteb]'"
        ) from error


def batch_inputs(batch: Mapping[str, Sequence[Any]]) -> Iterator[Conversation]:
    """The inputs of one of mteb's batches; other columns (id, title, query, …) are in the text.

    Raises:
        DataError: an input that has neither text nor image.
    """
    columns = [batch[name] for name in ("image", "text") if name in batch]
    if not columns:
        raise DataError(
            f"mteb gives {', '.join(sorted(batch))}, but no text and no image; the model reads "
            "nothing else"
        )
    for number, values in enumerate(zip(*columns, strict=True)):
        parts = tuple(part for value in values for part in _parts(value))
        if not parts and any(isinstance(value, str) for value in values):
            parts = ("",)  # an empty text is a valid input; some of mteb's data sets contain them
        if not parts:
            raise DataError(f"input {number} of a batch of mteb has neither text nor image")
        yield user(*parts)


def _parts(value: Any) -> Iterator[Part]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _parts(one)
    elif isinstance(value, str):
        if value:
            yield value
    elif value is not None:
        yield Image(value)


def _units(embeddings: Any) -> Float[np.ndarray, "n d"]:
    wide = np.asarray(embeddings, dtype=np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
