"""`cafe embed` over millions of inputs: in shards, each written whole or not at all.

    OUT/shards.json     model, input, number of inputs, shard size: what a resumed run must agree on
    OUT/00000.parquet   inputs 0 to shard size - 1, without the broken ones
    OUT/00001.parquet   …

A shard that is there is done. Under torchrun rank r of w makes the shards r, r + w, r + 2w, …;
ranks never talk to each other, so one that dies stops no other. In a LanceDB table a shard is one
write, and its rows name it in the column "shard".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cafe.cli.embed import encode_block, tell
from cafe.cli.files import replacing, writing
from cafe.cli.inputs import Loaded, Record, Skipped, Source, blocks_of
from cafe.cli.progress import progress_bar
from cafe.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from cafe.index import Index, ModelFacts, Row
    from cafe.model.vlm import CAFe

PLAN = "shards.json"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of `count` processes this one is, and which GPU is its own."""

    rank: int
    count: int
    local: int

    @classmethod
    def here(cls) -> Ranks:
        """As torchrun says; alone without it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, count, local = (int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True))
        return cls(rank, count, local)

    def owns(self, shard: int) -> bool:
        return shard % self.count == self.rank

    @property
    def device(self) -> str | None:
        """None: the model's own choice."""
        if self.count == 1:
            return None
        import torch

        return f"cuda:{self.local}" if torch.cuda.is_available() else None


