"""The source `hf-data:`: data sets of the Hugging Face hub in Parquet files."""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from vit_jax.data.forms.class_lists import sorted_names
from vit_jax.data.forms.files import class_name, fingerprint_of, parse_split, percentile
from vit_jax.data.forms.label_columns import LABEL_COLUMNS
from vit_jax.data.forms.layout import options
from vit_jax.data.forms.parquet import (
    ParquetRows,
    ParquetSource,
    holds_images,
    holds_labels,
    is_list,
    read_column,
    reading,
)
from vit_jax.errors import UserError, nearest
from vit_jax.extras import install

logger = logging.getLogger(__name__)

OPTIONS = ("config", "image", "label")
_HUB_NAME = r"([^/@\s]+/[^/@\s]+)(?:@(refs/[^/@]+/[^/@]+|[^/@]+))?"
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
# Row groups above this size take longer to read (0.5 ms a MB) than an image takes to decode.
_LARGE = 4 * 2**20


def hub(argument: str, split: str) -> ParquetSource:
    """A data set in Parquet files, on the Hugging Face hub or in a folder with the same layout.

    The splits are those of README.md, or of the files' names (data/SPLIT-00000-of-00002.parquet,
    SPLIT/0000.parquet, SPLIT.parquet). Class names are those of the files or README.md, else the
    values of the label column in all splits. A label column of lists is multi-label.

    Args:
      argument: OWNER/NAME, OWNER/NAME@REVISION or a folder; then, where ambiguous, ",config=NAME",
        ",image=COLUMN" and ",label=COLUMN".
      split: a split, or a part of it such as "train[:90%]", drawn by a hash of the row number.

    Raises:
      UserError: no such data set, config, split or column, an ambiguous one, or a missing label.
    """
    where = f"hf-data:{argument}"
    name, low, high = parse_split(split)
    root, splits, card, given = _open(argument)
    if name not in splits:
        raise UserError(f"{where} has no split {name!r}; {nearest(name, splits)}")
    features, schema = _features(splits[name][0], card)
    image = _image_column(where, schema, features, given.get("image"))
    label = _label_column(where, schema, features, given.get("label"), image)
    labelled = _alike(splits, card, name, label, image)
    images = ParquetRows(splits[name], image)
    if images.largest > _LARGE:
        logger.warning(
            "%s has %d MB of images in a group of rows, which is read for each image when they are "
            "shuffled: `vit-jax prepare` makes shards that are read image by image",
            where,
            images.largest // 2**20,
        )
    names, many = _names_in(features.get(label)), is_list(schema.field(label).type)
    cells = _label_cells(where, splits[name], label)
    if names is None:
        every = [*cells, *(c for s in labelled if s != name for c in read_column(splits[s], label))]
        flat = (each for cell in every for each in (cell if many else [cell]) if each is not None)
        names = sorted_names(map(_text, flat))
        numbers = {each: number for number, each in enumerate(names)}
        found = [[numbers[_text(each)] for each in (c if many else [c])] for c in cells]
    else:
        found = [list(cell) if many else [cell] for cell in cells]
        if (most := max((n for each in found for n in each), default=0)) >= len(names):
            raise UserError(f"{where}: a label is {most}, but {label!r} has {len(names)} classes")
        if not many and all(each[0] < 0 for each in found):
            raise UserError(f"{where} has no labels in split {name!r}: all are {found[0][0]}")
    rows = [r for r in range(len(images)) if low <= percentile(f"{name}/{r}") < high]
    if not rows:
        raise UserError(f"{where} has no image in split {split!r}")
    chosen = [sorted(set(found[row])) for row in rows]
    keys = [f"{row}\0{chosen[i]}\0{image}" for i, row in enumerate(rows)]
    digest = fingerprint_of(names, keys, [0] * len(keys))
    files = [os.path.relpath(path, root) for path in splits[name]]
    digest = fingerprint_of((digest,), files, map(os.path.getsize, splits[name]))
    return ParquetSource(
        images,
        np.array(rows, np.int64),
        np.array([each for labels in chosen for each in labels], np.int32),
        np.cumsum([len(labels) for labels in chosen], dtype=np.int64),
        names,
        digest,
        many,
    )


def hub_splits(argument: str) -> tuple[str, ...]:
    """The splits of a data set."""
    return tuple(_open(argument)[1])


