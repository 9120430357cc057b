"""Evaluators: evaluations in addition to val and test, sections of `eval.evaluators`.

Each is a dataclass of settings (what it reads, how it measures) with a method `measure`, which uses
a model's classifications or features. Accuracies are in [0, 1]; every example counts once.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from vit_jax.data.config import Split
from vit_jax.data.forms.vtab import TASKS
from vit_jax.errors import UserError, nearest
from vit_jax.training.evaluation.probes import Features, few_shot, knn, linear_probe
from vit_jax.training.evaluation.segmentation import Dense, segmentation

# How images with several labels are counted (see `Classification`).
SEVERAL = ("any", "each")


@runtime_checkable
class Model(Protocol):
    """What evaluators can ask of a model with its weights."""

    def classify(self, split: Split) -> dict[str, float]:
        """Accuracy, top5 and loss on a split with the model's classes; with several labels an
        image, the metrics of `Classification`."""
        ...

    def features(self, split: Split) -> Features:
        """The head's inputs (`pre_logits`) for all examples."""
        ...

    def dense(self, split: Split) -> Dense:
        """Dense features (each patch) and masks of all examples."""
        ...

    def num_classes(self, split: Split) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Base class.

    Attributes:
      type: the kind of evaluator.
      every: steps between its runs in training; 0 is only at the end, None as often as `data.val`.
    """

    reads_masks: ClassVar[bool] = False  # in place of labels

    type: str
    every: int | None = None

    def __post_init__(self):
        if self.every is not None and self.every < 0:
            raise UserError(f"eval: every is {self.every}; it must be at least 0")
        for split in itertools.chain(*self.data_sets()):
            if name := split.first_for_training():
                raise UserError(f"eval: {name} of {split.source} is for data.train alone")

    def data_sets(self) -> list[tuple[Split, ...]]:
        """All splits that it reads, grouped by data set; splits of a data set share classes."""
        found = [getattr(self, part, None) for part in ("train", "val", "test")]
        return [tuple(split for split in found if split is not None)]

    def measure(self, model: Model) -> dict[str, float]:
        """Runs it; returns metrics by name, without the evaluator's own name."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Evaluator):
    """Accuracy, top5 and loss on another split with the model's classes, such as ImageNet-V2.

    For images with several labels, `several` says how they count:

    - "any": any of the labels is right, and images without labels are left out: ImageNet-ReaL
      (arXiv 2006.07159).
    - "each": each label is a separate yes-or-no question, as trained by objective sigmoid. Adds
      mAP, micro_f1 and macro_f1 (see `multilabel.scores`) to accuracy and top5 as in "any"; the
      additional metrics and the loss include images without labels.
    - None: "each" for a model that was trained on several labels an image, as its card says,
      "any" for others. This is also how data.val and data.test are evaluated.

    For objective segmentation, it is of the class of each pixel (see `masks.metrics`), and for
    objective detection of boxes (see `boxes.metrics`).

    Attributes:
      test: the split to evaluate.
      several: how images with several labels count.
    """

    type: str = "classification"
    test: Split
    several: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.several not in (None, *SEVERAL):
            raise UserError(f"eval: several is {self.several!r}; {nearest(self.several, SEVERAL)}")

    def measure(self, model: Model) -> dict[str, float]:
        return model.classify(self.test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(Evaluator):
    """The paper's linear few-shot accuracy, in closed form (section 4.1; see `probes.few_shot`).

    Attributes:
      train: the split that examples are drawn from.
      test: the split to evaluate.
      shots: numbers of examples a class.
      seeds: number of draws, of which mean and standard deviation are reported.
      l2: weight of the regularisation; the default is big_vision's.
    """

    type: str = "fewshot"
    train: Split
    test: Split
    shots: tuple[int, ...] = (5, 10)
    seeds: int = 3
    l2: float = 1024.0

    def measure(self, model: Model) -> dict[str, float]:
        train, test = model.features(self.train), model.features(self.test)
        classes = model.num_classes(self.train)
        return few_shot(train, test, classes, shots=self.shots, seeds=self.seeds, l2=self.l2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Evaluator):
    """k-NN accuracy, weighted by cosine similarity (arXiv 1805.01978; see `probes.knn`).

    Attributes:
      train: the split that neighbours come from.
      test: the split to evaluate.
      neighbours: numbers of neighbours to report.
      temperature: temperature of the weights exp(similarity / temperature).
    """

    type: str = "knn"
    train: Split
    test: Split
    neighbours: tuple[int, ...] = (10, 20)
    temperature: float = 0.07

    def measure(self, model: Model) -> dict[str, float]:
        return knn(
            model.features(self.train),
            model.features(self.test),
            model.num_classes(self.train),
            neighbours=self.neighbours,
            temperature=self.temperature,
        )


# Weight decays that a linear probe chooses from.
L2 = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Evaluator):
    """Linear probe on frozen features, with `l2` chosen on `val` (see `probes.linear_probe`).

    Attributes:
      train: the split that it is trained on.
      val: the split that `l2` is chosen on; None if `l2` is a single one.
      test: the split to evaluate.
      l2: weight decays to choose from.
      steps: most steps of the optimiser (L-BFGS).
    """

    type: str = "probe"
    train: Split
    val: Split | None = None
    test: Split
    l2: tuple[float, ...] = L2
    steps: int = 1000

    def __post_init__(self):
        super().__post_init__()
        if self.val is None and len(self.l2) != 1:
            raise UserError("eval: a probe chooses its l2 on a val split: name one, or a single l2")

    def measure(self, model: Model) -> dict[str, float]:
        return linear_probe(
            model.features(self.train),
            None if self.val is None else model.features(self.val),
            model.features(self.test),
            model.num_classes(self.train),
            l2=self.l2,
            steps=self.steps,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vtab(Evaluator):
    """VTAB-1k (arXiv 1910.04867) by linear probes, one a task; l2 is chosen on 200 of 1000 images.

    The benchmark's other protocol, full fine-tuning, is configs/vtab.py. Images are resized to the
    model's size, ignoring the aspect ratio. Returns the accuracy of each task and, if these are
    all, the means of the groups and of all tasks.

    Attributes:
      tasks: names of the tasks; none is all 19.
      l2: weight decays to choose from.
      steps: most steps of the optimiser (L-BFGS).
    """

    type: str = "vtab"
    tasks: tuple[str, ...] = ()
    l2: tuple[float, ...] = L2
    steps: int = 1000

    def __post_init__(self):
        for task in self.tasks:
            if task not in TASKS:
                raise UserError(f"eval: VTAB has no task {task!r}; {nearest(task, TASKS)}")
        super().__post_init__()

    def data_sets(self) -> list[tuple[Split, ...]]:
        return [probe.data_sets()[0] for probe in self._probes().values()]

    def _probes(self) -> dict[str, Probe]:
        found = {}
        for task in self.tasks or TASKS:
            parts = {"train": "train800", "val": "val200", "test": "test"}
            splits = {
                name: Split(f"vtab:{task}", split, aspect="squash", crop=1.0)
                for name, split in parts.items()
            }
            found[task] = Probe(l2=self.l2, steps=self.steps, **splits)
        return found

    def measure(self, model: Model) -> dict[str, float]:
        scores = {task: probe.measure(model)["accuracy"] for task, probe in self._probes().items()}
        groups: dict[str, list[str]] = {"mean": list(TASKS)}
        for task in TASKS:
            groups.setdefault(TASKS[task].group, []).append(task)
        means = {
            group: float(np.mean([scores[task] for task in tasks]))
            for group, tasks in groups.items()
            if set(tasks) <= set(scores)
        }
        return {**scores, **means}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Evaluator):
    """Semantic segmentation by a linear probe on frozen patch features (see `segmentation`).

    Returns miou, pixel accuracy and foreground_iou at the model's size.

    Attributes:
      train: the split that it is trained on; its source has masks.
      val: the split that `l2` is chosen on; None if `l2` is a single one.
      test: the split to evaluate.
      l2: weight decays to choose from.
      steps: most steps of the optimiser (L-BFGS).
    """

    reads_masks: ClassVar[bool] = True

    type: str = "segmentation"
    train: Split
    val: Split | None = None
    test: Split
    l2: tuple[float, ...] = (1e-4,)
    steps: int = 100

    def __post_init__(self):
        super().__post_init__()
        if self.val is None and len(self.l2) != 1:
            raise UserError(
                "eval: segmentation chooses its l2 on a val split: name one, or a single l2"
            )

    def measure(self, model: Model) -> dict[str, float]:
        return segmentation(
            model.dense(self.train),
            None if self.val is None else model.dense(self.val),
            model.dense(self.test),
            model.num_classes(self.train),
            l2=self.l2,
            steps=self.steps,
        )


EVALUATORS = {
    "classification": Classification,
    "fewshot": FewShot,
    "knn": Knn,
    "probe": Probe,
    "vtab": Vtab,
    "segmentation": Segmentation,
}


def evaluator_kind(name: str, given: Any) -> type[Evaluator]:
    """Returns the evaluator class for the `type` in the section eval.evaluators.NAME.

    Raises:
      UserError: there is no such type.
    """
    if given not in EVALUATORS:
        raise UserError(
            f"eval.evaluators.{name}.type is {given!r}; {nearest(str(given), EVALUATORS)}"
        )
    return EVALUATORS[given]
