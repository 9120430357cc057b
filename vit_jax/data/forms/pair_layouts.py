"""Where images and their masks are: folders as of ADE20K, Cityscapes, Pascal VOC, or plain ones."""

from collections.abc import Mapping

from vit_jax.data import storage
from vit_jax.data.forms.files import WHOLE, PassedOver
from vit_jax.data.forms.known_masks import is_ade20k, known_folders, known_layout
from vit_jax.data.forms.layout import few, split_kind
from vit_jax.data.forms.pair_files import Layout, Pair, files_below, folders_in
from vit_jax.errors import UserError, nearest

_IMAGES = ("images", "imgs", "image")
_MASKS = ("masks", "annotations", "labels", "mask")
_SURE = ("masks", "annotations")  # which no folder of classes is called


def layout_of(where: str, root: str, given: Mapping[str, str]) -> Layout:
    """Finds the layout of a folder.

    Args:
      where: the source, for messages.
      given: options; `images` and `masks` name folders, `suffix` is what the name of a mask has
        behind that of its image, `unpaired=skip` leaves out what has no partner.

    Raises:
      UserError: there is no such folder, or no layout that is known.
    """
    if not storage.is_folder(root):
        raise UserError(f"{where}: there is no folder {root}")
    named = {key: given[key] for key in ("images", "masks") if key in given}
    if len(named) == 1:
        raise UserError(f"{where}: images= and masks= name two folders in it: give both")
    inside = folders_in(root)
    if named:
        return _plain(where, root, named["images"], named["masks"], given)
    if kind := known_folders(inside):
        return known_layout(where, root, kind, given)
    pair = _names(where, inside)
    if pair is not None:
        return _plain(where, root, *pair, given)
    outer = [name for name in sorted(inside) if _names(where, folders_in(f"{root}/{name}"))]
    if outer and all(map(split_kind, outer)):
        return _outer(where, root, outer, given)
    raise _unknown(where, root, inside, outer)


def is_layout(root: str) -> bool:
    """Whether a folder surely has images and masks: by the names of the folders in it."""
    if not storage.is_folder(root):
        return False
    inside = folders_in(root)
    return known_folders(inside) is not None or (
        "images" in inside and len(inside.intersection(_SURE)) == 1
    )


def _unknown(where: str, root: str, inside: set[str], outer: list[str]) -> UserError:
    deeper = [*outer, *(name for name in sorted(inside) if is_layout(f"{root}/{name}"))]
    hint = f"; pairs:{root}/{deeper[0]} has them" if deeper else ""
    return UserError(
        f"{where}: no folders of images and masks in {root} (found "
        f"{few(inside) or 'no folder'}){hint}. Expected images and masks, the folders of ADE20K, "
        "Cityscapes or Pascal VOC, or names: pairs:PATH,images=FOLDER,masks=FOLDER"
    )


def _names(where: str, inside: set[str]) -> tuple[str, str] | None:
    """The folders of images and of masks by their names; None if one is missing."""
    images = [name for name in _IMAGES if name in inside]
    masks = [name for name in _MASKS if name in inside]
    if not images or not masks:
        return None
    if len(images) > 1 or len(masks) > 1:
        twice = images if len(images) > 1 else masks
        raise UserError(
            f"{where} has {' and '.join(twice)}: say which is meant, "
            f"images={images[0]},masks={masks[0]}"
        )
    return images[0], masks[0]


def _plain(where: str, root: str, images: str, masks: str, given: Mapping[str, str]) -> Layout:
    for name in (images, masks):
        if not storage.is_folder(f"{root}/{name}"):
            raise UserError(f"{where}: there is no folder {root}/{name}")
    inside = folders_in(f"{root}/{images}")
    splits = tuple(sorted(inside)) if inside and all(map(split_kind, inside)) else ()

    def read(split: str, passed: PassedOver) -> list[Pair]:
        below = "" if split == WHOLE else f"/{split}"
        if below and not storage.is_folder(f"{root}/{images}{below}"):
            known = splits or (WHOLE,)
            raise UserError(f"{where} has no split {split!r}; {nearest(split, known)}")
        if below and not storage.is_folder(f"{root}/{masks}{below}"):
            raise UserError(f"{where}: there is no folder {root}/{masks}{below} beside the images")
        return _matched(where, root, images + below, masks + below, given, passed)

    def theirs(split: str) -> list[str]:
        return _masks(where, root, masks if split == WHOLE else f"{masks}/{split}", given)

    kind = "ade20k" if is_ade20k(images, masks, splits) else "plain"
    return Layout(kind, splits, read, theirs)


def _outer(where: str, root: str, outer: list[str], given: Mapping[str, str]) -> Layout:
    """SPLIT/images and SPLIT/masks."""

    def read(split: str, passed: PassedOver) -> list[Pair]:
        if split not in outer:
            raise UserError(f"{where} has no split {split!r}; {nearest(split, outer)}")
        images, masks = _names(where, folders_in(f"{root}/{split}"))
        return _matched(where, root, f"{split}/{images}", f"{split}/{masks}", given, passed)

    def theirs(split: str) -> list[str]:
        masks = _names(where, folders_in(f"{root}/{split}"))[1]
        return _masks(where, root, f"{split}/{masks}", given)

    return Layout("plain", tuple(outer), read, theirs)


def _masks(where: str, root: str, folder: str, given: Mapping[str, str]) -> list[str]:
    """The masks below a folder, which may be missing."""
    if not storage.is_folder(f"{root}/{folder}"):
        return []
    found, suffix = files_below(where, root, folder, PassedOver()), given.get("suffix", "")
    return [
        path
        for stem, (path, _) in found.items()
        if stem.endswith(suffix) and path.lower().endswith(".png")
    ]


def _matched(
    where: str, root: str, images: str, masks: str, given: Mapping[str, str], passed: PassedOver
) -> list[Pair]:
    """The images below a folder with the masks of the same names below another."""
    suffix, found = given.get("suffix", ""), files_below(where, root, images, passed)
    theirs = files_below(where, root, masks, passed)
    if odd := [path for path, _ in theirs.values() if not path.lower().endswith(".png")]:
        raise UserError(
            f"{where}: {len(odd):,} masks are no PNG, such as {odd[0]}: save them as indexed or "
            "grey PNG, which keeps the number of each class"
        )
    pairs = {
        stem: Pair(path, theirs[mask][0], size, theirs[mask][1])
        for stem, (path, size) in found.items()
        if (mask := f"{stem}{suffix}") in theirs
    }
    alone = [found[stem][0] for stem in found if stem not in pairs]
    used = {pair.mask for pair in pairs.values()}
    spare = [path for path, _ in theirs.values() if path not in used]
    if given.get("unpaired") == "skip":
        for path in alone:
            passed.add(path, "without a mask")
        for path in spare:
            passed.add(path, "a mask without an image")
    elif alone or spare:
        what, which = ("images have no mask", alone) if alone else ("masks have no image", spare)
        hint = ""
        if alone and not pairs and spare:
            hint = f"; masks are called as {spare[0]}: is there a suffix, such as suffix=_mask?"
        raise UserError(
            f"{where}: {len(which):,} {what}, such as {which[0]}{hint} (an image and its mask "
            "have the same name before the ending; unpaired=skip leaves out what has no partner)"
        )
    return [pairs[stem] for stem in sorted(pairs)]
