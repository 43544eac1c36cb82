"""Check that other tools embed a directory's probes as cafe does.

The probes are a few fixed texts and images, and images that are read after a thought. Each tool
loads the directory by its own means, as its users would.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from cafe.errors import CafeError, CheckpointError, first_line
from cafe.model.checkpoint.adapter import is_adapter
from cafe.model.checkpoint.directory import quiet
from cafe.model.checkpoint.locate import locate
from cafe.model.checkpoint.multi_vector import MULTI_VECTOR
from cafe.model.checkpoint.sentence_transformers_files import (
    embedding_template_of,
    is_cross_encoder,
)
from cafe.model.latent import averaged_tokens
from cafe.model.multi_vector import token_projection_of
from cafe.model.rows.inputs import Input
from cafe.model.vlm import CAFe
from cafe.release.card import Agreement
from cafe.types import Image, Part, thought_about, user

EXACT = 1e-4
"""Largest distance of two unit-length embeddings that another order of summation explains."""

_POLL_SECONDS = 0.05
_RESPONSE_SECONDS = 600
_FLOAT32 = {"dtype": torch.float32}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How closely other tools agree with cafe on a directory's embeddings.

    directory   the directory that all of them loaded
    probes      number of texts and images that were embedded, also after thoughts
    tolerance   largest distance allowed between two unit vectors
    agreements  one for each tool
    """

    directory: Path
    probes: int
    tolerance: float
    agreements: tuple[Agreement, ...]


def verify(
    directory: str | Path, *, on_agreement: Callable[[Agreement], None] | None = None
) -> VerifyReport:
    """Compare transformers, sentence-transformers and `cafe serve` with `CAFe.encode`.

    All compute in float32, and only one of them is in memory at a time. Of a model with token
    vectors also `MultiVectorEncoder` of sentence-transformers, with `CAFe.encode_tokens`.

        >>> from cafe.release.verify import verify
        >>> for agreement in verify("tiny").agreements:
        ...     print(f"{agreement.tool}: cosine {agreement.cosine:.5f}")

        transformers 5.23.0: cosine 1.00000
        sentence-transformers 6.2.0: cosine 1.00000
        cafe serve (fastapi 0.165.0): cosine 1.00000

    Args:
        directory: "tiny", a checkpoint directory, or a hub id.
        on_agreement: Called after each tool.

    Raises:
        CheckpointError: a tool's embeddings differ, it cannot read the directory, or that is an
            adapter, which no other tool but peft loads.
        CafeError: a tool is not installed.
    """
    directory = locate(directory)
    check_readable_by_all(directory)
    if is_cross_encoder(directory):
        raise CheckpointError(
            f"{directory}: is a cross-encoder, which sentence-transformers does not embed with; "
            "call verify_cross_encoder"
        )
    probes = [*probe_inputs(), *thought_probes()]
    model = CAFe.from_pretrained(directory, dtype=torch.float32)
    of_inputs = model.encode(probes)
    late = token_projection_of(model.model) is not None
    of_tokens = np.concatenate(model.encode_tokens(probes)) if late else of_inputs
    del model
    agreements = []
    st = f"sentence-transformers {_version('sentence-transformers', 'st')}"
    tools = [
        (f"transformers {metadata.version('transformers')}", _transformers, of_inputs),
        (st, _sentence_transformers, of_inputs),
        (f"cafe serve (fastapi {_version('fastapi', 'serve')})", _server, of_inputs),
        *([(f"{st}, MultiVectorEncoder", _multi_vector, of_tokens)] if late else ()),
    ]
    for tool, embed, expected in tools:
        try:
            with quiet():
                embeddings = np.asarray(embed(directory, probes), dtype=np.float32)
        except CafeError:
            raise
        except Exception as error:  # parsers of many files, which raise all kinds of exceptions
            raise CheckpointError(
                f"{directory}: {tool} cannot read it ({first_line(error)}); do not publish it, and "
                "write it again with this version of cafe"
            ) from error
        agreements.append(_compare(directory, tool, embeddings, expected, len(probes)))
        if on_agreement is not None:
            on_agreement(agreements[-1])
    return VerifyReport(directory, len(probes), EXACT, tuple(agreements))


def check_readable_by_all(directory: Path) -> None:
    """Raises CheckpointError for an adapter."""
    if is_adapter(directory):
        raise CheckpointError(
            f"{directory}: is an adapter, which only peft and cafe load, so no other tool can be "
            "compared; merge it (--merge) or leave --verify out"
        )


def probe_inputs() -> list[Input]:
    """Texts, images, and both together; always the same ones."""
    rng = np.random.default_rng(0)
    sizes = [(96, 96), (160, 96), (96, 224)]
    images = [
        PIL.Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    return [
        "a red mug on a table",
        "two dogs run across a wide field under a dark sky, and a child looks on",
        "yes",
        *images,
        {"image": images[0], "text": "what is at the top left"},
    ]


def thought_probes() -> list[Input]:
    """Images, each with a thought that its embedding is read after, as chat messages."""
    images = [probe for probe in probe_inputs() if isinstance(probe, PIL.Image.Image)]
    thoughts = ("a red mug on a table.", "Two dogs run across a field; a child looks on")
    return [
        [
            {"role": turn.role, "content": [_chat_part(part) for part in turn.content]}
            for turn in thought_about(user(Image(image)), thought)
        ]
        for image, thought in zip(images, thoughts, strict=False)
    ]


def _chat_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Image):
        return {"type": "image", "image": part.source}
    return {"type": "text", "text": part}


