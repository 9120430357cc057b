"""Evaluation: counts every example once, for any batch size and number of devices."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.checkpoints.card import OBJECTIVES, ModelCard
from vit_jax.compiler import compiler_options
from vit_jax.data.config import Split
from vit_jax.data.masks import IGNORED
from vit_jax.data.pipeline import BatchReader, eval_batches
from vit_jax.errors import UserError, during
from vit_jax.models.create import structure
from vit_jax.training import native
from vit_jax.training.config import Config
from vit_jax.training.datasets import DataSets
from vit_jax.training.evaluation import boxes, masks, multilabel
from vit_jax.training.evaluation.evaluators import Classification, Evaluator
from vit_jax.training.evaluation.masks import make_mask_eval_step
from vit_jax.training.evaluation.predictions import Gathered, Predictions
from vit_jax.training.evaluation.probes import Features
from vit_jax.training.evaluation.segmentation import Dense
from vit_jax.training.evaluation.splits import NO_BOX, how_several, open_split, split_names
from vit_jax.training.evaluation.steps import (
    check_pools,
    make_eval_step,
    make_feature_step,
    make_masked_eval_step,
)
from vit_jax.training.metrics import due
from vit_jax.training.sharding import (
    BATCH,
    batch_shards,
    local_rows,
    make_layout,
    to_devices,
    total,
)


class Evaluation:
    """All evaluations of a config: val, test and eval.evaluators.

    Opens all data at once, so that missing data is reported before training starts.

    Args:
      data: opens the splits; by default as the config says, relative to the current folder.
      kept: where each classification puts what the model says of each image, by its name. By
        default nothing leaves the device but sums.

    Raises:
      UserError: a split that cannot be opened, is endless, has other classes than the model, or
        is the same images as an evaluator's training split.
    """

    def __init__(
        self,
        config: Config,
        card: ModelCard,
        mesh: Mesh,
        data: DataSets | None = None,
        kept: dict[str, Predictions] | None = None,
    ):
        data = data or DataSets()
        self._kept = kept
        self._config, self._mesh = config, mesh
        self._evaluators: dict[str, Evaluator] = {
            name: Classification(test=split, every=every)
            for name, split, every in (
                ("val", config.data.val, None),
                ("test", config.data.test, 0),
            )
            if split is not None
        }
        self._evaluators |= config.eval.evaluators
        native.check_views(card, config.eval)
        masked = not config.classifies
        if masked and card.objective != config.objective:
            raise UserError(
                f"objective {config.objective} measures predicted patches, which this model does "
                f"not predict: its objective is {card.objective}. Name a run of the former, or "
                f"set objective to {card.objective}"
            )
        ours = any(isinstance(each, Classification) for each in self._evaluators.values())
        theirs = OBJECTIVES[card.objective]
        if ours and (config.segments, config.detects) != (theirs.masks, theirs.boxes):
            what = "pixels" if config.segments else "boxes" if config.detects else "whole images"
            raise UserError(
                f"objective {config.objective} is of the classes of {what}, and this model's "
                f"objective is {card.objective}: name another model, or set objective to "
                f"{card.objective}"
            )
        if ours and config.detects:
            boxes.check_installed()
        # By evaluator and split: the classes of a split depend on the evaluator.
        self._reads: dict[tuple[str, Split], BatchReader] = {}
        self._several: dict[str, str | None] = {}
        self._labels = card.labels
        known: dict[tuple[Any, ...], BatchReader] = {}
        for name, evaluator in self._evaluators.items():
            ours = isinstance(evaluator, Classification)
            matched = not (ours and masked)  # labels that nothing reads need not be the model's
            where = f"data.{name}" if name in ("val", "test") else f"eval.evaluators.{name}"
            if ours and matched and not card.labels:
                raise UserError(
                    f"{where}: the model has no classes to tell images by: fine-tune it, or "
                    "measure its features by eval.evaluators of type fewshot, knn or probe"
                )
            if not (ours or evaluator.reads_masks):
                check_pools(card.config, where)
            for splits in evaluator.data_sets():
                labels = card.labels if ours else None
                names = split_names(where, evaluator, splits)
                for named, split in zip(names, splits, strict=True):
                    masked_labels = evaluator.reads_masks or (ours and config.segments)
                    reads = "boxes" if ours and config.detects else "labels"
                    source = open_split(data, named, split, "masks" if masked_labels else reads)
                    if labels is None:
                        labels = data.labels(named, split)
                    if matched:
                        source = data.with_labels(named, split, labels)
                        several = how_several(named, source, split, evaluator, config, card)
                        self._several[name] = several
                    crops = config.eval.crops if ours else 1  # features are of the centre
                    options = dict(
                        on_corrupt=config.data.on_corrupt, crops=crops, cache=config.data.cache
                    )
                    if ours and config.segments:
                        options |= dict(whole_masks=True, windows=config.eval.windows)
                    if ours and config.detects:
                        options |= dict(whole_boxes=True)
                    read = BatchReader.of(source, split, card.preprocess, **options)
                    if crops > 1 and not read.preprocess.cuts:
                        key = named if named.startswith("data.") else f"{named}.test"
                        raise UserError(
                            f"{named}: images are resized to the model's size, so that eval.crops="
                            f"{crops} would be {crops} times the same: leave it out, or set "
                            f"--config.{key}.crop, such as 0.875 (for a run, with --model and "
                            "--config, as its own stays)"
                        )
                    key = split, source.label_names, crops, read.whole_masks, read.whole_boxes
                    self._reads[name, split] = known.setdefault(key, read)
                if len(names) > 1:
                    data.check(names, config)
        graphdef, _ = structure(card.config)
        layout = make_layout(mesh, card.config.dtype)
        options = dict(objective=config.objective, layout=layout)
        asked = compiler_options(mesh, deterministic=config.mesh.deterministic)
        whole = NamedSharding(mesh, PartitionSpec())
        if config.segments:
            stride = None if config.eval.windows == "none" else config.eval.stride
            step = make_mask_eval_step(graphdef, card.preprocess, stride=stride, layout=layout)
            self._mask_step = jax.jit(step, out_shardings=whole, compiler_options=asked)
        elif config.detects:
            how = dict(layout=layout, spread=NamedSharding(mesh, BATCH))
            step = boxes.make_box_eval_step(graphdef, card.config, card.preprocess, **how)
            self._box_step = jax.jit(step, out_shardings=whole, compiler_options=asked)
        elif masked:
            step = make_masked_eval_step(graphdef, card.preprocess, seed=config.seed, **options)
            self._eval_step = jax.jit(step, compiler_options=asked)
        else:
            classes = card.config.num_classes
            options |= dict(num_classes=classes, flip=config.eval.flip)
            make = functools.partial(make_eval_step, graphdef, card.preprocess, **options)
            step = make()
            self._eval_step = jax.jit(
                lambda params, batch, start: step(params, batch), compiler_options=asked
            )
            self._row_steps = {  # by whether each label is a question of its own
                each: jax.jit(
                    make(each=each, rows=True), out_shardings=whole, compiler_options=asked
                )
                for each in (False, True)
            }
        self._feature_steps = {
            dense: jax.jit(
                make_feature_step(graphdef, card.preprocess, dense=dense, layout=layout),
                out_shardings=whole,
                compiler_options=asked,
            )
            for dense in (False, True)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The evaluations that the config has: val, test and the evaluators."""
        return tuple(self._evaluators)

    @property
    def classifies(self) -> bool:
        """Whether any of them tells classes of whole images."""
        ours = (isinstance(each, Classification) for each in self._evaluators.values())
        whole = not (self._config.segments or self._config.detects)
        return self._config.classifies and whole and any(ours)

    def during(self) -> dict[str, tuple[str, ...] | None]:
        """What is measured during the run, not only at its end: name -> its metrics.

        None where they are not known before the first measurement.
        """
        found: dict[str, tuple[str, ...] | None] = {}
        for name, evaluator in self._evaluators.items():
            every = self._config.eval.every if evaluator.every is None else evaluator.every
            if every:
                known = ("accuracy", "top5", "loss") if self._config.classifies else None
                if self._config.segments:
                    known = None  # as classes have their own
                if self._config.detects:
                    known = (*boxes.METRICS, *(f"ap/{label}" for label in self._labels))
                if self._several.get(name) == "each":
                    known = (*known, "mAP", "micro_f1", "macro_f1")
                found[name] = known if isinstance(evaluator, Classification) else None
        return found

    def due(self, step: int, total_steps: int) -> list[str]:
        """The names of the evaluations that are due after `step` steps."""
        default = self._config.eval.every
        return [
            name
            for name, evaluator in self._evaluators.items()
            if due(step, default if evaluator.every is None else evaluator.every, total_steps)
        ]

    def measure(self, names: list[str], params: Any) -> Iterator[dict[str, float]]:
        """Yields {"NAME/METRIC": value} for each name, for the model with these parameters."""
        known: dict[tuple[Split, tuple[str, ...]], Features] = {}
        for name in names:
            with during(lambda name=name: f"evaluating {name}"):
                values = self._evaluators[name].measure(_Weighted(self, params, name, known))
            yield {f"{name}/{key}": value for key, value in values.items()}

    def classify(self, params: Any, name: str, split: Split) -> dict[str, float]:
        """Returns means over all examples: accuracy (top-1), top5 and loss.

        If images have several labels, the metrics are those of `evaluators.Classification`, with
        the settings of the evaluator `name`.

        For masked patch prediction, returns its loss and accuracy, with the same corruption of each
        example at every evaluation.

        For segmentation, returns what `masks.metrics` does, in which each pixel counts once; for
        detection what `boxes.metrics` does.

        Padding is masked; the sums of all batches are added on the host, and divided last. Images
        that cannot be read are masked as well, if they are to be skipped, and counted in `corrupt`.
        """
        read, skipped = self._reads[name, split], []
        skips, config = read.on_corrupt == "skip", self._config
        whole = self._detect if config.detects else self._classify
        measure = self._segment if config.segments else whole

        def on_devices(batches):
            for batch in batches:
                if skips:
                    skipped.append(total(batch["corrupt"], self._batch_size, self._mesh))
                yield self._to_devices(batch)

        with self._batches(read) as batches:
            means = measure(params, name, split, on_devices(batches))
        return {**means, "corrupt": int(sum(skipped))} if skips else means

    def _classify(self, params: Any, name: str, split: Split, batches: Any) -> dict[str, float]:
        read, several = self._reads[name, split], self._several.get(name)
        each = several == "each"
        rows = each or (self._kept is not None and self.classifies)
        gathered = Gathered(len(read.source), several, self._config.objective)
        size, eval_step = self._batch_size, self._eval_step
        if rows:
            sums = []
            results = (self._row_steps[each](params, batch) for batch in batches)
            for number, values in enumerate(fetched(results)):
                known = [values.pop(column) for column in ("logits", "label", "mask")]
                gathered.add(number * size, *known)
                sums.append(values)
        else:
            results = [eval_step(params, batch, i * size) for i, batch in enumerate(batches)]
            sums = jax.device_get(results)
        totals = {
            name: np.sum([values[name] for values in sums], axis=0, dtype=np.float64)
            for name in sums[0]
        }
        count = totals.pop("count")
        if not count:
            raise UserError(
                f"{split.source} {split.split}: no image can be evaluated"
                + (", as none has a label" if each and totals["images"] else "")
            )
        counts = dict.fromkeys(totals, count)
        if each:
            counts["loss"] = totals.pop("images")
        means = {name: float(value / counts[name]) for name, value in totals.items()}
        if rows:
            flip, crops = self._config.eval.flip, read.crops
            found = gathered.predictions(read.source, split, flip=flip, crops=crops)
            if each:
                means |= multilabel.scores(found.logits, found.label)
            if self._kept is not None:
                self._kept[name] = found
        return means

    def _segment(self, params: Any, name: str, split: Split, batches: Any) -> dict[str, float]:
        results = (self._mask_step(params, batch) for batch in batches)
        confusion, loss = masks.added(fetched(results))
        if not confusion.any():
            raise UserError(f"{split.source} {split.split}: no pixel has a class to compare")
        return masks.metrics(confusion, loss, self.label_names(name, split))

    def _detect(self, params: Any, name: str, split: Split, batches: Any) -> dict[str, float]:
        found, source = boxes.Gathered(), self._reads[name, split].source
        results = (self._box_step(params, batch) for batch in batches)
        for number, values in enumerate(fetched(results)):
            found.add(number * self._batch_size, values)
        means = boxes.metrics(*found.beside(source), source.label_names)
        if not means:
            raise UserError(f"{split.source} {split.split}: {NO_BOX}")
        return means

    def features(self, params: Any, name: str, split: Split) -> Features:
        """Returns the head's inputs for all examples, in order, on the host of every process.

        Labels are in the classes that the evaluator `name` has for the split.
        """
        return Features(*self._run(params, name, split, dense=False))

    def dense(self, params: Any, name: str, split: Split) -> Dense:
        """Returns dense features (each patch) and masks of all examples, as `features` does.

        An example takes 4 bytes a number: 0.6 MB for ViT-B/16 at 224 pixels.
        """
        x, y = self._run(params, name, split, dense=True)
        return Dense(x, np.where(y == IGNORED, -1, y.astype(np.int32)))

    def _run(
        self, params: Any, name: str, split: Split, *, dense: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        read, step = self._reads[name, split], self._feature_steps[dense]
        with self._batches(read) as batches:
            results = (step(params, self._to_devices(batch)) for batch in batches)
            kept = [
                (values["x"][values["mask"]], values["label"][values["mask"]])
                for values in fetched(results)
            ]
        x, y = (np.concatenate(column) for column in zip(*kept, strict=True))
        return x, y

    def label_names(self, name: str, split: Split) -> tuple[str, ...]:
        """The class names of a split's data set, for the evaluator `name`."""
        return self._reads[name, split].source.label_names

    @property
    def _batch_size(self) -> int:
        """The batch size, rounded up to a multiple of the devices; the rest is padding."""
        shards = batch_shards(self._mesh)
        size = self._config.eval.batch_size or self._config.batch_size
        return -(-size // shards) * shards

    def _batches(self, read: BatchReader) -> Any:
        rows = local_rows(self._batch_size, self._mesh)
        return eval_batches(read, self._batch_size, rows=rows, threads=self._config.data.threads)

    def _to_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return to_devices(batch, self._batch_size, self._mesh)


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """A model with its weights, for one evaluator.

    The features of a split are computed once and shared by evaluators with the same classes.
    """

    evaluation: Evaluation
    params: Any
    name: str
    known: dict[tuple[Split, tuple[str, ...]], Features]

    def classify(self, split: Split) -> dict[str, float]:
        return self.evaluation.classify(self.params, self.name, split)

    def features(self, split: Split) -> Features:
        key = split, self.evaluation.label_names(self.name, split)
        if key not in self.known:
            self.known[key] = self.evaluation.features(self.params, self.name, split)
        return self.known[key]

    def dense(self, split: Split) -> Dense:
        # Not cached: large, and rarely read by another evaluator.
        return self.evaluation.dense(self.params, self.name, split)

    def num_classes(self, split: Split) -> int:
        return len(self.evaluation.label_names(self.name, split))


def fetched(
    results: Iterable[dict[str, jax.Array]], behind: int = 2
) -> Iterator[dict[str, np.ndarray]]:
    """Copies results to the host, `behind` steps late, so that the device does not wait for it."""
    pending: collections.deque[dict[str, jax.Array]] = collections.deque()
    for values in results:
        pending.append(values)
        if len(pending) > behind:
            yield jax.device_get(pending.popleft())
    yield from map(jax.device_get, pending)