def _open(argument: str) -> tuple[str, dict[str, list[str]], dict[str, Any], dict[str, str]]:
    """Returns the folder, split -> Parquet files, the features in README.md, and the options."""
    name, given = options(argument, OPTIONS)
    if "://" in name:
        raise UserError(
            f"hf-data:{name}: Parquet files are read from disks: copy the folder to one"
        )
    root = name if os.path.isdir(name) else _fetch(name)
    card = _card(root)
    every = _configs(root, card) or _configs_by_name(root)
    if not every:
        raise UserError(
            f"hf-data:{argument} has no Parquet files; of the sets on the hub that are in other "
            "formats, OWNER/NAME@refs/convert/parquet may have them"
        )
    config = given.get("config", next(iter(every)))
    if "config" not in given and len(every) > 1:
        raise UserError(
            f"hf-data:{argument} has several configs ({', '.join(map(repr, every))}): say which, "
            f"as in hf-data:{argument},config={next(iter(every))}"
        )
    if config not in every:
        raise UserError(f"hf-data:{argument} has no config {config!r}; {nearest(config, every)}")
    infos = card.get("dataset_info") or []
    infos = infos if isinstance(infos, list) else [infos]
    fitting = [i for i in infos if len(infos) == 1 or i.get("config_name", "default") == config]
    features = fitting[0].get("features") if fitting else None
    return root, every[config], _card_features(features or []), given


def _fetch(name: str) -> str:
    """Downloads a data set of the hub, unless it is cached, and returns its folder."""
    match = re.fullmatch(_HUB_NAME, name)
    if not match or name.startswith(("/", ".", "~")):
        raise UserError(f"hf-data:{name}: there is no such folder, and OWNER/NAME was expected")
    repo, revision = match.groups()
    by_hand = (
        f"put README.md and the Parquet files of https://huggingface.co/datasets/{repo}/tree/"
        f"{revision or 'main'} into a folder, and give that"
    )
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"hf-data:{name}: there is no such folder, and the hub needs huggingface_hub: "
            f"{install('hub')}. To do without it: {by_hand}"
        ) from None
    try:
        only = dict(revision=revision, allow_patterns=["*.parquet", "README.md"])
        return str(huggingface_hub.snapshot_download(repo, repo_type="dataset", **only))
    except Exception as error:  # httpx's, OSError, ValueError: no common class
        short = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
        raise UserError(
            f"hf-data:{name} could not be fetched ({short}). To fetch it by hand: {by_hand}"
        ) from error


def _card(root: str) -> dict[str, Any]:
    """The YAML header of README.md."""
    import yaml  # ml-collections needs it

    path = os.path.join(root, "README.md")
    try:
        with open(path, encoding="utf-8-sig") as file:
            parts = re.split(r"^---[ \t]*$", file.read(), maxsplit=2, flags=re.MULTILINE)
        value = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return value if isinstance(value, dict) else {}


