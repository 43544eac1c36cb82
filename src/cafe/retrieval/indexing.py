"""A source becomes an index, or an index follows its source; the model's facts are checked first.

An index holds the vectors of one model only. Whether a model is that one is read from its files
before its weights are loaded, so that a mistake costs a second and not a minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafe.data.quarantine import log_skipped
from cafe.documents import MAX_PAGES
from cafe.errors import CheckpointError, DataError
from cafe.index import (
    APPROXIMATE_ROWS,
    Approximate,
    Index,
    ModelFacts,
    Origin,
    Report,
    sync,
)
from cafe.index.fingerprint import prompt_fingerprint, weights_fingerprint
from cafe.index.store import one_run
from cafe.progress import progress_bar
from cafe.retrieval.documents import at_size, has_pages, size_of_pages
from cafe.retrieval.multi_vector import checked_pool, token_encoder, with_tokens
from cafe.retrieval.own_words import OwnWords
from cafe.retrieval.sources import Listing, list_items

if TYPE_CHECKING:
    import numpy as np

    from cafe.model.vlm import CAFe

MEASURED_QUERIES = 100
"""Number of captions that are embedded as queries to measure an approximate index."""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What `build_index` did.

    uri           of the index
    rows          that it holds now
    changes       counts of added, changed, moved, unchanged and deleted rows; what was skipped
    approximate   the settings of an approximate search and its measured recall; None: search is
                  exact
    left_out      files of a folder that are no images, by kind -> number of them

    >>> from cafe import build_index
    >>> report = build_index("tiny", "photos", "photos.index")
    >>> report.rows, report.changes.added, report.changes.skipped
    (4, 4, [])
    >>> build_index("tiny", "photos", "photos.index").changes.unchanged
    4
    """

    uri: str
    rows: int
    changes: Report
    approximate: Approximate | None
    left_out: Counter[str] = field(default_factory=Counter)


def build_index(
    model: CAFe | str | Path,
    source: str | Path,
    to: str | Path,
    *,
    caption: bool | None = None,
    think: int | None = None,
    writer: CAFe | str | Path | None = None,
    multi_vector: float | None = None,
    page_pixels: int | None = None,
    max_pages: int = MAX_PAGES,
    batch_size: int = 64,
    encode: Callable[..., np.ndarray] | None = None,
    load: Callable[[str], CAFe] | None = None,
    on_skipped: Callable[[str], None] | None = None,
    show_progress_bar: bool = False,
) -> IndexReport:
    """Make an index of a source, or bring an existing one up to date with it.

    What did not change since the last run is not embedded again; rows of items that vanished are
    deleted. A run that was killed continues where it stopped.

    Args:
        model: a loaded model, or what `CAFe.from_pretrained` takes.
        source: a folder of images and documents, a document, a data file of images with captions,
            or a .jsonl file of {"text": ...} (`cafe.retrieval.sources`).
        to: the index: a folder, or the URI of an object store.
        caption: embed each image with a caption that the model writes (`CAFe.encode`), which the
            column `generated_caption` keeps; None: as an existing index was made, else without.
        think: read it after what the model says of the image in at most this many tokens, which
            that column keeps; `Searcher` reads image queries so, too; None: as before, else 0.
        writer: another model, which writes the captions or thoughts.
        multi_vector: also store vectors of tokens, one for so many (`CAFe.encode_tokens`; 1: for
            each), by which the index is then searched; None: as an existing index, else none.
        page_pixels: the largest size of the image of a document's page, width x height; None: as in
            the index, else `cafe.documents.PAGE_PIXELS`. Another one embeds all pages again.
        max_pages: a document with more pages is skipped.
        batch_size: inputs that are embedded together and then written in one step.
        encode: embeds items (PIL images in RGB, and strings; keywords `caption` or `think`) in
            place of the model's own `encode`, as float32 [n, d]: a pool of processes, for example.
        load: loads the model by its name, in place of `CAFe.from_pretrained`.
        on_skipped: called with a line for each item that cannot be used; None: it is logged.
        show_progress_bar: draw one, on stderr.

    Returns:
        What changed, and how good an approximate search is.

    Raises:
        DataError: there is nothing to index, the index was made otherwise, it is of another source
            that still exists, or no item can be used. Nothing is deleted then.
        CheckpointError: the model cannot be loaded.
    """
    listing = list_items(str(source), max_pages)  # before torch: a wrong path is told immediately
    index = Index.find(to)
    origin = _sized_origin(listing, size_of_pages(index, page_pixels))
    words = _own_words(index, origin, caption, think)
    multi_vector = checked_pool(index, multi_vector)
    vlm, facts = open_model(model, index, load=load)
    other, its_facts = (None, None) if writer is None else open_model(writer, load=load)
    facts = with_tokens(words.facts(facts, its_facts), vlm, multi_vector)
    with one_run(str(to)):
        index = _opened(to, facts, origin)
        embed, write = words.functions(vlm, batch_size, encode, other)
        with progress_bar("index", len(listing.items), show=show_progress_bar) as bar:
            changes = sync(
                index, listing.items, embed, batch_size=batch_size, progress=bar.to,
                write_captions=write, encode_tokens=token_encoder(vlm, multi_vector, batch_size),
            )  # fmt: skip
        index.set_origin(origin)
        return _reported(index, changes, listing, encode or vlm.encode, on_skipped or log_skipped)


