"""A model card: what a checkpoint directory is, how each tool loads it, and what was measured.

Only measured numbers are written; where there are none, the card says how to get them. The YAML
front matter is the hub's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

HEAD = {
    "library_name": "transformers",
    "pipeline_tag": "image-text-to-text",
    "tags": ["sentence-transformers", "feature-extraction", "multimodal-embeddings", "cafe"],
}

USE = """\
## Use

One directory, two roles: it embeds and it answers. An embedding is {read}
of the chat template `embedding`, scaled to unit length.

```python
from pathlib import Path

from cafe import CAFe

model = CAFe.from_pretrained("{name}")
model.encode(["a red mug", Path("a.png")])  # float32 [2, {dimension}]
model.generate({{"image": Path("a.png"), "text": "Describe this image."}})
```

```python
from PIL import Image
from sentence_transformers import SentenceTransformer  # 6.2 or later

SentenceTransformer("{name}").encode(["a red mug", Image.open("a.png")])
```

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")  # the language head is there
processor = AutoProcessor.from_pretrained("{name}")
template = Path("{name}/embedding_template.jinja").read_text()
inputs = processor.apply_chat_template(messages, chat_template=template, tokenize=True,
                                       return_dict=True, return_tensors="pt")
embedding = model.model(**inputs).last_hidden_state{states}  # then divide by its length
```

```bash
cafe serve {name}  # OpenAI's embeddings and chat, and rerank, from one copy of the weights
```
"""

VLLM = """\
### vLLM

vLLM runs one role per process:

```bash
vllm serve {name} --runner generate                # chat
vllm serve {name} --runner pooling \\
  --chat-template {name}/embedding_template.jinja  # embeddings
```

Without `--runner` it embeds, because of `modules.json`, which is also where it reads pooling and
normalization; the embedding prompt it does not read there. So without `--chat-template` embeddings
differ. Send texts as `messages` too, because vLLM applies no template to a plain `input`.
"""

VLLM_MEAN = """\
### vLLM

vLLM serves chat (`--runner generate`). It has no pooling over some of the tokens, so its embeddings
would differ."""

NOT_FLOAT32 = """\
On a CPU `cafe` computes in float32. The other tools compute in the type of the weights, {weights},
unless they are told: `model_kwargs={{"dtype": "float32"}}` for sentence-transformers,
`dtype="float32"` for transformers."""

NO_RESULTS = """\
No results were provided. To add them, run `cafe evaluate {name} --json results`, then
`cafe export … --results results`.
"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close a tool's embeddings of the probes are to cafe's.

    tool      name and version
    cosine    smallest cosine similarity of a probe's two embeddings
    distance  largest distance between a probe's two unit vectors
    """

    tool: str
    cosine: float
    distance: float


@dataclass(frozen=True, slots=True)
class CardTask:
    """Results of one task.

    name       of the task
    samples    number of samples measured
    scores     by name
    intervals  95 % intervals of the scores that have one
    """

    name: str
    samples: int
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def model_card(
    name: str,
    dimension: int,
    facts: Mapping[str, str],
    agreements: Sequence[Agreement],
    tasks: Sequence[CardTask],
    averages: int = 0,
) -> str:
    """The model card as Markdown.

    Args:
        name: What loads the model: a folder's name or a hub id.
        dimension: Of an embedding.
        facts: What else is known about the model: family, parameters, …
        agreements: How close other tools' embeddings are to cafe's.
        tasks: Measured results.
        averages: How many latent tokens' states an embedding is the mean of; 0: it is the last
            token's state.
    """
    if averages:
        read = f"the mean state of the {averages} tokens before the last"
        states = f"[:, {-1 - averages}:-1].mean(1)"
    else:
        read, states = "the hidden state at the last token", "[:, -1]"
    weights = facts.get("weights", "float32")
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    parts = [
        f"---\n{yaml.safe_dump(HEAD, sort_keys=False)}---",
        f"# {name}",
        "A vision-language model that retrieves, reranks and answers, written by `cafe export`.",
        f"| | |\n|---|---|\n{rows}",
        USE.format(name=name, dimension=dimension, read=read, states=states).rstrip(),
        "" if weights == "float32" else NOT_FLOAT32.format(weights=weights),
        VLLM_MEAN if averages else VLLM.format(name=name).rstrip(),
        "## Measured",
        _agreement_table(agreements),
        *([_task_table(task) for task in tasks] or [NO_RESULTS.format(name=name).rstrip()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _agreement_table(agreements: Sequence[Agreement]) -> str:
    if not agreements:
        return ""
    lines = [f"| {a.tool} | {a.cosine:.7f} | {a.distance:.1e} |" for a in agreements]
    return "\n".join(
        [
            "Other tools' embeddings of the same probes, compared with cafe's (float32):",
            "",
            "| tool | smallest cosine | largest distance |",
            "|---|---|---|",
            *lines,
        ]
    )


def _task_table(task: CardTask) -> str:
    lines = []
    for score, value in task.scores.items():
        low, high = task.intervals.get(score, (None, None))
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        lines.append(f"| {score} | {value:.4f} | {interval} |")
    head = f"### {task.name} ({task.samples:,} samples)"
    return "\n".join([head, "", "| score | value | 95 % interval |", "|---|---|---|", *lines])
