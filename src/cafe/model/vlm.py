"""The one model class: a pretrained vision-language model that encodes, generates and scores.

`CAFe` wraps a transformers model and its processor. Its `forward` turns rows into hidden states
and knows nothing of losses; `encode`, `generate` and `score` are what a user calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cafe.model import inference, judging
from cafe.model.attention import SdpaWhileGenerating, layer_windows, row_sharing
from cafe.model.best_of import best
from cafe.model.captions import CAPTION_TOKENS, CAPTION_WEIGHT, write_captions
from cafe.model.checkpoint.directory import load_pretrained, save_checkpoint, with_protocol
from cafe.model.encoding import Encoding, encode_inputs
from cafe.model.families import family_of
from cafe.model.families.base import distinct_features
from cafe.model.hearing import allow_given_audio
from cafe.model.hidden import features_of_rows, hidden_states
from cafe.model.inference import Vision
from cafe.model.last_layer import compute_last_layer_at, prepare
from cafe.model.latent import averaged_tokens, latent_text
from cafe.model.quantization import EmbeddingPrecision
from cafe.model.rerank import RerankBy, Reranked, reranked, trained_temperature
from cafe.model.rows.collate import Collator
from cafe.model.rows.inputs import EncodeOptions, Input, Inputs, as_messages, is_many
from cafe.model.rows.inspect import embedding_contract
from cafe.model.rows.prompts import DEFAULT_PROMPT, TrainedPrompts, own_prompt, turn_end
from cafe.model.rows.protocol import Protocol
from cafe.model.rows.rows import Rows
from cafe.model.stateful import allow_branches
from cafe.model.token_vectors import TokenEncoder
from cafe.model.workers import ModelSource
from cafe.precision import warn_if_emulated

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2"]


class CAFe(TokenEncoder, nn.Module):
    """A vision-language model for retrieval and for answers.

    Building one changes the transformers model: parameters that no forward reads are frozen, as
    they get no gradient; the last language layer gets the hooks that `hidden_at` needs.

    model      transformers' `...ForConditionalGeneration`, with its `processor`
    family     the facts of its model family
    collator   turns inputs into rows
    source     what it was loaded from; None: it was built
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, *, source: ModelSource | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.processor = processor
        self.source = source
        self.family = family_of(model.config)
        self._trained_prompts = TrainedPrompts(model.config)
        self._windows = layer_windows(model.config)
        allow_branches(model.get_decoder())
        allow_given_audio(model.model, self.family)
        self._sdpa_while_generating = SdpaWhileGenerating(model.config)
        prepare(model.get_decoder())
        for name, parameter in model.named_parameters():
            if name.startswith(self.family.unused(model.config)):
                parameter.requires_grad_(False)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", 4096)
        self.collator = Collator(
            processor=processor,
            family=self.family,
            pooled_token=turn_end(processor),
            max_tokens=int(context),
            sharing=row_sharing(model.config, self.family),
            own_prompt=own_prompt(model.config),
            latent=latent_text(model.config, processor.tokenizer),
            averages=averaged_tokens(model.config),
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
        protocol: str | Protocol | None = None,
    ) -> CAFe:
        """Load a model for inference or training.

        >>> CAFe.from_pretrained("tiny", device="cpu").embedding_dimension
        256

        Args:
            name_or_dir: a directory, a hub id (owner/name), or "tiny", the small model that ships
                with the package. An adapter that names its base is loaded on that base.
            dtype: of the weights; None: float32 on a CPU, bfloat16 on a GPU.
            device: None: a GPU where there is one.
            attention: the language model's attention kernel.
            adapter: directory or hub id of LoRA or DoRA weights.
            protocol: how embeddings are asked for (`cafe.model.rows.protocol`); None: as the
                model's own files say.

        Raises:
            CheckpointError: there is no model, or its weights do not match its configuration.
            FamilyError: the model's family is not supported.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        if dtype == torch.bfloat16:
            warn_if_emulated(device)
        loaded = load_pretrained(name_or_dir, dtype=dtype, attention=attention, adapter=adapter)
        vlm = cls(*loaded, source=ModelSource(cls.from_pretrained, name_or_dir, attention, adapter))
        origin = (vlm.model.config, name_or_dir, adapter, protocol)
        vlm.collator = with_protocol(vlm.collator, *origin)
        return vlm.to(device).eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write one directory for every tool: transformers, sentence-transformers, vLLM, cafe.

        >>> CAFe.from_pretrained("tiny").save_pretrained("my-model")
        >>> model = CAFe.from_pretrained("my-model")

        With an adapter it is an adapter directory, in peft's format.
        """
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
        """The cost of one token's matrix products, in tokens attended to at the same cost.

        A layer's matrices take about 12 width² multiplications per token, and attention, at a
        third of the speed, 2 width per pair of tokens: 12 width² / (3 * 2 width).
        """
        return 2.0 * self.embedding_dimension

    @property
    def lm_head(self) -> nn.Linear:
        return self.model.lm_head

    @property
    def logit_softcap(self) -> float | None:
        """The bound of the logits' absolute value (Gemma); None: unbounded."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def hidden_at(
        self, rows: Rows, vision: Vision, token_indices: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n hidden"]:
        """Final hidden states at some tokens; the last layer computes no others.

        Args:
            rows: on any device.
            vision: the vision tower's inputs, on any device.
            token_indices: flat indices, row * t + token; None: the rows' embeddings.
        """
        device, rows = self.device, rows.to(self.device)
        at = rows.embedded_at if token_indices is None else token_indices.to(device)[:, None]
        with compute_last_layer_at(at.flatten(), rows.input_ids.shape):
            hidden = self(rows, {name: tensor.to(device) for name, tensor in vision.items()})
        return hidden.flatten(0, 1)[at].mean(dim=1)

    def forward(
        self, rows: Rows, vision: Vision, *, read_only: bool = False
    ) -> Float[Tensor, "rows t hidden"]:
        """Hidden states after the final norm.

        Each state equals the one that its sequence has in a row of its own
        (`cafe.model.rows.trie`). The vision tower runs once per distinct image.

        Args:
            rows: on the model's device.
            vision: the vision tower's inputs, on the model's device.
            read_only: only the states at `rows.read` are needed; the last layer computes no others
                where that can be (`cafe.model.last_layer`).
        """
        return hidden_states(
            self.model, self.family, self._windows, rows, vision, read_only=read_only
        )

    def encoder_outputs(self, rows: Rows, vision: Vision) -> dict[str, Any]:
        """Image features as transformers' forward and `generate` take them, in row order."""
        features = distinct_features(self.family, self.model, vision)
        return features_of_rows(self.model, self.family, features, rows)

    # ------------------------------------------------------------------ what users call

    @overload
    def encode(
        self,
        inputs: Inputs,
        *,
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray: ...
    @overload
    def encode(
        self, inputs: Inputs, *, convert_to_tensor: Literal[True], **options: Unpack[EncodeOptions]
    ) -> Tensor: ...
    def encode(
        self,
        inputs: Inputs,
        *,
        batch_size: int = 32,
        normalize: bool = True,
        truncate_dim: int | None = None,
        prompt_name: str = DEFAULT_PROMPT,
        precision: EmbeddingPrecision = "float32",
        ranges: np.ndarray | None = None,
        caption: bool | Sequence[str | None] = False,
        caption_weight: float = CAPTION_WEIGHT,
        think: int | Sequence[str | None] = 0,
        convert_to_tensor: bool = False,
        devices: Sequence[str | torch.device] = (),
        show_progress_bar: bool = False,
    ) -> np.ndarray | Tensor:
        """Embed strings, images, paths, {"text", "image"} dicts and chat messages, mixed.

        >>> CAFe.from_pretrained("tiny").encode(["a red mug", Path("mug.png")]).shape
        (2, 256)

        Args:
            inputs: one or several. A list of chat messages is one input.
            batch_size: inputs per forward.
            normalize: to unit length, after truncation.
            truncate_dim: keep this many leading coordinates (Matryoshka).
            prompt_name: "compress" (as the model was trained) or "none" (the text says it all).
            precision: float32, float16, int8, uint8, binary, ubinary (`cafe.model.quantization`).
            ranges: [2, d], bounds of int8 and uint8 values; None: those of these inputs.
            caption: average the embedding of an image without words with that of the caption that
                the model writes of it, which finds more (`cafe.model.captions`). Or the captions,
                one string or None for each input (`write_captions`).
            caption_weight: the caption's share of that average, 0 to 1.
            think: read the embedding of an image after what the model says of it in at most this
                many tokens (objective.thought_weight trains it). Or the thoughts, as `caption`.
            convert_to_tensor: return a tensor on the model's device, not an array.
            devices: a process with a copy of the model on each (["cuda:0", …]); empty: this one.
            show_progress_bar: on stderr.

        Returns:
            [n, d] in input order, [d] for a single input; float32 unless `precision` differs.

        Raises:
            DataError: an input that cannot be read or is too long; the message names it.
            WorkerError: a process on one of `devices` died.
        """
        self._trained_prompts.check(prompt_name)
        options = Encoding(
            batch_size, normalize, truncate_dim, prompt_name, precision, ranges, caption,
            caption_weight, think, devices, show_progress_bar,
        )  # fmt: skip
        device = self.device if convert_to_tensor else torch.device("cpu")
        vectors = encode_inputs(self, self.source, inputs, options, device)
        return vectors if convert_to_tensor else vectors.numpy()

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
        """Answer one conversation or several.

        >>> image = PIL.Image.new("RGB", (96, 96), "red")  # and the model is "tiny"
        >>> model.generate({"image": image, "text": "Is there a dog in the picture?"})
        'no'

        Args:
            messages: a string, image, {"text", "image"} dict, chat messages, or a list of these.
            max_new_tokens: the longest answer.
            stream: return an iterator over the pieces of one answer.
            best_of: sample this many answers (temperature 0.6 by default) and return, of these and
                the greedy one, the answer that fits the images best (`cafe.model.best_of`).
            batch_size: conversations per forward.
            **sampling: for transformers' `generate` (temperature, top_p, ...), in place of what
                generation_config.json says; without it, or with temperature=0, greedy.

        Returns: a string, a list of strings for a list of inputs, or an iterator with `stream`.
        """
        conversations = as_messages(messages)
        if stream:
            if len(conversations) != 1 or best_of is not None:
                raise ValueError("stream=True answers one conversation at a time, without best_of")
            return inference.stream(self, conversations[0], max_new_tokens, sampling)
        if best_of is not None:
            answers = best(self, conversations, best_of, max_new_tokens, batch_size, sampling)
        else:
            answers = inference.generate(self, conversations, max_new_tokens, batch_size, sampling)
        return answers if is_many(messages) else answers[0]

    def write_captions(
        self, inputs: Inputs, *, max_new_tokens: int = CAPTION_TOKENS, batch_size: int = 32
    ) -> list[str | None]:
        """Describe each image that stands without words of its own, greedily, for `encode`.

        >>> [type(caption).__name__ for caption in model.write_captions([image, "a text"])]
        ['str', 'NoneType']

        Returns:
            One caption for each input; None for one that has text, or if the model says nothing.
        """
        return write_captions(self, as_messages(inputs), batch_size, max_new_tokens)

    def generate_tokens(self, **inputs: Any) -> Int[Tensor, "rows t"]:
        """Token ids from transformers' `generate`, with a kernel that can decode step by step."""
        with self._sdpa_while_generating:
            return self.model.generate(**inputs)

    def score(
        self, query: Input, candidates: Sequence[Input], *, batch_size: int = 32
    ) -> Float[np.ndarray, " n"]:
        """How well each candidate matches the query, each by itself; `rerank` orders them better.

        >>> model.score(image, ["a dog", "an empty scene"]).round(2)  # as in `generate`
        array([0.01, 0.04], dtype=float32)

        Args:
            query: text, image or both. The question is trained for an image and a text only.
            candidates: what to judge; anything, too (`cafe.model.rows.matching.pair_question`).
            batch_size: pairs per forward.

        Returns:
            The probability of "yes" to the matching question, float32.
        """
        odds = judging.judge(self, query, candidates, batch_size, "question")
        return odds.sigmoid().numpy()

    def rerank(
        self,
        query: Input,
        candidates: Sequence[Input],
        cosines: Float[np.ndarray, " n"] | None = None,
        *,
        by: RerankBy = "question",
        batch_size: int = 32,
    ) -> Reranked:
        """Judge candidates by their embeddings, and by what the model says of each pair.

        >>> model.rerank(image, ["a red square", "a blue dog"]).posterior.round(2)
        array([0.61, 0.39])

        Args:
            query: as for `score`.
            candidates: what to judge.
            cosines: of the query with the candidates, from a search; None: embed them now.
            by: `score`'s question; or "likelihood", of the text as the caption of the image.
            batch_size: as in `score`.

        Returns:
            `posterior`, which orders best, and `match` (as `score`) or `log_likelihood`; [n] each.
        """
        judged = judging.judge(self, query, candidates, batch_size, by).numpy()
        if cosines is None:
            both = [*as_messages([query]), *as_messages(candidates)]
            vectors = self.encode(both, batch_size=batch_size)
            cosines = vectors[1:] @ vectors[0]
        return reranked(np.asarray(cosines), judged, trained_temperature(self.model.config), by)

    @staticmethod
    def similarity(
        a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
    ) -> Float[np.ndarray, "n m"]:
        """Cosine similarity of every row of `a` with every row of `b`.

        >>> CAFe.similarity(np.array([[3.0, 4.0]]), np.array([[6.0, 8.0], [4.0, -3.0]])).round(2)
        array([[1., 0.]])
        """
        a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
        b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-12)
        return a @ b.T

    def embedding_contract(self) -> dict[str, str]:
        """What an embedding is read from, for people and for `cafe doctor`."""
        return embedding_contract(self.collator, self.embedding_dimension, self.model.config)
