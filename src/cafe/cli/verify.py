"""Does every tool embed a directory's probes as cafe does? Each loads it by its own means."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from cafe.errors import CafeError, CheckpointError
from cafe.model.checkpoint import EMBEDDING_TEMPLATE, quiet
from cafe.model.export import EXACT, probe_inputs
from cafe.model.vlm import CAFe
from cafe.report.card import Agreement

TICK_SECONDS = 0.05
ANSWER_SECONDS = 600


def verify(directory: Path) -> Iterator[Agreement]:
    """transformers, sentence-transformers and our server against `CAFe.encode`, one by one.

    All compute in float32; only one of them is in memory at a time.
    Raises CafeError when a tool is not installed, CheckpointError when one disagrees.
    """
    probes = probe_inputs()
    expected = CAFe.from_pretrained(directory, dtype=torch.float32).encode(probes)
    for tool, embed in (
        (f"transformers {metadata.version('transformers')}", _transformers),
        (_named("sentence-transformers", "st"), _sentence_transformers),
        (f"cafe serve (fastapi {_version('fastapi', 'serve')})", _server),
    ):
        with quiet():
            found = np.asarray(embed(directory, probes), dtype=np.float32)
        cosine = float((found * expected).sum(1).min())
        distance = float(np.linalg.norm(found - expected, axis=1).max())
        if not distance <= EXACT:  # NaN is too far, too
            raise CheckpointError(
                f"{directory}: {tool} embeds {len(probes)} probes with a cosine of {cosine:.6f} "
                f"to cafe's, up to {distance:.1e} apart (tolerance {EXACT:.0e}); do not publish "
                "it, and write it again with this version of cafe"
            )
        yield Agreement(tool, min(cosine, 1.0), distance)


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
    """The last state of the base model after the named template, by transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    states = []
    with torch.inference_mode():
        for probe in probes:
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": _parts(probe)}],
                chat_template=EMBEDDING_TEMPLATE,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            states.append(model.model(**inputs).last_hidden_state[0, -1])
    return torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()


def _sentence_transformers(directory: Path, probes: Sequence[Any]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", trust_remote_code=False).float()
    return model.encode(list(probes), show_progress_bar=False)


def _server(directory: Path, probes: Sequence[Any]) -> np.ndarray:
    """As a client receives them from `/v1/embeddings`, over a socket on loopback."""
    from cafe.serve.calls import CafeCalls
    from cafe.serve.run import Server, Settings

    def load() -> CafeCalls:
        return CafeCalls(CAFe.from_pretrained(directory, dtype=torch.float32))

    server = Server(load, Settings(name="probed", port=0))
    server.start()
    try:
        while not (server.engine.loaded or server.ended):
            time.sleep(TICK_SECONDS)
        if server.engine.failure is not None:
            raise server.engine.failure
        chats = [[{"role": "user", "content": _parts_of_request(probe)}] for probe in probes]
        return _asked(server.url, {"messages": chats})
    finally:
        server.stop()


def _asked(url: str, body: dict[str, Any]) -> np.ndarray:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=ANSWER_SECONDS)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/embeddings", json.dumps(body).encode(), headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise CheckpointError(f"cafe serve answers the probes with {content['error']['message']}")
    return np.array([row["embedding"] for row in content["data"]])


def _parts(probe: Any) -> list[dict[str, Any]]:
    """A probe as the content of a chat message of transformers, pictures first."""
    both = probe if isinstance(probe, dict) else {}
    text = probe if isinstance(probe, str) else both.get("text")
    picture = probe if isinstance(probe, PIL.Image.Image) else both.get("image")
    pictures = [] if picture is None else [{"type": "image", "image": picture}]
    return pictures + ([] if text is None else [{"type": "text", "text": text}])


def _parts_of_request(probe: Any) -> list[dict[str, Any]]:
    """The same, as OpenAI writes it."""
    parts = []
    for part in _parts(probe):
        if part["type"] == "image":
            buffer = io.BytesIO()
            part["image"].save(buffer, "png")
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            part = {"type": "image_url", "image_url": {"url": url}}
        parts.append(part)
    return parts
