"""Opens the data sets of a run, maps their classes to the model's, and records both in data.json.

A run folder's data.json has where each split was found and the order of its classes, so that the
run can be resumed and evaluated from any folder, and with the same data in another place.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence, Sized
from typing import Any

from etils import epath

from vit_jax.data import classes, contents, describe
from vit_jax.data.config import Split
from vit_jax.data.sources import Source, located, open_source
from vit_jax.errors import Unreachable, UserError
from vit_jax.training.config import Config
from vit_jax.writing import write_atomically

logger = logging.getLogger(__name__)
FILE = "data.json"
_SPLITS = ("train", "val", "test")


class DataSets:
    """Opens the splits of a config, each under the name of its section, such as "data.val".

    Args:
      kept: the contents of the run's data.json, by these names.
      moved: new sources in place of the run's, by these names; they must hold the same data.
    """

    def __init__(self, kept: Mapping[str, Mapping[str, Any]] = {}, moved: Mapping[str, str] = {}):
        self._kept, self._moved = kept, moved
        self._looked_at: set[str] = set()  # when the run began, and the same since
        self.opened: dict[str, Source] = {}
        self.lines: dict[str, dict[str, Any]] = {}

    @classmethod
    def of_run(cls, workdir: epath.PathLike, moved: Mapping[str, str] = {}) -> "DataSets":
        """Returns the data sets of a run folder; without a data.json, its config has the places."""
        path = epath.Path(workdir) / FILE
        try:
            kept = json.loads(path.read_text())
            if not isinstance(kept, dict) or not all(map(_is_section, kept.values())):
                raise ValueError("expected sections of texts")
        except FileNotFoundError:
            kept = {}
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}): remove it, and the data is looked for where "
                "config.json says"
            ) from None
        return cls(kept, moved)

    def open(self, where: str, split: Split) -> Source:
        """Opens a split and returns its source; `where` is its section's name.

        Raises:
          UserError: it cannot be opened, or a new place holds other data.
        """
        kept = self._kept_of(where, split)
        spec = self._moved.get(where)
        places = [located(spec or split.source)]
        if kept.get("place") and not spec:
            places = list(dict.fromkeys([kept["place"], *places]))
        source = place = problem = None
        for place in places:
            try:
                source = open_source(place, split.split)
                break
            except Unreachable:
                raise
            except UserError as error:
                problem = problem or error
        if source is None:
            raise UserError(f"{where}: {problem}") from None
        before = kept.get("fingerprint")
        if spec and before != source.fingerprint:
            raise UserError(
                f"{where}: {place} is not the data of this run, {split.source} (fingerprint "
                f"{before or 'not kept'} -> {source.fingerprint}): another place must hold the same"
            )
        if before not in (None, source.fingerprint) and where != "data.train":
            logger.warning(
                "%s: %s changed since the run began (fingerprint %s -> %s)",
                *(where, place, before, source.fingerprint),
            )
        if before == source.fingerprint:
            self._looked_at.add(where)
        self.opened[where] = source
        self.lines[where] = {
            "source": split.source,
            "split": split.split,
            "place": place,
            "examples": len(source) if isinstance(source, Sized) else None,
            "fingerprint": source.fingerprint,
        }
        return source

    def _kept_of(self, where: str, split: Split) -> Mapping[str, Any]:
        """The entry of data.json for exactly this split."""
        kept = self._kept.get(where, {})
        same = (kept.get("source"), kept.get("split")) == (split.source, split.split)
        return kept if same else {}

    def how(self, where: str, split: Split) -> classes.How:
        """How the split's classes are given; from data.json if they came from a file."""
        kept = self._kept_of(where, split)
        if split.classes not in (None, classes.IN_ORDER) and kept.get("classes") == split.classes:
            return kept.get("named", split.classes)
        return split.classes

    def labels(self, where: str, split: Split) -> tuple[str, ...]:
        """Class names of an open split, for a model that has none of its own."""
        how, kept = self.how(where, split), self._kept_of(where, split).get("labels")
        if isinstance(how, Mapping) and kept is not None:
            found = tuple(kept)
        else:
            try:
                found = classes.renamed(self.opened[where].label_names, how)[1]
            except UserError as error:
                raise UserError(f"{where} ({split.source}): {error}") from None
        if how is not None:  # what was kept of the file has not its order
            self.lines[where]["labels"] = found
        return found

    def match(self, where: str, split: Split, labels: tuple[str, ...]) -> classes.Matched:
        """Maps the classes of an open split to `labels`; prints the mapping if it is not obvious.

        Raises:
          UserError: as `classes.match`.
        """
        names = self.opened[where].label_names
        try:
            how = self.how(where, split)
            matched = classes.match(names, labels, how)
            if split.classes is not None and how != classes.IN_ORDER:
                named = dict(zip(names, classes.renamed(names, how)[0], strict=True))
                self.lines[where] |= {"classes": split.classes, "named": named}
        except UserError as error:
            raise UserError(f"{where} ({split.source}, {split.split}): {error}") from None
        self.lines[where] |= {"rule": matched.rule, "mapping": matched.pairs}
        if not matched.is_identity:
            logger.info("%s: %s", where, matched)
        return matched

    def with_labels(self, where: str, split: Split, labels: tuple[str, ...]) -> Source:
        """Returns an open split with the model's classes (see `match`)."""
        source = classes.relabelled(self.opened[where], self.match(where, split, labels))
        self.opened[where] = source
        return source

    def check(self, names: Sequence[str], config: Config) -> None:
        """Refuses open splits that are the same images, and reports any that overlap.

        See `contents.check_splits`. Splits that the run has already checked, and that are
        unchanged, are skipped.
        """
        if self._looked_at.issuperset(names):
            return
        named = {name: self.opened[name] for name in names}
        allow = config.data.same_images
        for line in contents.check_splits(named, allow=allow, classes=config.classifies):
            logger.warning("%s", line)

    def check_held_out(self, config: Config) -> None:
        """Refuses evaluation on the training images."""
        held_out = [name for name in ("data.val", "data.test") if name in self.opened]
        for group in [("data.train", name) for name in held_out] or [("data.train",)]:
            self.check(group, config)

    def summary(self) -> list[str]:
        """A line for each of data.train, data.val and data.test."""
        names = (f"data.{name}" for name in _SPLITS)
        named = {name: self.opened[name] for name in names if name in self.opened}
        specs = {name: "{source}, {split}".format(**self.lines[name]) for name in named}
        return describe.first_lines(named, specs)

    def write(self, workdir: epath.PathLike) -> None:
        """Writes data.json."""
        write_atomically(epath.Path(workdir) / FILE, json.dumps(self.lines, indent=1))


def _is_section(kept: Any) -> bool:
    """Whether a section read from data.json has the right types."""
    texts = ("source", "split", "place", "fingerprint", "classes")
    return (
        isinstance(kept, dict)
        and all(isinstance(kept.get(name), str | None) for name in texts)
        and isinstance(kept.get("named", {}), dict)
        and isinstance(kept.get("labels", []), list)
    )


def with_recorded_sources(old: Config, new: Config) -> tuple[Config, dict[str, str]]:
    """Returns `new` with the sources of `old`, and the changed ones: "data.val" -> new source."""
    moved, parts = {}, {}
    for name in _SPLITS:
        ours, theirs = getattr(new.data, name), getattr(old.data, name)
        if ours and theirs and ours.source != theirs.source:
            moved[f"data.{name}"] = ours.source
            parts[name] = dataclasses.replace(ours, source=theirs.source)
    return dataclasses.replace(new, data=dataclasses.replace(new.data, **parts)), moved
