"""Compares runs by what `evaluate` left in their folders: classes, calibration, image by image."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax.launch.comparison import Run
from vit_jax.launch.report import Table, escape, markdown_table, number
from vit_jax.training.evaluation.files import Stored, read
from vit_jax.training.evaluation.quality import Paired, compare

CLASSES = 30  # in the table of classes, at most
_RUNS = 4  # beside one another in that table
_DASH = number(None)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """A run and what its folder has of one split."""

    run: Run
    split: str
    stored: Stored

    @property
    def accuracy(self) -> float:
        """The share of the images with a label whose most likely class is right."""
        return float(self.stored.correct.mean())

    @property
    def fingerprint(self) -> str:
        """That of the images; runs on other ones cannot be compared image by image."""
        return self.stored.told["fingerprint"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A run beside the most accurate one on the same images of a split."""

    split: str
    first: Run
    second: Run
    images: int
    paired: Paired


def read_all(runs: Sequence[Run]) -> tuple[list[Evaluated], list[str]]:
    """What was evaluated of some runs, by split and run; and a note on each file that is damaged.

    `test` comes first, then `val`.
    """
    found, notes = [], []
    for run in runs:
        stored, damage = read(run.folder)
        found += [Evaluated(run, split, each) for split, each in stored.items()]
        notes += [f"{run.name}: {each}" for each in damage]
    order = ("test", "val")
    found.sort(
        key=lambda each: (
            order.index(each.split) if each.split in order else len(order),
            each.split,
        )
    )
    return found, notes


def by_split(found: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """The same by split, each split's most accurate run first."""
    splits: dict[str, list[Evaluated]] = {}
    for each in found:
        splits.setdefault(each.split, []).append(each)
    return {name: sorted(some, key=lambda each: -each.accuracy) for name, some in splits.items()}


def overview(found: Sequence[Evaluated]) -> Table:
    """A row for each run and split."""
    heads = ("run", "split", "step", "images", "accuracy", "95% interval", "balanced accuracy")
    heads += ("macro F1", "ECE", "ECE, scaled", "views")
    rows = []
    for each in found:
        told = each.stored.told
        metrics, calibration = told["metrics"], told["calibration"] or {}
        ece = [(calibration.get(key) or {}).get("ece") for key in ("as_is", "scaled")]
        step = told["step"]
        rows.append(
            [
                *(each.run.name, each.split, _DASH if step is None else f"{step:,}"),
                *(f"{told['images']:,}", number(each.accuracy)),
                interval(told["intervals"]["accuracy"]),
                *(number(metrics.get(key)) for key in ("balanced_accuracy", "macro_f1")),
                *map(number, ece),
                views(told["flip"], told["crops"]),
            ]
        )
    numeric = [False, False, *[True] * 8, False]
    kept = [i for i in range(len(heads)) if i < 6 or {row[i] for row in rows} - {_DASH, ""}]
    return Table(
        [heads[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        [numeric[i] for i in kept],
    )


def views(flip: bool, crops: int) -> str:
    """What is averaged of each image."""
    parts = [f"{crops} crops"] * (crops > 1) + ["mirrored"] * flip
    return " and ".join(parts)


def interval(bounds: Sequence[float] | None) -> str:
    """Two numbers with "to" between them."""
    return _DASH if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def pairs(found: Sequence[Evaluated]) -> tuple[list[Pair], list[str]]:
    """Compares runs on the same images, each with the most accurate one there.

    Also a note on each split of which runs have different images, and are not compared.
    """
    compared, notes = [], []
    for split, runs in by_split(found).items():
        groups: dict[str, list[Evaluated]] = {}
        for each in runs:
            groups.setdefault(each.fingerprint, []).append(each)
        for first, *others in groups.values():
            for other in others:
                a, b = first.stored, other.stored
                _, left, right = np.intersect1d(a.position, b.position, return_indices=True)
                if not len(left):
                    continue
                paired = compare(a.correct[left], b.correct[right])
                compared.append(Pair(split, first.run, other.run, len(left), paired))
        if len(groups) > 1:
            named = (", ".join(each.run.name for each in group) for group in groups.values())
            notes.append(
                f"{split}: the images are not the same (fingerprints differ), so that these are "
                f"not compared: {' | '.join(named)}"
            )
    return compared, notes


def pair_table(compared: Sequence[Pair]) -> Table:
    """A row for each comparison, with the four counts of McNemar's test."""
    heads = ["run", "beside", "split", "images", "both right", "only the run", "only the other"]
    heads += ["neither", "difference", "95% interval", "p (McNemar)"]
    rows = []
    for each in compared:
        found = each.paired
        counts = (each.images, found.both, found.only_second, found.only_first, found.neither)
        rows.append(
            [
                *(each.second.name, each.first.name, each.split),
                *(f"{count:,}" for count in counts),
                f"{found.difference:+.4f}",
                "{:+.4f} to {:+.4f}".format(*found.interval),
                f"{found.p:.2g}" if found.p >= 1e-4 else "< 0.0001",
            ]
        )
    return Table(heads, rows, [False] * 3 + [True] * 8)


def class_table(runs: Sequence[Evaluated]) -> tuple[Table, int] | None:
    """The weakest classes of a split, by the first run; and how many classes there are.

    None if no run has classes of their own, as where any of several labels is right. One run has
    precision and F1, several have their recalls beside one another, with Wilson intervals.
    """
    runs = [each for each in runs if each.stored.told["classes"]][:_RUNS]
    if not runs:
        return None
    told = [{row["name"]: row for row in each.stored.told["classes"]} for each in runs]
    names = [row["name"] for row in runs[0].stored.told["classes"]]
    weak = [name for name in names if told[0][name]["recall"] is not None]
    weak.sort(key=lambda name: told[0][name]["recall"])
    empty = [name for name in names if told[0][name]["recall"] is None]
    shown = [*weak, *empty][:CLASSES]
    heads = ["class", "images"]
    for each in runs:
        name = "recall" if len(runs) == 1 else f"recall, {each.run.name}"
        heads += [name, "95% interval"]
    fields = {}
    if len(runs) == 1:
        fields = {"precision": "precision", "f1": "F1", "average_precision": "average precision"}
        fields = {key: head for key, head in fields.items() if key in told[0][names[0]]}
    rows = []
    for name in shown:
        row = [name, f"{told[0][name]['images']:,}"]
        for each in told:
            mine = each.get(name) or {"recall": None}
            known = mine["recall"] is not None
            row += [number(mine["recall"])]
            row += [interval((mine["low"], mine["high"]) if known else None)]
        rows.append([*row, *(number(told[0][name][key]) for key in fields)])
    table = Table([*heads, *fields.values()], rows, [False] + [True] * (len(rows[0]) - 1))
    return table, len(names)


def markdown_of(found: Sequence[Evaluated], notes: Sequence[str]) -> str:
    """The tables of runs and of pairs as Markdown; "" if nothing was evaluated."""
    parts = []
    if found:
        parts += ["## Evaluated", markdown_table(overview(found))]
    compared, different = pairs(found)
    if compared:
        parts += ["## Image by image", markdown_table(pair_table(compared))]
    parts += [f"{escape(note)}." for note in (*different, *notes)]
    return "".join(f"\n{part}\n" for part in parts)
