"""Small data sets in TFDS's own format, written by TFDS without TensorFlow, under published names.

Features, class counts and splits are those of the data sets in TFDS's catalogue; images are noise.
"""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import tensorflow_datasets
from tensorflow_datasets.core import features

BBox, ClassLabel, Image, Text = (
    features.BBoxFeature,
    features.ClassLabel,
    features.Image,
    features.Text,
)
IMAGENET = [f"n{number:08}" for number in range(1000)]


def image(height: int, width: int, channels: int = 3, form: str = "JPEG", seed: int = 0) -> bytes:
    """An image file."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, channels), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.squeeze()).save(file, form)
    return file.getvalue()


class Info(tensorflow_datasets.core.DatasetInfo):
    """Asks no bucket of TFDS's for what is known of it, which would leave a folder behind."""

    def initialize_from_bucket(self) -> None:
        pass


def write(folder: Path, name: str, version: str, kinds: dict, splits: dict, pair=None, shards=None):
    """Writes a data set NAME or NAME/CONFIG.

    Args:
      kinds: its features by name.
      splits: {split: (number of examples, index -> example)}; images are bytes of image files.
      pair: the names of the supervised image and label.
      shards: how many files each split has.

    Returns:
      Its builder.
    """
    core, (name, *config) = tensorflow_datasets.core, name.split("/")

    class Set(core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = core.Version(version)

        def _info(self):
            told = features.FeaturesDict(kinds)
            return Info(builder=self, features=told, supervised_keys=pair, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(*made) for split, made in splits.items()}

        def _generate_examples(self, count, example):
            for i in range(count):
                values = example(i)
                files = {key: v for key, v in values.items() if isinstance(v, bytes)}
                yield i, {**values, **{key: io.BytesIO(v) for key, v in files.items()}}

    Set.name = name
    Set.BUILDER_CONFIGS = [core.BuilderConfig(name=each) for each in config]
    builder = Set(data_dir=folder, file_format="array_record")
    config = tensorflow_datasets.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(download_config=config)
    return builder


def write_all(folder: Path) -> None:
    """Writes the data sets that the recipes train on and evaluate, and one that only VTAB has."""
    photos = [image(40 + i, 60 - 5 * i, seed=i) for i in range(5)]
    small = [image(32, 32, form="PNG", seed=i) for i in range(5)]
    grey = image(96, 96, 1, "PNG")

    def photo(classes, **more):
        return lambda i: {
            "image": photos[i % 5],
            "label": i * 7 % classes,
            "file_name": f"{i}.jpg",
            **{key: value(i) for key, value in more.items()},
        }

    label, name = ("image", "label"), Text()
    jpeg, png = Image(encoding_format="jpeg"), Image(shape=(32, 32, 3), encoding_format="png")
    kinds = {"image": jpeg, "label": ClassLabel(names=IMAGENET), "file_name": name}
    thousand = photo(1000)
    splits = {"train": (100, thousand), "validation": (8, thousand)}
    write(folder, "imagenet2012", "5.1.0", kinds, splits, label)
    write(folder, "imagenet_v2/matched-frequency", "3.0.0", kinds, {"test": (8, thousand)}, label)

    def reassessed(i):  # no label, one, or several
        labels = [(i + k) % 1000 for k in range(i % 3)]
        return {
            "image": photos[i % 5],
            "original_label": i,
            "real_label": labels,
            "file_name": f"{i}.jpg",
        }

    kinds = {
        "image": jpeg,
        "original_label": ClassLabel(names=IMAGENET),
        "real_label": features.Sequence(ClassLabel(names=IMAGENET)),
        "file_name": name,
    }
    splits, pair = {"validation": (8, reassessed)}, ("image", "real_label")
    write(folder, "imagenet2012_real", "1.0.0", kinds, splits, pair)

    for classes, version in ((10, "3.0.2"), (100, "3.0.2")):
        kinds = {"id": name, "image": png, "label": ClassLabel(num_classes=classes)}
        if classes == 100:
            kinds["coarse_label"] = ClassLabel(num_classes=20)

        def cifar(i, kinds=kinds, classes=classes):
            values = {"id": f"{i}", "image": small[i % 5], "label": i % classes, "coarse_label": 3}
            return {key: values[key] for key in kinds}

        splits = {"train": (100, cifar), "test": (8, cifar)}
        write(folder, f"cifar{classes}", version, kinds, splits, label)

    kinds = {
        "image": Image(),
        "label": ClassLabel(num_classes=37),
        "species": ClassLabel(num_classes=2),
        "file_name": name,
        "segmentation_mask": Image(shape=(None, None, 1), use_colormap=True),
        "head_bbox": BBox(),
    }
    pet = photo(
        37,
        species=lambda i: i % 2,
        segmentation_mask=lambda i: grey,
        head_bbox=lambda i: features.BBox(0.0, 0.0, 1.0, 1.0),
    )
    splits = {"train": (100, pet), "test": (8, pet)}
    write(folder, "oxford_iiit_pet", "4.0.0", kinds, splits, label)

    kinds = {"image": Image(), "label": ClassLabel(num_classes=102), "file_name": name}
    flower = photo(102)
    splits = {"train": (20, flower), "validation": (20, flower), "test": (8, flower)}
    write(folder, "oxford_flowers102", "2.1.1", kinds, splits, label)

    classes = {"instance": 10, "category": 5, "elevation": 9, "azimuth": 18, "lighting": 6}
    keys = {"instance": "instance"} | {key: f"label_{key}" for key in list(classes)[1:]}
    kinds = {"image": Image(shape=(96, 96, 1)), "image2": Image(shape=(96, 96, 1))}
    kinds |= {keys[key]: ClassLabel(num_classes=n) for key, n in classes.items()}

    def toy(i):
        numbers = {keys[key]: i % n for key, n in classes.items()}
        return {"image": grey, "image2": grey, **numbers}

    # As many as VTAB-1k needs: 800, and of each half of its test split 200.
    splits = {"train": (800, toy), "test": (400, toy)}
    write(folder, "smallnorb", "2.0.0", kinds, splits, ("image", "label_category"))
