"""Which model made the vectors: a fingerprint that is cheap to compute and tells models apart.

Vectors of two models, or of one model with two prompts, cannot be compared, and nothing in the
numbers shows it. So an index records which model made its vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cafe.errors import CheckpointError, DataError

_SAMPLE_BYTES = 1024
_DIGEST_BYTES = 16
_LARGEST_HEADER_BYTES = 100_000_000  # as safetensors itself allows


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model that made the vectors.

    name        what loads the model again: "tiny", a directory's absolute path, a hub id
    weights     `weights_fingerprint` of its files
    prompt      `prompt_fingerprint` of its embedding prompts
    dimension   of the vectors
    caption     the weight with which an image's vector contains that of the model's own caption
                (`cafe.model.captions`); None: it does not
    think       the most tokens of the thought after which an image's vector was read
                (`cafe.model.thoughts`); None: it was read after none
    writer      the name of another model, which wrote the captions or thoughts; None: this one did
    writer_weights   `weights_fingerprint` of that model
    tokens      fingerprint of the projection of the token vectors; None: the index holds none
    token_dimension   of these vectors
    pool        one of them is kept for so many tokens
    """

    name: str
    weights: str
    prompt: str
    dimension: int
    caption: float | None = None
    think: int | None = None
    writer: str | None = None
    writer_weights: str | None = None
    tokens: str | None = None
    token_dimension: int | None = None
    pool: float | None = None

    @property
    def generates(self) -> bool:
        """Whether an image's vector contains words that a model wrote of it."""
        return self.caption is not None or self.think is not None

    def to_json(self) -> str:
        return json.dumps(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The facts that there are; the first four are those that earlier versions wrote."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, text: str) -> ModelFacts:
        """Raises DataError when `text` is not what `to_json` wrote."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise DataError(f"the facts of the index's model cannot be read ({error})") from error

    def difference(self, other: ModelFacts) -> str | None:
        """The difference in words; None when vectors of the two models can be compared.

        Vectors with captions or thoughts can be compared with vectors without. The token vectors
        of an index need those of the other model.
        """
        if self.dimension != other.dimension:
            return f"dimension {other.dimension} instead of {self.dimension}"
        if self.weights != other.weights:
            return "other weights"
        if self.prompt != other.prompt:
            return "another embedding prompt"
        other_tokens = self.tokens is not None and self.tokens != other.tokens
        return "another projection of token vectors" if other_tokens else None


def weights_fingerprint(directories: Iterable[Path]) -> str:
    """Hash the safetensors files in `directories`: headers, sizes, and a sample per tensor.

    The headers hold every tensor's name, type and shape; of each tensor the 1,024 bytes in its
    middle are read, so training that changed any matrix is seen, and 15 GB take a second. Names of
    files and folders do not count.

    Args:
        directories: where the weights are; for an adapter, its own directory and its base's.

    Raises:
        CheckpointError: there are no such files, or one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for directory in directories:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"model {str(directory)!r}: no *.safetensors weights there")
        for file in files:
            try:
                _add_file(digest, file)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"weights {str(file)!r} cannot be read ({error}); copy the model again"
                ) from error
    return digest.hexdigest()


def prompt_fingerprint(contract: Mapping[str, str]) -> str:
    """Hash what an embedding is read from: the rendered prompts, tokens and pooled tokens.

    Args:
        contract: `CAFe.embedding_contract()`. The length limits and the dimension do not count.
    """
    others = {"max tokens", "dimension", "thought tokens"}
    asked = {k: v for k, v in contract.items() if k not in others}
    text = json.dumps(asked, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _add_file(digest: hashlib.blake2b, file: Path) -> None:
    with file.open("rb") as weights:
        length = int.from_bytes(weights.read(8), "little")
        if length > _LARGEST_HEADER_BYTES:
            raise ValueError("not a safetensors file")
        head = weights.read(length)
        digest.update(f"{file.stat().st_size} {length} ".encode())
        digest.update(head)
        for name, tensor in sorted(json.loads(head).items()):
            if name == "__metadata__":
                continue
            begin, end = tensor["data_offsets"]
            size = min(_SAMPLE_BYTES, end - begin)
            weights.seek(8 + length + (begin + end - size) // 2)
            digest.update(weights.read(size))
