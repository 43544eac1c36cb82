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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    def __str__(self) -> str:
        who = f"rank {self.ranks.rank}: " if self.ranks.count > 1 else ""
        parts = [f"{who}{self.embedded} embeddings in {self.shards} shards of {self.where}"]
        if self.there:
            parts.append(f"{self.there} shards were there")
        if self.skipped:
            parts.append(f"{self.skipped} inputs skipped")
        return ", ".join(parts)


def embed_to_files(
    model: str, source: Path, inputs: Source, out: Path, shard_size: int, ranks: Ranks
) -> Done:
    """Write `OUT/00000.parquet`, …; what is there is kept.

    Raises DataError when OUT holds shards of another model, input or size.
    """
    from cafe.cli.table import EmbeddingTable

    if out.suffix == ".parquet" or out.is_file():
        raise DataError(f"{out}: with --shard-size, name a folder")
    vlm, facts = _open(model, ranks)
    _agree(out, _plan(facts, source, inputs, shard_size))
    done = Done(str(out), ranks)

    def write(shard: int, records: list[Record | Skipped], advance: Callable[[int], None]) -> None:
        with (
            replacing(out / f"{shard:05d}.parquet") as unfinished,
            EmbeddingTable(unfinished, inputs.columns, model, vlm.embedding_dimension) as table,
        ):
            for rows, embeddings, skipped in _embedded(vlm, records):
                table.append(rows, embeddings)
                done.embedded, done.skipped = done.embedded + len(rows), done.skipped + skipped
                advance(len(rows) + skipped)

    def is_there(shard: int) -> bool:
        return (out / f"{shard:05d}.parquet").is_file()

    _each_shard(inputs.records(), inputs.count, shard_size, done, is_there, write)
    return _not_empty(done, source)


def embed_to_table(
    model: str, source: Path, inputs: Source, to: str, shard_size: int, ranks: Ranks
) -> Done:
    """Append to the LanceDB table at `to`, one write per shard, and optimize it when alone.

    Raises DataError when the table holds embeddings of another model or input.
    """
    import numpy as np

    vlm, facts = _open(model, ranks)
    root = source if source.is_dir() else source.parent
    index = _open_table(to, facts, _plan(facts, source, inputs, shard_size), root)
    finished = index.values("shard")
    done = Done(to, ranks)

    def write(shard: int, records: list[Record | Skipped], advance: Callable[[int], None]) -> None:
        rows: list[Row] = []
        vectors: list[np.ndarray] = []
        for loaded, embeddings, skipped in _embedded(vlm, records):
            rows += [_row(one, shard, root) for one in loaded]
            vectors += [] if embeddings is None else [embeddings]
            done.skipped += skipped
            advance(len(loaded) + skipped)
        if rows:
            index.add(rows, np.concatenate(vectors), new=True)
            done.embedded += len(rows)

    records = _unique(inputs.records())
    _each_shard(records, inputs.count, shard_size, done, lambda s: s in finished, write)
    if ranks.count == 1:
        index.optimize()
    return _not_empty(done, source)


# ---------------------------------------------------------------------- pieces


def _open(model: str, ranks: Ranks) -> tuple[CAFe, ModelFacts]:
    from cafe.cli.index_model import open_model

    return open_model(model, device=ranks.device)


def _each_shard(
    records: Iterable[Record | Skipped],
    count: int,
    shard_size: int,
    done: Done,
    is_there: Callable[[int], bool],
    write: Callable[[int, list[Record | Skipped], Callable[[int], None]], None],
) -> None:
    """`write` every shard that is this rank's and not there; the input is read once, in order."""
    own = [s for s in range(-(-count // shard_size)) if done.ranks.owns(s)]
    missing = {s for s in own if not is_there(s)}
    done.there = len(own) - len(missing)
    total = sum(min(shard_size, count - s * shard_size) for s in missing)
    passed = 0
    with progress_bar("embed", total if done.ranks.rank == 0 else 0) as bar:

        def advance(more: int) -> None:
            nonlocal passed
            passed += more
            bar(passed)

        for shard, part in _parts(records, shard_size, missing):
            write(shard, part, advance)
            done.shards += 1


def _parts(
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


def _embedded(
    vlm: CAFe, records: Iterable[Record | Skipped]
) -> Iterator[tuple[list[Loaded], np.ndarray | None, int]]:
    """Blocks of a shard: rows, their embeddings, and how many inputs were broken (and told)."""
    for block, problems in blocks_of(records):
        rows, embeddings, more = encode_block(vlm, block)
        tell([*problems, *more])
        yield rows, embeddings, len(problems) + len(more)


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


def _unique(records: Iterable[Record | Skipped]) -> Iterator[Record | Skipped]:
    """A table's rows are told apart by id: one that comes again is broken."""
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


def _not_empty(done: Done, source: Path) -> Done:
    if done.ranks.count == 1 and not done.embedded and not done.there:
        raise DataError(f"{source}: nothing to embed ({done.skipped} inputs skipped)")
    return done
