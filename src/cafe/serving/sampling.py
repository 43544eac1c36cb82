"""How the next token of each answer is chosen: penalties, biases, temperature, top-k, nucleus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from cafe.errors import DataError
from cafe.serving.constrained import JsonMatcher
from cafe.serving.messages import Prompt, TokenLogProb

MIN_TEMPERATURE = 1e-4
"""Below this temperature decoding is greedy (dividing by it would overflow)."""


@dataclass(eq=False, slots=True)
class RowSampler:
    """Chooses the tokens of one answer that are not simply the most probable ones.

    A seed gives the same tokens whatever the other rows of the batch are.

    prompt      whose settings count
    tokens      int64 [1, t], of the prompt and of the answer so far
    begin       where the answer begins in them
    processors  of generation_config.json, as plain `generate` applies them
    generator   of its sampling; None: it is greedy
    logprobs    of its tokens so far; None: not wanted
    matcher     where it is in the JSON that it must be; None: any text
    """

    prompt: Prompt
    tokens: Tensor
    begin: int
    processors: Sequence[Any]
    generator: torch.Generator | None
    logprobs: list[TokenLogProb] | None
    matcher: JsonMatcher | None

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        tokens: Sequence[int],
        device: torch.device,
        processors: Sequence[Any] = (),
    ) -> Self | None:
        """The sampler of a prompt with these tokens; None: its answer is simply greedy."""
        generator = None
        if prompt.temperature >= MIN_TEMPERATURE:
            generator = torch.Generator(device)
            if prompt.seed is None:
                generator.seed()
            else:
                generator.manual_seed(prompt.seed)
        wanted = None if prompt.logprobs is None else []
        # A copy: a batch that fails before its first token is begun again.
        matcher = None if prompt.matcher is None else prompt.matcher.copy()
        changed = prompt.bias or prompt.frequency or prompt.presence or matcher is not None
        if generator is None and wanted is None and not changed and not processors:
            return None
        ids = torch.tensor([list(tokens)], device=device)
        return cls(prompt, ids, len(tokens), processors, generator, wanted, matcher)

    def __call__(self, scores: Tensor) -> int:
        """The next token, by its logits [vocabulary].

        Raises:
            DataError: A bias is of a token that is not in the vocabulary.
        """
        own, prompt = scores[None], self.prompt
        for processor in self.processors:
            own = processor(self.tokens, own)
        own = own[0]
        logits = adjusted(own, self.tokens[0, self.begin :], prompt)
        if self.matcher is not None:
            logits = self.matcher.mask(logits)
        if self.generator is None:
            chosen = int(logits.argmax())
        else:
            p = probabilities(logits, prompt.temperature, prompt.top_p, prompt.top_k)
            chosen = int(torch.multinomial(p, 1, generator=self.generator))
        if self.matcher is not None:
            self.matcher.take(chosen)
        if self.logprobs is not None:
            self.logprobs.append(_log_probs(own, chosen, prompt.logprobs or 0))
        self.tokens = torch.cat([self.tokens, self.tokens.new_tensor([[chosen]])], dim=1)
        return chosen


def adjusted(logits: Tensor, answer: Tensor, prompt: Prompt) -> Tensor:
    """Logits with the prompt's biases and penalties, as OpenAI defines these.

    Args:
        logits: [vocabulary].
        answer: The tokens of the answer so far, [n].
        prompt: Whose settings count.

    Returns:
        [vocabulary]: logit + bias - times in the answer * frequency - presence if it is there.

    Raises:
        DataError: A bias is of a token that is not in the vocabulary.
    """
    if prompt.bias:
        ids = torch.tensor(list(prompt.bias), device=logits.device)
        if int(ids.max()) >= len(logits):
            raise DataError(f"logit_bias: the model has no token {int(ids.max())}")
        values = torch.tensor(list(prompt.bias.values()), device=logits.device, dtype=logits.dtype)
        logits = logits.index_add(0, ids, values)
    if prompt.frequency or prompt.presence:
        counts = torch.zeros_like(logits).index_add(
            0, answer, torch.ones(len(answer), device=logits.device, dtype=logits.dtype)
        )
        logits = logits - prompt.frequency * counts - prompt.presence * (counts > 0)
    return logits


def _log_probs(logits: Tensor, chosen: int, count: int) -> TokenLogProb:
    """Of the chosen token, and of the `count` most probable ones."""
    log_p = logits.float().log_softmax(-1)
    values, ids = log_p.topk(min(count, len(log_p)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogProb(chosen, float(log_p[chosen]), top)


def probabilities(scores: Tensor, temperature: float, top_p: float, top_k: int = 0) -> Tensor:
    """Nucleus (top-p) sampling probabilities of one row, without renormalisation.

    The nucleus is the smallest set of most probable tokens whose probabilities reach `top_p`
    (Holtzman et al., "The Curious Case of Neural Text Degeneration", section 3.1).

    Args:
        scores: Logits [vocabulary].
        temperature: Divides the logits; above 0.
        top_p: Probability mass of the nucleus; 0 keeps the most probable token only.
        top_k: Number of most probable tokens that are left before that; 0: all.

    Returns:
        Softmax of scores / temperature [vocabulary], 0 outside the nucleus.
    """
    if 0 < top_k < len(scores):
        ids = scores.topk(top_k).indices
        scores = torch.full_like(scores, -torch.inf).index_copy(0, ids, scores[ids])
    p = ((scores - scores.max()) / temperature).softmax(-1)
    if top_p >= 1:
        return p
    ordered, order = p.sort(descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    outside[0] = False  # top_p = 0 keeps the most probable token
    return p.scatter(-1, order, ordered.masked_fill(outside, 0.0))
