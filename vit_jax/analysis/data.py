"""Data checks before training, for the command `data`: how a source will be read and used."""

import os
from collections.abc import Iterator
from typing import Any

from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.opened import open_model
from vit_jax.data import describe, pictures
from vit_jax.data.classes import match
from vit_jax.data.config import Split
from vit_jax.data.pipeline import BatchReader
from vit_jax.data.sources import Source, heading, open_all, open_splits, understood
from vit_jax.errors import UserError, nearest
from vit_jax.training.config import Config
from vit_jax.training.plan import TrainingData, make_plan


def data(
    spec: str | None,
    config: Config | None,
    *,
    split: str | None = None,
    model: str | None = None,
    folder: str | None = None,
) -> Iterator[str]:
    """Yields the lines of a report on a source, or on the splits of a config.

    Args:
      spec: such as "folder:/data/pets", or a path; None with a config.
      split: only this split, by its name in the source, or in the config ("val").
      model: path for `load`, of a model whose classes the splits should have.
      folder: where to write contact sheets; None for none.

    Raises:
      UserError: a split that cannot be opened, after the lines on the others; a class that the
        model does not have; or pictures inside the data.
    """
    specs, splits = {}, {}
    if config is None:
        spec = understood(spec)
        _check_outside(folder, spec)
        opened = open_splits(spec, split)
        yield heading(spec)
        yield f"splits: {', '.join(opened)}"
    else:
        every = {name: getattr(config.data, name) for name in ("train", "val", "test")}
        known = [name for name, each in every.items() if each]
        if split and split not in known:
            raise UserError(f"the config has no data.{split}; {nearest(split, known)}")
        splits = {f"data.{name}": every[name] for name in ([split] if split else known)}
        specs = {name: f"{each.source}, {each.split}" for name, each in splits.items()}
        for each in splits.values():
            _check_outside(folder, each.source)
        opened = open_all({k: (each.source, each.split) for k, each in splits.items()})
    card = None if model is None else open_model(model).card
    yield from describe.report(opened, specs)
    sources = {name: each for name, each in opened.items() if not isinstance(each, UserError)}
    if card is None and config is not None and "data.train" in sources:
        card = _card(config, sources["data.train"])
    if card is not None and card.labels:
        matches = {}
        for name, source in sources.items():
            how = splits[name].classes if name in splits else None
            try:
                matches[name] = match(source.label_names, card.labels, how)
            except UserError as error:
                raise UserError(f"{name} ({specs.get(name, spec)}): {error}") from None
        if model or not all(matched.is_identity for matched in matches.values()):
            yield ""
            yield "classes in the model"
            for name, matched in matches.items():
                yield from describe.mapping_lines(name, matched)
    for name, source in sources.items() if folder else ():
        read, how = _reader(name, source, splits.get(name), card, config)
        yield from pictures.draw(folder, name, source, read, how)
    bad = [f"{name}: {each}" for name, each in opened.items() if name not in sources]
    if bad:
        raise UserError("; ".join(bad))


def _check_outside(folder: str | None, source: str) -> None:
    """Raises a UserError if pictures would be written among the images of a source."""
    root = source.partition(":")[2].partition(",")[0]
    if folder is None or not os.path.isdir(root):
        return
    inside, root = (os.path.realpath(path) for path in (folder, root))
    if os.path.commonpath((inside, root)) == root:
        raise UserError(
            f"--pictures={folder} is inside {root}, whose images they would be taken for: name a "
            "folder outside"
        )


def _card(config: Config, train: Source) -> ModelCard:
    """The card of the model that a config would train."""
    init = None
    if config.init_from is not None:
        init = open_model(config.init_from, **config.init_keys)
    return make_plan(config, TrainingData.of(train), init).card


def _reader(
    name: str,
    source: Source,
    split: Split | None,
    card: ModelCard | None,
    config: Config | None,
) -> tuple[Any, str]:
    """Returns a batch reader of a split: as in the config, else for the model, else the default."""
    if card is None:
        return pictures.default_reader(source)
    if split is None or config is None:
        return BatchReader.of(source, Split("", ""), card.preprocess), "as it is evaluated"
    return BatchReader.of(source, split, card.preprocess, seed=config.seed), f"by {name}"
