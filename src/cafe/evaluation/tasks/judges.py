"""The judges of THRONE: exact word matching, FLAN-T5, or a chat endpoint.

A judge is a callable that maps inquiries to replies and yields each as soon as it is known. Its
`name` identifies it in result files, and keeps its replies apart from those of other judges.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cafe.errors import DataError

FLAN_T5 = ("google/flan-t5-base", "google/flan-t5-large", "google/flan-t5-xl")
"""The judges of the paper."""
API_KEY_VARIABLE = "OPENAI_API_KEY"

_MAX_TOKENS = 16
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A question about a text; `thing` is the class in question."""

    text: str
    question: str
    thing: str

    @property
    def prompt(self) -> str:
        return f"Text: {self.text}\n\nRead the text and answer the question.\n\n{self.question}"


class Judge(Protocol):
    """Answers inquiries in order. It may fail half way; replies that it has yielded are kept."""

    @property
    def name(self) -> str: ...
    def __call__(self, inquiries: Sequence[Inquiry]) -> Iterable[str]: ...


class Finder(Protocol):
    """A text -> the classes that it names."""

    def __call__(self, text: str) -> Collection[str]: ...


@dataclass(frozen=True, slots=True)
class ExactJudge:
    """Yes if the text names the object. For worlds in which every name is known."""

    mentions: Finder
    name: str = "exact"

    def __call__(self, inquiries: Sequence[Inquiry]) -> Iterator[str]:
        known: dict[str, set[str]] = {}
        for one in inquiries:
            if one.text not in known:
                known[one.text] = set(self.mentions(one.text))
            yield "yes" if one.thing in known[one.text] else "no"


@dataclass(frozen=True, slots=True)
class SequenceJudge:
    """A sequence-to-sequence model such as FLAN-T5, from a path or a hub name, decoded greedily.

    Raises:
        DataError: It cannot be loaded.
    """

    name: str
    _loaded: list[Any] = field(default_factory=list)

    def __call__(self, inquiries: Sequence[Inquiry]) -> Iterator[str]:
        import torch

        tokenizer, model = self._load()
        for start in range(0, len(inquiries), _BATCH):
            prompts = [one.prompt for one in inquiries[start : start + _BATCH]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
            with torch.inference_mode():
                tokens = model.generate(**inputs, max_length=_MAX_TOKENS, do_sample=False)
            yield from tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _load(self) -> Any:
        if not self._loaded:
            import torch

            from cafe.model.torchvision_pair import ensure_torchvision

            ensure_torchvision()  # before transformers looks for it
            from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

            device = "cuda" if torch.cuda.is_available() else "cpu"
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
                model: Any = AutoModelForSeq2SeqLM.from_pretrained(
                    self.name, dtype=torch.bfloat16, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                raise DataError(
                    f"judge {self.name!r}: cannot be loaded ({error}); give a folder or a hub name "
                    "of a sequence-to-sequence model"
                ) from error
            self._loaded[:] = [tokenizer, model.to(device).eval()]
        return self._loaded


@dataclass(frozen=True, slots=True)
class EndpointJudge:
    """An OpenAI-compatible chat endpoint: `url` is its base, such as http://localhost:8000/v1.

    The key, if the endpoint needs one, is read from the environment. A final full stop does not
    make a reply evasive: chat models write "Yes."
    """

    url: str
    model: str
    timeout_seconds: float = 60.0

    @property
    def name(self) -> str:
        return f"{self.url}#{self.model}"

    def __call__(self, inquiries: Sequence[Inquiry]) -> Iterator[str]:
        for one in inquiries:
            yield self._reply(one.prompt).strip().removesuffix(".")

    def _reply(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": _MAX_TOKENS,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as e:
            raise DataError(
                f"judge {self.name}: {e}; run the same command again (with --json it resumes "
                "from here: replies so far are kept)"
            ) from e


def make_judge(text: str) -> Judge:
    """A judge from a user's description: `http(s)://HOST/v1#MODEL`, or a path or hub name.

    Raises:
        DataError: A URL without a model.
    """
    if text.startswith(("http://", "https://")):
        url, _, model = text.partition("#")
        if not model:
            raise DataError(f"judge {text!r}: name the model too, as {text}#MODEL")
        return EndpointJudge(url, model)
    return SequenceJudge(text)
