"""Which example is at which position of the training stream; a pure function of seed and position.

One epoch is as many positions as the source has examples. With repeated augmentation, positions
share examples, and the source is seen once in so many epochs.
"""

import dataclasses
from collections.abc import Sized

import numpy as np
from jaxtyping import Bool, Int64

from vit_jax.data.classes import Relabelled
from vit_jax.data.contents import inner_source, labels_of
from vit_jax.data.sources import Source
from vit_jax.errors import UserError


def shuffled(seed: int | tuple[int, ...], n: int, positions: np.ndarray) -> np.ndarray:
    """The examples at `positions` (int64 [b]) of a stream that shuffles n examples every epoch.

    Equal to `grain.MapDataset.range(n).seed(seed).shuffle().repeat()`, without its cost for each
    element.
    """
    from grain.experimental import index_shuffle  # late, as it takes a second

    words = (seed, 1) if isinstance(seed, int) else seed
    first = int(np.random.SeedSequence(words).generate_state(1)[0])
    return np.array(
        [
            index_shuffle(place, max_index=n - 1, seed=(first + epoch) % 2**32, rounds=4)
            for epoch, place in (divmod(position, n) for position in positions.tolist())
        ],
        np.int64,
    )


def repeated(
    positions: Int64[np.ndarray, " b"], batch_size: int, repeats: int
) -> tuple[Int64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
    """Repeated augmentation (arXiv 1901.09335): each example comes `repeats` times in a batch.

    The copies are a whole share of the batch apart, so that they go to different devices, as with
    DeiT's RASampler, and the row before one, its partner in mixup, is another example.

    Returns:
      For each position in the stream, its place in the order of examples, and whether it is the
      first of its copies.
    """
    share = batch_size // repeats
    steps, rows = np.divmod(positions, batch_size)
    return steps * share + rows % share, rows < share


@dataclasses.dataclass(frozen=True)
class Growth:
    """Images that grow over a run: their size at each step, in equally long phases.

    Attributes:
      sides: of the square images of each phase, in pixels.
      total_steps: of the run.
    """

    sides: tuple[int, ...]
    total_steps: int

    def __post_init__(self):
        if self.total_steps < len(self.sides):
            raise UserError(
                f"augment.image_sizes has {len(self.sides)} sizes for a run of {self.total_steps} "
                "steps: each needs one at least"
            )

    def __call__(self, step: int) -> int:
        """The side of the images of a step, counted from 0; later steps have the last."""
        return self.sides[min(step * len(self.sides) // self.total_steps, len(self.sides) - 1)]

    @property
    def starts(self) -> tuple[int, ...]:
        """The first step of each phase."""
        return tuple(-(-i * self.total_steps // len(self.sides)) for i in range(len(self.sides)))


@dataclasses.dataclass(frozen=True, eq=False)
class Balance:
    """A stream in which rare classes come more often; each class takes its examples in turn.

    Attributes:
      members: the examples of each class: int64 [n of the class].
      quotas: the examples of each class in an epoch: int64 [k]; they sum to the epoch's length.
    """

    members: tuple[np.ndarray, ...]
    quotas: Int64[np.ndarray, " k"]

    @classmethod
    def of(cls, source: Source, balance: float) -> "Balance":
        """The stream of a source with its classes drawn in proportion to n ** (1 - balance).

        n is the number of a class's examples: with 0 they come as they are, with 1 equally often.

        Raises:
          UserError: a source whose classes are not known beforehand, or a class without examples.
        """
        labels, names = labels_of(source), inner_source(source).label_names
        if labels is None or not isinstance(source, Sized):
            raise UserError(
                "data.train.balance needs the class of every example beforehand, which this source "
                "does not say: use a folder, a table or an archive, with one label an image"
            )
        present = np.bincount(labels[labels >= 0], minlength=len(names))
        if not present.all():
            empty = names[int(np.argmin(present))]
            raise UserError(
                f"data.train.balance: class {empty!r} has no images: add some, or remove the class"
            )
        if isinstance(source, Relabelled):
            labels = np.asarray(source.matched.classes, np.int64)[labels]
        members = [np.flatnonzero(labels == label) for label in range(len(source.label_names))]
        members = tuple(each for each in members if len(each))  # a kept head may have more classes
        wanted = np.array([len(each) for each in members], np.float64) ** (1 - balance)
        wanted *= len(source) / wanted.sum()
        quotas = np.floor(wanted).astype(np.int64)
        most = np.argsort(quotas - wanted, kind="stable")  # the largest remainders get the rest
        quotas[most[: len(source) - quotas.sum()]] += 1
        return cls(members, quotas)

    def __call__(self, seed: int, positions: np.ndarray) -> Int64[np.ndarray, " b"]:
        """The examples at `positions` (int64 [b])."""
        epochs, ends = positions // self.quotas.sum(), np.cumsum(self.quotas)
        slots = shuffled(seed, int(ends[-1]), positions)
        classes = np.searchsorted(ends, slots, side="right")
        draws = epochs * self.quotas[classes] + slots - (ends - self.quotas)[classes]
        indices = np.empty(len(positions), np.int64)
        for label in np.unique(classes):
            rows, members = classes == label, self.members[label]
            own = shuffled((seed, 2, int(label)), len(members), draws[rows])
            indices[rows] = members[own]
        return indices