@dataclass(slots=True)
class Done:
    """What this process did, in words."""

    where: str
    ranks: Ranks
    embedded: int = 0
    skipped: int = 0
    shards: int = 0
    there: int = 0

    def missing(self, sink: Sink, count: int, shard_size: int) -> set[int]:
        """Shards of `count` inputs that are this process's and not there; counts the others."""
        own = {s for s in range(-(-count // shard_size)) if self.ranks.owns(s)}
        there = own & sink.finished()
        self.there = len(there)
        return own - there

    def checked(self, source: Path) -> Done:
        """Raises DataError when there was nothing to embed in all of `source`."""
        if self.ranks.count == 1 and not self.embedded and not self.there:
            raise DataError(f"{source}: nothing to embed ({self.skipped} inputs skipped)")
        return self

    def __str__(self) -> str:
        who = f"rank {self.ranks.rank}: " if self.ranks.count > 1 else ""
        parts = [f"{who}{self.embedded} embeddings in {self.shards} shards of {self.where}"]
        if self.there:
            parts.append(f"{self.there} shards were there")
        if self.skipped:
            parts.append(f"{self.skipped} inputs skipped")
        return ", ".join(parts)


class Sink(Protocol):
    """Where shards go. A shard is written whole, or not at all."""

    @property
    def where(self) -> str: ...

    def finished(self) -> set[int]:
        """Shards that are there."""
        ...

    def write(self, shard: int, blocks: Iterable[Block]) -> None: ...

    def complete(self) -> None:
        """All shards are there, and nobody else writes."""
        ...


Block = tuple[list["Loaded"], "np.ndarray | None"]
"""Rows and their embeddings float32 [rows, d]; None where there are none."""

OpenSink = Callable[["ModelFacts"], Sink]
"""A model's facts -> a sink that agrees with them. Raises DataError when it holds other shards."""


@dataclass(frozen=True, slots=True)
class Files:
    """`OUT/00000.parquet`, …; `model` is the name that they keep."""

    out: Path
    columns: tuple[str, ...]
    model: str
    dimension: int

    @property
    def where(self) -> str:
        return str(self.out)

    def finished(self) -> set[int]:
        return {int(file.stem) for file in self.out.glob("[0-9]*.parquet") if file.stem.isdecimal()}

    def write(self, shard: int, blocks: Iterable[Block]) -> None:
        from cafe.cli.table import EmbeddingTable

        with (
            replacing(self.out / f"{shard:05d}.parquet") as unfinished,
            EmbeddingTable(unfinished, self.columns, self.model, self.dimension) as table,
        ):
            for rows, embeddings in blocks:
                table.append(rows, embeddings)

    def complete(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Table:
    """A LanceDB table; paths in it start at `root`. A shard is kept in memory, then appended."""

    where: str
    root: Path

    def finished(self) -> set[int]:
        return self._index.values("shard")

    def write(self, shard: int, blocks: Iterable[Block]) -> None:
        import numpy as np

        rows: list[Row] = []
        vectors: list[np.ndarray] = []
        for loaded, embeddings in blocks:
            rows += [_row(one, shard, self.root) for one in loaded]
            vectors += [] if embeddings is None else [embeddings]
        index = self._index
        # A worker that Ray took for dead may have written it.
        if rows and not index.count(f"shard = {shard}"):
            index.add(rows, np.concatenate(vectors), new=True)

    def complete(self) -> None:
        self._index.optimize()

    @property
    def _index(self) -> Index:
        from cafe.index import Index

        return Index.open(self.where)


def open_files(
    model: str, source: Path, inputs: Source, out: Path, shard_size: int, facts: ModelFacts
) -> Files:
    """The folder `out`, with its plan. Raises DataError when that is of another run."""
    _agree(out, _plan(facts, source, inputs, shard_size))
    return Files(out, inputs.columns, model, facts.dimension)


def open_table(source: Path, inputs: Source, to: str, shard_size: int, facts: ModelFacts) -> Table:
    """The table at `to`, new or of the same run; else DataError."""
    root = source if source.is_dir() else source.parent
    _open_table(to, facts, _plan(facts, source, inputs, shard_size), root)
    return Table(to, root)


def embed_shards(
    model: str, source: Path, inputs: Source, opened: OpenSink, shard_size: int, ranks: Ranks
) -> Done:
    """Write the shards that are this process's and not there; the input is read once, in order."""
    from cafe.cli.index_model import open_model

    vlm, facts = open_model(model, device=ranks.device)
    sink = opened(facts)
    done = Done(sink.where, ranks)
    missing = done.missing(sink, inputs.count, shard_size)
    total = inputs_in(missing, inputs.count, shard_size)
    with progress_bar("embed", total if ranks.rank == 0 else 0) as bar:

        def told(embedded: int, problems: Sequence[Skipped]) -> None:
            tell(problems)
            done.embedded, done.skipped = done.embedded + embedded, done.skipped + len(problems)
            bar(done.embedded + done.skipped)

        for shard, part in parts_of(unique(inputs.records(), sink), shard_size, missing):
            sink.write(shard, embedded_blocks(vlm, part, told))
            done.shards += 1
    if ranks.count == 1:
        sink.complete()
    return done.checked(source)


# ---------------------------------------------------------------------- pieces


def inputs_in(shards: Iterable[int], count: int, shard_size: int) -> int:
    """How many of `count` inputs are in these shards."""
    return sum(min(shard_size, count - shard * shard_size) for shard in shards)


def parts_of(
    records: Iterable[Record | Skipped], size: int, wanted: set[int]
) -> Iterator[tuple[int, list[Record | Skipped]]]:
    """The wanted shards, undecoded; the others are read past."""
    part: list[Record | Skipped] = []
    number = 0
    for number, record in enumerate(records):
        shard = number // size
        if shard in wanted:
            part.append(record)
        if part and (number + 1) % size == 0:
            yield shard, part
            part = []
    if part:
        yield number // size, part


def embedded_blocks(
    vlm: CAFe,
    records: Iterable[Record | Skipped],
    told: Callable[[int, Sequence[Skipped]], None],
) -> Iterator[Block]:
    """A shard, block by block; `told` hears how many were embedded, and which were broken."""
    for block, problems in blocks_of(records):
        rows, embeddings, more = encode_block(vlm, block)
        yield rows, embeddings
        told(len(rows), [*problems, *more])


def _plan(facts: ModelFacts, source: Path, inputs: Source, shard_size: int) -> dict[str, Any]:
    model = {name: value for name, value in asdict(facts).items() if name != "name"}
    return {
        "model": model,
        "input": str(source.absolute()),
        "inputs": inputs.count,
        "shard_size": shard_size,
    }


def _agree(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare with the one that is there."""
    path = out / PLAN
    if not path.is_file():
        if out.is_dir() and any(out.glob("*.parquet")):
            raise DataError(f"{out}: holds other Parquet files; name a new folder")
        with replacing(path) as unfinished, writing(path):
            unfinished.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name a new folder") from error
    _same(str(out), before, plan)


def _same(where: str, before: dict[str, Any], plan: dict[str, Any]) -> None:
    different = [name for name in plan if before.get(name) != plan[name]]
    if different:
        name = different[0]
        raise DataError(
            f"{where}: holds shards made with another {name.replace('_', ' ')} "
            f"({before.get(name)}, now {plan[name]}); run it as before, or write to another place"
        )


def _open_table(to: str, facts: ModelFacts, plan: dict[str, Any], root: Path) -> Index:
    import pyarrow as pa

    from cafe.index import Index, Origin

    name = json.dumps(plan, sort_keys=True)
    index = Index.find(to)
    if index is None:
        origin = Origin(name, str(root.resolve()), "embed")
        try:
            return Index.create(to, facts, origin=origin, columns={"shard": pa.int32()})
        except DataError:  # another rank was quicker
            index = Index.open(to)
    index.check_model(facts)
    before = index.origin
    if before is None or before.made_by != "embed":
        raise DataError(f"index {to} was not written by cafe embed; write to another place")
    _same(f"index {to}", json.loads(before.source), plan)
    return index


def unique(records: Iterable[Record | Skipped], sink: Sink) -> Iterator[Record | Skipped]:
    """A table's rows are told apart by id: there, one that comes again is broken."""
    if not isinstance(sink, Table):
        yield from records
        return
    seen: set[int] = set()
    for record in records:
        if isinstance(record, Skipped):
            yield record
            continue
        digest = hashlib.blake2b(record.id.encode("utf-8", "surrogatepass"), digest_size=8)
        key = int.from_bytes(digest.digest(), "little")
        again = key in seen
        seen.add(key)
        yield Skipped(record.place, f"id {record.id!r} comes twice") if again else record


def _row(one: Loaded, shard: int, root: Path) -> Row:
    import PIL.Image

    from cafe.index import Kind, Row

    picture = one.value["image"] if isinstance(one.value, dict) else one.value
    size = picture.size if isinstance(picture, PIL.Image.Image) else (None, None)
    kind: Kind = "text" if one.path is None else "image" if one.text is None else "both"
    path = None if one.path is None else one.path.relative_to(root).as_posix()
    extra = {"shard": shard}
    return Row(one.id, kind, path, one.text, width=size[0], height=size[1], extra=extra)