def _configs(root: str, card: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Config -> split -> files, from README.md."""
    found: dict[str, dict[str, list[str]]] = {}
    for config in card.get("configs") or []:
        if (given := config.get("data_files")) is None:
            continue
        if isinstance(given, dict):
            given = [{"split": split, "path": path} for split, path in given.items()]
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            given = [{"split": "train", "path": given}]
        folder = os.path.join(root, config.get("data_dir") or "")
        splits = found.setdefault(str(config.get("config_name", "default")), {})
        for each in given:
            paths = each["path"] if isinstance(each["path"], list) else [each["path"]]
            files = [f for p in paths for f in sorted(_glob(folder, p))]
            other = [f for f in files if not f.endswith(".parquet")]
            if other or not files:
                raise UserError(
                    f"{root}: README.md names {paths[0]!r} for split {each['split']!r}, "
                    f"{'which is no Parquet file' if other else 'where there is no file'}"
                )
            splits[str(each["split"])] = list(dict.fromkeys(files))
    return found


def _glob(folder: str, pattern: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True)


def _configs_by_name(root: str) -> dict[str, dict[str, list[str]]]:
    """Config -> split -> files, from the names of folders and files."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(_glob(root, "**/*.parquet")):
        *folders, name = os.path.relpath(path, root).split(os.sep)
        stem = name.removesuffix(".parquet")
        if match := _SHARD.fullmatch(stem):
            split = match["split"]
        elif folders and re.fullmatch(r"(part-?)?\d+", stem):
            split = folders.pop()
        elif re.fullmatch(r"[A-Za-z_]\w*", stem):
            split = stem
        else:
            raise UserError(f"{path}: its name does not say which split it is of")
        folders = [folder for folder in folders if folder != "data"]
        config = "/".join(folders) or "default"
        found.setdefault(config, {}).setdefault(split, []).append(path)
    return found


def _card_features(given: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The features in README.md, in the format of those in Parquet files."""
    found = {}
    for each in given:
        kind = each.get("dtype") or each.get("sequence") or each.get("list")
        if isinstance(kind, dict) and isinstance(kind.get("class_label"), dict):
            names = kind["class_label"].get("names")
            if isinstance(names, dict):
                numbers = {int(number): str(name) for number, name in names.items()}
                if sorted(numbers) != list(range(len(numbers))):
                    raise UserError(f"README.md: the classes of {each.get('name')!r} have gaps")
                names = [numbers[number] for number in range(len(numbers))]
            found[str(each["name"])] = {"_type": "ClassLabel", "names": names}
        elif kind == "image":
            found[str(each["name"])] = {"_type": "Image"}
    return found


def _features(path: str, card: Mapping[str, Any]) -> tuple[dict[str, Any], pyarrow.Schema]:
    """The features of a file's columns, from the file or else README.md; and its schema."""
    with reading(path):
        schema = pyarrow.parquet.read_schema(path)
    try:
        given = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = dict((given.get("info") or {}).get("features") or {})
    except (ValueError, AttributeError, TypeError):
        features = {}
    for name, feature in card.items():
        said = _names_in(features.get(name))
        if said is not None and _names_in(feature) not in (None, said):
            raise UserError(f"{path} and README.md give column {name!r} different class names")
        if said is None and name in schema.names:
            features[name] = feature
    return features, schema


def _names_in(feature: Any) -> tuple[str, ...] | None:
    """The class names of a feature, or of the elements of a list."""
    if isinstance(feature, list):
        return _names_in(feature[0]) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel" and feature.get("names"):
        names = tuple(class_name(str(name)) for name in feature["names"])
        if len(set(names)) < len(names):
            raise UserError("the data set gives two classes one name")
        return names
    return _names_in(feature.get("feature"))


def _image_column(
    where: str, schema: pyarrow.Schema, features: Mapping[str, Any], said: str | None
) -> str:
    every = [field.name for field in schema if holds_images(field.type)]
    if said is not None:
        if said not in every:
            raise UserError(f"{where}: no column {said!r} has images; {nearest(said, every)}")
        return said
    given = [n for n in every if (features.get(n) or {}).get("_type") == "Image"]
    for found in (given, every):
        if len(found) == 1:
            return found[0]
    if not every:
        raise UserError(f"{where}: no column has images: found {', '.join(schema.names)}")
    raise UserError(f"{where} has images in columns {', '.join(every)}: say image=COLUMN")


def _label_column(
    where: str, schema: pyarrow.Schema, features: Mapping[str, Any], said: str | None, image: str
) -> str:
    every = [f.name for f in schema if f.name != image and holds_labels(f.type)]
    if said is not None:
        if said not in every:
            raise UserError(f"{where}: no column {said!r} has labels; {nearest(said, every)}")
        return said
    given = [name for name in every if _names_in(features.get(name)) is not None]
    called = (*LABEL_COLUMNS, *(f"{name}s" for name in LABEL_COLUMNS))
    for found in (given, [name for name in every if name.lower() in called]):
        if len(found) == 1:
            return found[0]
        if found:
            every = found
            break
    raise UserError(
        f"{where}: no column is surely the labels ({', '.join(every) or 'none has any'}): say "
        "label=COLUMN"
    )


def _alike(
    splits: Mapping[str, Sequence[str]], card: Mapping[str, Any], split: str, label: str, image: str
) -> list[str]:
    """The splits that have labels. UserError: a file has other columns or classes."""
    features, schema = _features(splits[split][0], card)
    found = []
    for one, paths in splits.items():
        for path in paths:
            others, theirs = _features(path, card)
            if one == split and not {image, label} <= set(theirs.names):
                raise UserError(f"{path} has no columns {image!r} and {label!r}, as others have")
            if label in theirs.names and (
                _names_in(others.get(label)) != _names_in(features.get(label))
                or is_list(theirs.field(label).type) != is_list(schema.field(label).type)
            ):
                raise UserError(f"{path} has other classes in {label!r} than {splits[split][0]}")
        if label in theirs.names:
            found.append(one)
    return found


def _label_cells(where: str, paths: Sequence[str], column: str) -> list[Any]:
    """The labels of all rows. UserError: a label is missing."""
    cells = read_column(paths, column)
    for row, cell in enumerate(cells):
        if cell is None or cell == "" or (isinstance(cell, list) and None in cell):
            raise UserError(f"{where}: row {row} has no label in column {column!r}")
    return cells


def _text(label: Any) -> str:
    if isinstance(label, int) and label < 0:
        raise UserError(f"a label is {label}; classes that are numbers count from 0")
    return class_name(str(int(label)) if isinstance(label, bool) else str(label).strip())