def _reported(
    index: Index,
    changes: Report,
    listing: Listing,
    encode: Callable[..., np.ndarray],
    on_skipped: Callable[[str], None],
) -> IndexReport:
    """What a run did, once the index is compacted, and approximate if it is large."""
    changes.skipped[:0] = listing.skipped
    _report_skipped(changes, on_skipped)
    rows = len(index)
    approximate = index.optimize(_caption_queries(encode, listing, rows))
    return IndexReport(index.uri, rows, changes, approximate, listing.left_out)


def _opened(to: str | Path, facts: ModelFacts, origin: Origin) -> Index:
    """The index, new or as another run has left it, whose model and source must be the same."""
    index = Index.find(to)
    if index is None:
        return Index.create(to, facts, origin=origin)
    _check_origin(index, origin)
    index.check_model(facts)
    _check_words(index, OwnWords.of(facts), origin)
    _check_writer(index, facts, origin)
    checked_pool(index, facts.pool)
    return index


def open_model(
    model: CAFe | str | Path,
    index: Index | None = None,
    device: str | None = None,
    *,
    load: Callable[[str], CAFe] | None = None,
) -> tuple[CAFe, ModelFacts]:
    """Load a model, with the facts that an index records of it.

    Args:
        model: a loaded model, which is returned as it is, or what `CAFe.from_pretrained` takes.
        index: the index whose vectors the model's are to be compared with.
        device: where to load the model; None: the default of `CAFe.from_pretrained`.
        load: loads the model by its name, in place of `CAFe.from_pretrained`.

    Raises:
        DataError: `index` was made by another model. Where the weights already differ, they are
            not loaded.
        CheckpointError: there is no such model, or its weights cannot be read.
    """
    if isinstance(model, str | Path):
        name, weights = _identity(str(model))
        if index is not None:
            index.check_model(replace(index.model, name=name, weights=weights))
        vlm = load(str(model)) if load else _load(model, device)
        facts = _facts(vlm, name, weights)
    else:
        vlm, facts = model, model_facts(model)
    if index is not None:
        index.check_model(with_tokens(facts, vlm, index.model.pool))
    return vlm, facts


def model_facts(model: CAFe) -> ModelFacts:
    """What an index records of the model that makes its vectors, for `Index.create`.

    The weights are identified by the files that the model was loaded from: save a model that you
    have trained since, and load it again.

    Raises:
        CheckpointError: the model was built in memory, so no name could load it again.

    Example:
        >>> from cafe import CAFe, Index
        >>> model = CAFe.from_pretrained("tiny")
        >>> index = Index.create("notes.index", model_facts(model), encode=model.encode)
        >>> index.model.name, index.model.dimension
        ('tiny', 256)
    """
    source = model.source
    if source is None:
        raise CheckpointError(
            "the model was built in memory, and an index records where its model is; save it with "
            "save_pretrained and load it with CAFe.from_pretrained"
        )
    if source.adapter is None:
        return _facts(model, *_identity(str(source.name_or_dir)))
    return _facts(model, *_identity(str(source.adapter), base=str(source.name_or_dir)))