def _compare(
    directory: Path, tool: str, embeddings: np.ndarray, expected: np.ndarray, probes: int
) -> Agreement:
    """Raises CheckpointError when embeddings are further apart than `EXACT`."""
    if embeddings.shape != expected.shape:
        raise CheckpointError(
            f"{directory}: {tool} gives vectors of shape {embeddings.shape}, and cafe of shape "
            f"{expected.shape}; do not publish it, and write it again with this version of cafe"
        )
    cosine = float((embeddings * expected).sum(1).min())
    distance = float(np.linalg.norm(embeddings - expected, axis=1).max())
    if not distance <= EXACT:  # written so that NaN fails too
        raise CheckpointError(
            f"{directory}: {tool} embeds {probes} probes with a cosine of {cosine:.6f} "
            f"to cafe's, up to {distance:.1e} apart (tolerance {EXACT:.0e}); do not publish "
            "it, and write it again with this version of cafe"
        )
    return Agreement(tool, min(cosine, 1.0), distance)


def _named(package: str, extra: str) -> str:
    return f"{package} {_version(package, extra)}"


def _version(package: str, extra: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise CafeError(
            f"--verify needs {package}: pip install 'cafe-vlm[{extra}]', or leave --verify out"
        ) from error


def _transformers(directory: Path, probes: Sequence[Any]) -> np.ndarray:
    """Last hidden state of the base model under the embedding template, with transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    ).eval()
    template = embedding_template_of(directory)
    states, averages = [], averaged_tokens(model.config)
    with torch.inference_mode():
        for probe in probes:
            inputs = processor.apply_chat_template(
                _messages(probe),
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            hidden = model.model(**inputs).last_hidden_state[0]
            states.append(hidden[-1 - averages : -1].mean(0) if averages else hidden[-1])
    return torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()


def _sentence_transformers(directory: Path, probes: Sequence[Any]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(directory), device="cpu", trust_remote_code=False, model_kwargs=_FLOAT32
    ).float()
    chats = [probe for probe in probes if isinstance(probe, list)]
    others = [probe for probe in probes if not isinstance(probe, list)]  # it cannot mix them
    return np.concatenate([model.encode(part, show_progress_bar=False) for part in (others, chats)])


def _multi_vector(directory: Path, probes: Sequence[Any]) -> np.ndarray:
    """The vectors of all tokens of all probes, one after another."""
    from sentence_transformers import MultiVectorEncoder

    of_tokens = str(directory / MULTI_VECTOR)
    model = MultiVectorEncoder(of_tokens, device="cpu", model_kwargs=_FLOAT32).float()
    found = [model.encode([probe], convert_to_numpy=True)[0] for probe in probes]
    return np.concatenate(found)


def _server(directory: Path, probes: Sequence[Any]) -> np.ndarray:
    """As a client receives them from `/v1/embeddings`, over a loopback socket."""
    from cafe.serving.model_calls import CafeCalls
    from cafe.serving.run import Server, ServerSettings

    def load() -> CafeCalls:
        return CafeCalls(CAFe.from_pretrained(directory, dtype=torch.float32))

    server = Server(load, ServerSettings(name="probed", port=0))
    server.start()
    try:
        while not (server.engine.loaded or server.ended):
            time.sleep(_POLL_SECONDS)
        if server.engine.failure is not None:
            raise server.engine.failure
        return _post(server.url, {"messages": [_request_messages(probe) for probe in probes]})
    finally:
        server.stop()


def _post(url: str, body: dict[str, Any]) -> np.ndarray:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=_RESPONSE_SECONDS)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/embeddings", json.dumps(body).encode(), headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise CheckpointError(f"cafe serve failed on the probes: {content['error']['message']}")
    return np.array([row["embedding"] for row in content["data"]])


def _messages(probe: Any) -> list[dict[str, Any]]:
    """A probe as transformers' chat messages, images first."""
    if isinstance(probe, list):
        return probe
    both = probe if isinstance(probe, dict) else {}
    text = probe if isinstance(probe, str) else both.get("text")
    image = probe if isinstance(probe, PIL.Image.Image) else both.get("image")
    images = [] if image is None else [{"type": "image", "image": image}]
    texts = [] if text is None else [{"type": "text", "text": text}]
    return [{"role": "user", "content": images + texts}]


def _request_messages(probe: Any) -> list[dict[str, Any]]:
    """The same in OpenAI's format."""
    return [
        {"role": turn["role"], "content": [_request_part(part) for part in turn["content"]]}
        for turn in _messages(probe)
    ]


def _request_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    buffer = io.BytesIO()
    part["image"].save(buffer, "png")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
