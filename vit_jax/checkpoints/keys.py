"""Which keys of a weight file are the model's: chosen by patterns, without a shared prefix.

Training code wraps a model and saves the wrapper: torch.compile puts `_orig_mod.` before every key,
DistributedDataParallel `module.`, others `backbone.`, `student.` or `model_ema.`.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from vit_jax.checkpoints.files import Weights
from vit_jax.checkpoints.rows import Dialect
from vit_jax.checkpoints.tables import FOREIGN as _FOREIGN
from vit_jax.checkpoints.tables import native
from vit_jax.checkpoints.tables_naflex import TIMM_NAFLEX
from vit_jax.errors import UserError, nearest

Patterns = str | Sequence[str]
_SEPARATORS = (".", "/")
FOREIGN = (*_FOREIGN, TIMM_NAFLEX)


def choose(weights: Weights, only: Patterns = (), ignore: Patterns = ()) -> Weights:
    """Returns the weights without the keys that the caller leaves out, which are in `left_out`.

    Args:
      only: patterns of keys, in which * is any text: keys that match none are left out.
      ignore: patterns of keys to leave out.

    Raises:
      UserError: a pattern matches no key, or no key is left.
    """
    kept = set(weights.shapes)
    if only := _patterns("only", only):
        kept = {key for pattern in only for key in _matching(weights, "only", pattern)}
    for pattern in _patterns("ignore", ignore):
        kept -= set(_matching(weights, "ignore", pattern))
    if weights.shapes and not kept:
        raise UserError(f"{weights.path}: only and ignore leave no key of it")
    left_out = {key: shape for key, shape in weights.shapes.items() if key not in kept}
    chosen = weights.renamed(lambda key: key if key in kept else None)
    chosen.left_out = left_out
    return chosen


def _patterns(name: str, given: Patterns) -> tuple[str, ...]:
    each = (given,) if isinstance(given, str) else given
    if not isinstance(each, Sequence) or not all(isinstance(pattern, str) for pattern in each):
        raise UserError(f"{name} is {given!r}; expected patterns of keys, such as 'model_ema.*'")
    return tuple(each)


def _matching(weights: Weights, name: str, pattern: str) -> list[str]:
    keys = list(weights.shapes)
    found = [key for key in keys if fnmatch.fnmatchcase(key, pattern)]
    if not found:
        sections = {f"{key[: _first(key)]}*" for key in keys if _first(key)}
        hint = nearest(pattern, sections | {key for key in keys if not _first(key)})
        inside = next((key[len(pattern) :] for key in keys if key.startswith(pattern)), "")
        if inside:  # the name of a section alone
            joint = inside[0] if inside.startswith(_SEPARATORS) else ""
            hint = f"did you mean {pattern + joint + '*'!r}?"
        elif "?" not in hint and (near := nearest(pattern, keys)).endswith("?"):
            hint = near
        raise UserError(f"{weights.path}: {name}={pattern!r} matches no key; {hint}")
    return found


def parameters(key: str, pattern: str, names: Iterable[str], also: Iterable[str] = ()) -> list[str]:
    """The model's parameters that a pattern of the config key matches, in which * is any text.

    Args:
      also: other words that the key takes, to suggest.

    Raises:
      UserError: none.
    """
    names = [*names]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        modules = {name.rpartition("/")[0] for name in names} - {""}
        known = [*names, *(f"{module}/*" for module in modules), *also]
        raise UserError(
            f"{key} has {pattern!r}, which matches no parameter; {nearest(pattern, known)} "
            "(`vit-jax inspect` lists the names)"
        )
    return found


def _first(key: str) -> int:
    """The length of a name's first part with its separator, 0 if it has one part."""
    return min((key.find(mark) + 1 for mark in _SEPARATORS if mark in key), default=0)


def recognise(weights: Weights) -> tuple[Weights, Dialect, str]:
    """Finds the dialect of a file's keys.

    Returns:
      The weights, without the prefix that all keys share (then their `before`), if only so they are
      a dialect's; the dialect; and the dialect's own prefix.

    Raises:
      UserError: the keys are of no dialect, or hold other things than one model.
    """
    if found := _dialect(weights.shapes):
        return weights, *found
    around = wrappers(weights.shapes)
    for before in around:
        if all(key.startswith(before) for key in weights.shapes):
            bare = weights.renamed(lambda key, before=before: key.removeprefix(before))
            if found := _dialect(bare.shapes):
                bare.before = before
                bare.path = f"{weights.path} (without {before!r} before its keys)"
                return bare, *found
    if around:
        raise several(weights)
    keys = list(weights.shapes)
    markers = ", ".join(f"{dialect.markers[0]} ({dialect.name})" for dialect in FOREIGN)
    raise UserError(
        f"{weights.path} has the names of no known code base ({', '.join(keys[:3])}, ...): "
        f"expected one of {markers}"
    )


def _dialect(keys: Iterable[str]) -> tuple[Dialect, str] | None:
    keys = list(keys)
    if native(()).prefix(keys) is not None:
        return native(()), ""
    found = ((dialect, dialect.prefix(keys)) for dialect in FOREIGN)
    return next(((dialect, prefix) for dialect, prefix in found if prefix is not None), None)


def wrappers(keys: Iterable[str]) -> dict[str, str]:
    """What stands before the keys of each model in a file, and the name of its dialect.

    `module.` for a file with `module.vit.embeddings.patch_embeddings.projection.weight`.
    """
    found: dict[str, dict[str, str]] = {"vit": {}, "resnet": {}}
    for key in keys:
        for dialect in FOREIGN:
            for before in _before(dialect, key):
                found[dialect.family].setdefault(before, dialect.name)
    return found["vit"] or found["resnet"]  # hybrids have a ResNet in their patch embedding


def _before(dialect: Dialect, key: str) -> Iterator[str]:
    spelt = dialect.spelt(key)
    for marker in dialect.markers:
        for prefix in sorted(dialect.prefixes, key=len, reverse=True):
            before = spelt.removesuffix(prefix + marker)
            if before != spelt and (not before or before.endswith(_SEPARATORS)):
                yield before
                break


def several(weights: Weights) -> UserError:
    """The error for a file with other keys beside a model's: how each model in it is chosen."""
    found = wrappers(weights.shapes)
    where = (
        "; for init_from, these are model.only and model.ignore, and of distill.teacher distill's"
    )
    names = ", ".join(f"only={f'{before}*'!r} ({found[before]})" for before in found if before)
    if "" in found:
        ignored = " and ".join(f"ignore={f'{before}*'!r}" for before in found if before)
        return UserError(
            f"{weights.path} holds {len(found)} models: {ignored} leaves the one without a prefix, "
            f"and another is chosen by {names}{where}"
        )
    if len(found) > 1:
        return UserError(f"{weights.path} holds {len(found)} models: choose one by {names}{where}")
    other = next(key for key in weights.shapes if not key.startswith(tuple(found)))
    return UserError(
        f"{weights.path} holds other keys than its model's, such as {other}: choose the model by "
        f"{names}{where}"
    )