def _identity(name: str, base: str | None = None) -> tuple[str, str]:
    """The name that loads a model again, and the fingerprint of its weights.

    base   what an adapter was loaded onto; None: what the adapter itself names
    """
    from cafe.model.checkpoint.adapter import is_adapter, locate_base
    from cafe.model.checkpoint.locate import lasting_name, locate

    directories = [locate(name)]
    if is_adapter(directories[0]):
        directories.append(locate(base) if base else locate_base(directories[0]))
    return lasting_name(name), weights_fingerprint(directories)


def _load(name: str | Path, device: str | None) -> CAFe:
    from cafe.model.vlm import CAFe

    options: dict[str, Any] = {} if device is None else {"device": device}
    return CAFe.from_pretrained(name, **options)


def _facts(model: CAFe, name: str, weights: str) -> ModelFacts:
    prompt = prompt_fingerprint(model.embedding_contract())
    return ModelFacts(name, weights, prompt, model.embedding_dimension)


def _sized_origin(listing: Listing, page_pixels: int) -> Origin:
    """Give all pages of `listing` this size; what the index is then made of."""
    listing.items[:] = at_size(listing.items, page_pixels)
    root = None if listing.root is None else str(listing.root)
    pixels = page_pixels if has_pages(listing.items) else None
    return Origin(listing.source, root, page_pixels=pixels)


def _check_origin(index: Index, origin: Origin) -> None:
    """Raises DataError when the index is of another source, and that still exists."""
    before = index.origin
    if before is None or before == origin:
        return
    if before.made_by == "embed":
        raise DataError(
            f"index {index.uri} was written by cafe embed; index {origin.source} into another one"
        )
    if before.source != origin.source and Path(before.source).exists():
        raise DataError(
            f"index {index.uri} is of {before.source}, whose rows would be deleted; index "
            f"{origin.source} into another one"
        )


def _own_words(
    index: Index | None, origin: Origin, caption: bool | None, think: int | None
) -> OwnWords:
    """What was asked for; where nothing was, what the index was made with.

    Raises:
        DataError: the index is of another source, or was made with other words.
    """
    if index is None:
        return OwnWords(bool(caption), think or 0)
    _check_origin(index, origin)
    own = OwnWords.of(index.model)
    words = OwnWords(
        own.caption and not think if caption is None else caption,
        (0 if caption else own.think) if think is None else think,
    )
    _check_words(index, words, origin)
    return words


def _check_words(index: Index, words: OwnWords, origin: Origin) -> None:
    """Raises DataError for an index whose images were embedded with other words, or with none."""
    own = OwnWords.of(index.model)
    if own != words:
        raise DataError(
            f"index {index.uri} was made {own}; index {origin.source} {words} into another one"
        )


def _check_writer(index: Index, facts: ModelFacts, origin: Origin) -> None:
    """Raises DataError for an index whose captions or thoughts another model wrote."""
    own = index.model
    if own.generates and own.writer_weights != facts.writer_weights:
        raise DataError(
            f"index {index.uri} has captions or thoughts that {own.writer or own.name} wrote, and "
            f"{facts.writer or facts.name} would write others; set writer to that model, or index "
            f"{origin.source} into another one"
        )


def _caption_queries(
    encode: Callable[[Sequence[Any]], np.ndarray], listing: Listing, rows: int
) -> np.ndarray | None:
    """Embeddings [n, d] of some captions; None where there are too few, or search stays exact.

    People search images by text, and embeddings of texts lie apart from those of images.
    """
    items = listing.items
    captions = [item.text for item in items if item.source is not None and item.text]
    if rows < APPROXIMATE_ROWS or len(captions) < MEASURED_QUERIES:
        return None
    step = len(captions) // MEASURED_QUERIES
    return encode([text.split("\n")[0] for text in captions[::step][:MEASURED_QUERIES]])


def _report_skipped(changes: Report, on_skipped: Callable[[str], None]) -> None:
    for problem in changes.skipped:
        on_skipped(f"{problem.location}: {problem.reason}")
