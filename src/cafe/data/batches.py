"""Which examples make up which step: a pure function of the seed and the step.

No state is kept from step to step, so a resumed run simply asks for its next step.

Sources take turns by weight: the j-th batch of a source with share w (all shares sum to 1) is due
at time (j + 1/2) / w, in steps, and batches come in the order in which they are due. That is
Webster's divisor method: after n steps a source has had n * w batches, plus or minus about one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite

import numpy as np

from cafe.errors import DataError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The batches of a run.

    sizes    number of examples of each source
    weights  how often each source is drawn, relative to the others; 0: never
    batch    number of examples of one step
    seed     random seed of the order
    names    names of the sources, for messages
    targets  int64 [size] for each source, equal where examples have the same target; None where
             all are different
    groups   int64 [size] for each source, equal where examples belong together; None where none do

    Every batch is drawn from one source. A source is reshuffled for each of its epochs, in which no
    example occurs twice; those that do not fill a last batch are omitted, different ones each time.
    A source that is smaller than one batch is used as one batch of its size.
    A target occurs once in a batch, unless it has more examples than there are batches (`spread`).
    In a source with groups, a batch is as many whole groups as it has room for (`together`).
    Raises DataError when a source has too few examples for a contrastive batch (2), or none.
    """

    sizes: Sequence[int]
    weights: Sequence[float]
    batch: int
    seed: int
    names: Sequence[str] = ()
    targets: Sequence[np.ndarray | None] = ()
    groups: Sequence[np.ndarray | None] = ()
    _orders: dict[int, tuple[int, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights) or self.batch < 1:
            raise ValueError("one weight per source, and at least one example per batch")
        if not all(isfinite(weight) and weight >= 0 for weight in self.weights):
            raise ValueError(f"weights must be finite and not negative, found {self.weights}")
        if sum(self.weights) == 0:
            raise DataError("no source has a weight above 0; there is nothing to draw from")
        for source in self._drawn():
            if self.sizes[source] < min(2, self.batch):
                name = self.names[source] if self.names else f"source {source + 1}"
                raise DataError(
                    f"{name}: {self.sizes[source]} examples, and a batch needs at least "
                    f"{min(2, self.batch)}; add records or remove the source"
                )

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches of all sources together.

        With several sources, a source is repeated more or less than once in this number of steps,
        depending on its weight.
        """
        return sum(self._batches(source) for source in self._drawn())

    def plan(self, step: int) -> list[int]:
        """The examples of `step` (from 0), numbered consecutively over all sources."""
        source, earlier = self._turn(step)
        epoch, index = divmod(earlier, self._batches(source))
        chosen = self._order(source, epoch)[index * self.batch : (index + 1) * self.batch]
        return (chosen + sum(self.sizes[:source])).tolist()

    def source(self, step: int) -> int:
        """The source that `step` is drawn from."""
        return self._turn(step)[0]

    def _drawn(self) -> list[int]:
        return [source for source, weight in enumerate(self.weights) if weight > 0]

    def _batches(self, source: int) -> int:
        return max(1, self.sizes[source] // self.batch)

    def _turn(self, step: int) -> tuple[int, int]:
        """The source of `step`, and the number of its earlier batches.

        By time t, t * w - 1/2 to t * w + 1/2 batches of a source are due, and t - k/2 to t + k/2
        of all k sources. So batches due before `step - k` are counted, and only those due around
        `step` are sorted.
        """
        if step < 0:
            raise ValueError(f"steps count from 0, found {step}")
        drawn, total = self._drawn(), sum(self.weights)
        around: list[tuple[float, int, int]] = []
        counted = 0
        for source in drawn:
            share = self.weights[source] / total
            begin = max(0, floor((step - len(drawn)) * share) - 1)
            end = ceil((step + len(drawn)) * share) + 2
            around += [((j + 0.5) / share, source, j) for j in range(begin, end)]
            counted += begin
        _, source, earlier = sorted(around)[step - counted]
        return source, earlier

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """A source's examples in the order of one of its epochs; int64 [size]."""
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            # numpy's seeds must not be negative.
            stream = np.random.default_rng([self.seed & (2**64 - 1), source, epoch])
            order = stream.permutation(self.sizes[source])
            targets = self.targets[source] if self.targets else None
            groups = self.groups[source] if self.groups else None
            if groups is not None:
                order = together(order, groups, stream)
            elif targets is not None:
                order = spread(order, targets, self.batch, stream)
            known = self._orders[source] = (epoch, order)
        return known[1]


def together(order: np.ndarray, groups: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """`order` rearranged so that the examples of a group are neighbours; groups in random order.

    Groups of one size, of which a batch is a multiple, are whole in a batch. After a smaller one
    they are cut by its size, which is better than the same few examples left out in each epoch.

    Args:
        order: int64 [n], a random permutation of the examples.
        groups: int64 [n], the group of each example (by its number, not its position in `order`).
        stream: Random numbers for the order of the groups.

    Returns:
        int64 [n], the new order.
    """
    turn = stream.permutation(int(groups.max()) + 1)[groups]
    return order[np.argsort(turn[order], kind="stable")]


def spread(
    order: np.ndarray, targets: np.ndarray, batch: int, stream: np.random.Generator
) -> np.ndarray:
    """`order` rearranged so that examples with equal targets are in different batches.

    The examples of the full batches are sorted by target and dealt out to the batches like cards.
    So with b batches, a target with c examples is in a batch floor(c/b) or ceil(c/b) times.

    Args:
        order: int64 [n], a random permutation of the examples.
        targets: int64 [n], the target of each example (by its number, not its position in `order`).
        batch: Number of examples of a batch.
        stream: Random numbers for the order of the targets and of the batches.

    Returns:
        int64 [n], the new order.
    """
    count = len(order) // batch
    if count < 2:
        return order
    whole, rest = order[: count * batch], order[count * batch :]
    _, numbers = np.unique(targets, return_inverse=True)
    shuffled = stream.permutation(numbers.max() + 1)[numbers]
    by_target = whole[np.argsort(shuffled[whole], kind="stable")]
    dealt = by_target.reshape(batch, count).T  # row b has the cards b, b + count, b + 2 count, ...
    return np.concatenate([stream.permutation(dealt).ravel(), rest])
