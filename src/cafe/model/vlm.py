"""The one model class: a pretrained vision-language model that encodes, generates and scores.

`CAFe` wraps a transformers model and its processor. Its `forward` turns rows into hidden states
and knows nothing of losses; `encode`, `generate` and `score` are what a user calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cafe.errors import FamilyError
from cafe.model import inference
from cafe.model.attention import WhileDecoding, layer_windows
from cafe.model.best_of import candidates
from cafe.model.checkpoint import load_pretrained, save_checkpoint
from cafe.model.collate import Collator
from cafe.model.families import family_of
from cafe.model.inference import match_question
from cafe.model.inputs import EncodeOptions, Input, as_conversation, as_messages, is_many
from cafe.model.last_layer import prepare, read_only_at
from cafe.model.masks import attention_masks
from cafe.model.precision import PRECISIONS, Precision, quantized
from cafe.model.prompts import DEFAULT_PROMPT, turn_end
from cafe.model.rerank import Reranked, reranked, trained_temperature
from cafe.model.rows import Rows
from cafe.model.workers import Source, encode_on

Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2"]


class CAFe(nn.Module):
    """A vision-language model for retrieval and for answers.

    Attributes: `model` (transformers' `…ForConditionalGeneration`), `processor`, `family`,
    `collator` (how inputs become rows), `source` (what it was loaded from; None: it was built).
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, *, source: Source | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.processor = processor
        self.source = source
        self.family = family_of(model.config)
        self._windows = layer_windows(model.config)
        self._decoding = WhileDecoding(model.config)
        prepare(model.get_decoder())
        alone = model.config._attn_implementation == "flash_attention_2"
        if alone and self.family.pictures_see_themselves:
            raise FamilyError(
                f"model type {self.family.model_type!r}: the tokens of a picture see each other, "
                "which flash_attention_2 cannot do; use sdpa or flex_attention"
            )
        unused = self.family.unused(model.config)
        for name, parameter in model.named_parameters():
            if name.startswith(unused):
                parameter.requires_grad_(False)
        self.collator = Collator(
            processor=processor,
            family=self.family,
            pooled_token=turn_end(processor),
            max_tokens=_context_tokens(model),
            sharing="none" if alone else "trie",
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: Attention = "sdpa",
        adapter: str | Path | None = None,
    ) -> CAFe:
        """Load a directory, a hub id, or "tiny" (the base that ships with the package).

        dtype     of the weights; None: float32 on CPU, bfloat16 on a GPU
        adapter   a directory or hub id of LoRA or DoRA weights for this model; an adapter that
                  names its base can be loaded by itself
        Raises CheckpointError when there is no model there or its weights do not fit;
        FamilyError for a family without facts.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        model, processor = load_pretrained(
            name_or_dir, dtype=dtype, attention=attention, adapter=adapter
        )
        source = Source(name_or_dir, attention, adapter)
        return cls(model, processor, source=source).to(device).eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write one directory for every tool: transformers, sentence-transformers, vLLM, cafe."""
        save_checkpoint(self.model, self.processor, self.collator, Path(directory))

    # ------------------------------------------------------------------ rows -> states

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def embedding_dimension(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def token_cost(self) -> float:
        """What a token costs in the matrices, in tokens that it could attend to instead.

        A layer's matrices are about 12 width² multiplications for a token, attention is 2 width
        for each pair of tokens; and it is taken to run at a third of the speed (an estimate).
        """
        return 2.0 * self.embedding_dimension

    @property
    def lm_head(self) -> nn.Linear:
        return self.model.lm_head

    @property
    def logit_softcap(self) -> float | None:
        """Gemma bounds its logits; others do not."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def read(self, rows: Rows, vision: dict[str, Tensor], places: Tensor | None = None) -> Tensor:
        """States at some places, [n, hidden]; the last layer computes no others.

        places   int64 [n], flat indices row * t + token; None: the pooled ones
        """
        device = self.device
        rows = rows.to(device)
        places = rows.pooled if places is None else places.to(device)
        with read_only_at(places, rows.input_ids.shape):
            hidden = self(rows, {name: tensor.to(device) for name, tensor in vision.items()})
        return hidden.flatten(0, 1)[places]

    def forward(self, rows: Rows, vision: dict[str, Tensor]) -> Tensor:
        """Rows and their pictures -> hidden states after the final norm.

        Returns float [rows, t, hidden]; each state is the one that its sequence would have had
        alone (`cafe.model.trie`). The vision tower runs once per distinct picture.
        """
        features = self._features(vision)
        hidden = self.model.model(
            input_ids=rows.input_ids,
            attention_mask=attention_masks(rows, self.model, self._windows),
            position_ids=rows.positions,
            mm_encoder_outputs=self._in_order(features, rows),
            use_cache=False,
        ).last_hidden_state
        shown = {*rows.image_order.tolist(), *rows.video_order.tolist()}
        unused = set(range(len(features))) - shown
        if unused and torch.is_grad_enabled():
            # Every rank runs the tower's backward, or the others wait for its gradients.
            hidden = hidden + 0 * sum(features[i].sum() for i in unused)
        return hidden

    def encoder_outputs(self, rows: Rows, vision: dict[str, Tensor]) -> dict[str, Any]:
        """Picture features as transformers' forward and `generate` take them, in row order."""
        return self._in_order(self._features(vision), rows)

    def _in_order(self, features: list[Tensor], rows: Rows) -> dict[str, Any]:
        def shown(order: Tensor) -> list[Tensor]:
            return [features[i] for i in order.tolist()]

        outputs: dict[str, Any] = {}
        if len(rows.image_order):
            pictures = shown(rows.image_order)
            outputs["image"] = self.family.encoder_output(pictures, self.embedding_dimension)
        if len(rows.video_order):
            videos = shown(rows.video_order)
            outputs["video"] = self.family.video_output(videos, self.embedding_dimension)
        return outputs

    def _features(self, vision: dict[str, Tensor]) -> list[Tensor]:
        if not vision:
            return []
        dtype = self.model.dtype
        return self.family.image_features(
            self.model.model,
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in vision.items()},
        )

    # ------------------------------------------------------------------ what users call

    @overload
    def encode(
        self,
        inputs: Sequence[Input] | Input,
        *,
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray: ...
    @overload
    def encode(
        self,
        inputs: Sequence[Input] | Input,
        *,
        convert_to_tensor: Literal[True],
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...
    def encode(
        self,
        inputs: Sequence[Input] | Input,
        *,
        batch_size: int = 32,
        normalize: bool = True,
        truncate_dim: int | None = None,
        prompt_name: str = DEFAULT_PROMPT,
        precision: Precision = "float32",
        ranges: np.ndarray | None = None,
        convert_to_tensor: bool = False,
        devices: Sequence[str | torch.device] = (),
        show_progress_bar: bool = False,
    ) -> np.ndarray | Tensor:
        """Embed strings, pictures, paths, {"text", "image"} dicts and chat messages, mixed.

        normalize      to unit length (after truncation)
        truncate_dim   keep the first so many coordinates (Matryoshka)
        prompt_name    "compress" (default) or "none" (the instruction is in the text)
        precision      float32, float16, int8, uint8, binary or ubinary (`cafe.model.precision`)
        ranges         [2, d] for int8 and uint8: lowest and highest value of each dimension;
                       None: those of these inputs
        convert_to_tensor   a tensor on the model's device, not an array
        devices        a process with a copy of the model on each: ["cuda:0", "cuda:1"], or
                       ["cpu"] * 4; none: this process
        Returns [n, d] in input order, float32 unless `precision` says otherwise; [d] for a single
        input. A list of chat messages is a single input: one conversation.
        Raises DataError, naming the input, for one that cannot be read or is too long; WorkerError
        when one of several processes dies.
        """
        width = self.embedding_dimension if truncate_dim is None else truncate_dim
        if not 1 <= width <= self.embedding_dimension:
            raise ValueError(f"truncate_dim={width}: use 1 to {self.embedding_dimension}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}: use one of {', '.join(PRECISIONS)}")
        asked, many = as_messages(inputs), is_many(inputs)
        device = self.device if convert_to_tensor else "cpu"
        with inference.progress("encode", len(asked), show_progress_bar) as done:
            if devices:
                found = encode_on(devices, self, asked, batch_size, prompt_name, done)
            else:
                found = inference.encode(
                    self, asked, batch_size, prompt_name, device=device, done=done
                )
        found = found[:, :width]
        if normalize:
            found = torch.nn.functional.normalize(found, dim=1)
        found = found if many else found[0]
        if precision == "float32":
            return found.to(device) if convert_to_tensor else found.numpy()
        less = quantized(found.cpu().numpy(), precision, ranges)
        return torch.from_numpy(less).to(device) if convert_to_tensor else less

    def generate(
        self,
        messages: Any,
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        best_of: int | None = None,
        batch_size: int = 32,
        **sampling: Any,
    ) -> str | list[str] | Iterator[str]:
        """Answer a conversation (str), several (list[str]), or stream one (iterator of text).

        messages   a string, a picture, a {"text", "image"} dict, chat messages, or a list of these
        best_of    sample so many answers (temperature 0.6 unless given), and of these and the
                   greedy one return the one that, by the model's own embedding and judgement, fits
                   the conversation's pictures best (`cafe.model.best_of`)
        sampling   passed to transformers' `generate` (temperature, top_p, …); greedy without
        """
        conversations = as_messages(messages)
        if stream:
            if len(conversations) != 1 or best_of is not None:
                raise ValueError("stream=True answers one conversation at a time, without best_of")
            return inference.stream(self, conversations[0], max_new_tokens, sampling)
        if best_of is not None:
            ranked = candidates(self, conversations, best_of, max_new_tokens, batch_size, sampling)
            answers = [found[0].text for found in ranked]
        else:
            answers = inference.generate(self, conversations, max_new_tokens, batch_size, sampling)
        return answers if is_many(messages) else answers[0]

    def decode(self, **inputs: Any) -> Tensor:
        """What transformers' `generate` gives, by an attention that can decode."""
        with self._decoding:
            return self.model.generate(**inputs)

    def score(
        self, query: Input, candidates: Sequence[Input], *, batch_size: int = 32
    ) -> np.ndarray:
        """How well each candidate matches the query: the probability of "yes" to that question.

        One side is a picture and the other is text (else DataError). Returns float32 [n]. Texts
        about one picture share its features and its tokens. To order what a search found, use
        `rerank`, which also weighs the embeddings.
        """
        return self._match_odds(query, candidates, batch_size).sigmoid().numpy()

    def rerank(
        self,
        query: Input,
        candidates: Sequence[Input],
        cosines: np.ndarray | None = None,
        *,
        batch_size: int = 32,
    ) -> Reranked:
        """How likely each candidate is the one meant, by its embedding and by `score` together.

        cosines   [n] of the query with the candidates, as a search gave them; None: embed them now
        Returns `match` (as `score`) and `posterior`, which orders best (`cafe.model.rerank`).
        Raises DataError as `score` does; ValueError for so many cosines and so many candidates.
        """
        odds = self._match_odds(query, candidates, batch_size).numpy()
        if cosines is None:
            both = [as_conversation(query), *as_messages(candidates)]
            near = self.encode(both, batch_size=batch_size)
            cosines = near[1:] @ near[0]
        return reranked(np.asarray(cosines), odds, trained_temperature(self.model.config))

    def _match_odds(self, query: Input, candidates: Sequence[Input], batch_size: int) -> Tensor:
        asked = as_conversation(query)
        questions = [match_question(asked, found) for found in as_messages(candidates)]
        return inference.log_odds(self, questions, batch_size)

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarity of every row of a [n, d] with every row of b [m, d]: [n, m]."""
        a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
        b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-12)
        return a @ b.T

    def embedding_contract(self) -> dict[str, str]:
        """What an embedding is read from, for people and for `cafe doctor`.

        The prompts, token counts and pooled tokens of an example text and an example picture.
        """
        size = (384, 384)
        contract: dict[str, str] = {}
        for kind, example in {"text": "a red mug", "image": PIL.Image.new("RGB", size)}.items():
            conversation = as_conversation(example)
            rendered = self.collator.render.embedding(conversation, DEFAULT_PROMPT)
            rows, _ = self.collator.embedding_rows([conversation])
            pooled = rows.input_ids.flatten()[rows.pooled]
            contract |= {
                f"embedding prompt ({kind})": rendered.text,
                f"tokens ({kind})": str(rows.input_ids.shape[1]),
                f"pooled token ({kind})": self.processor.tokenizer.decode(pooled),
            }
        return {
            **contract,
            "dimension": str(self.embedding_dimension),
            "max tokens": str(self.collator.max_tokens),
        }


def _context_tokens(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 4096))
