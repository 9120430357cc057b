"""Checks of folders and archives of images by their paths; options behind a path."""

import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping

from vit_jax.data import storage
from vit_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)

# Folders that systems make, for thumbnails and deleted files.
SYSTEM_FOLDERS = (
    *("@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"),
    *("__MACOSX", "lost+found"),
)
# Never opened to detect their format, as some texts begin like a PPM.
TEXTS = (".txt", ".json", ".cls", ".csv", ".tsv", ".xml", ".md", ".html", ".py", ".yaml", ".yml")
_ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
_PICTURES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".eps", ".pdf", ".psd", ".tga", ".ico"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".exr", ".hdr", ".dds", ".xcf", ".dcm"),
)
_SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id|idation)?|dev|eval(?:uation)?)|(?P<test>test(?:ing)?))"
    r"[_ -]?(?:set|data|images?|imgs?|split)?[_ -]?\d*",
    re.IGNORECASE,
)
# A split's word in a longer name, as in seg_train and seg_test.
_SPLIT_WORD = re.compile(
    r"(?<![^\W_])(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id|idation)?)|(?P<test>test(?:ing)?))"
    r"(?![^\W_])",
    re.IGNORECASE,
)
_MASK = re.compile(r"_masks?(_?\d+)?\.\w+$")
_FOLD = re.compile(r"(?:fold|split)[_ -]?\d+", re.IGNORECASE)
# Folders of all images, beside those of masks or labels.
_CONTAINER = re.compile(r"(?:jpeg|png)?(?:images?|imgs?)", re.IGNORECASE)


def split_kind(folder: str) -> str | None:
    """ "train", "val" or "test" if a folder is named like a split, such as "Training_set"."""
    match = _SPLIT_NAME.fullmatch(folder)
    return match.lastgroup if match else None


def label_option(where: str, known: Collection[str]) -> tuple[str, str | None]:
    """Parses "PATH,label=cls" to (PATH, "cls"), and a path to (path, None).

    Args:
      known: the values of `label`; "json" allows "json.KEY" too.

    Raises:
      UserError: another option, or another value.
    """
    match = re.fullmatch(r"(.*),(\w+)=(.*)", where)
    if not match or storage.exists(where):  # names may have commas
        return where, None
    path, name, value = match.groups()
    if name != "label":
        raise UserError(f"{where} has no option {name!r}; {nearest(name, ['label'])}")
    if value not in known and not ("json" in known and re.fullmatch(r"json\..+", value)):
        raise UserError(f"{where}: label {value!r}; {nearest(value, known)}")
    return path, value


def out_of_the_way(path: str) -> str | None:
    """Why a file is skipped by its path: hidden, or in a system folder; None if it is not."""
    *folders, name = path.split("/")
    for one in folders:
        if one in SYSTEM_FOLDERS or (one.startswith(".") and one.strip(".")):
            return f"of a folder {one}"
    return "hidden" if name.startswith(".") else None


def unknown_format(name: str) -> str:
    """The reason for skipping a file with no known image format."""
    ending = os.path.splitext(name)[1].lower()
    if ending in _ARCHIVES:
        return f"an archive beside images ({ending})"
    if ending in _PICTURES:
        return f"in a format that is not read ({ending})"
    return f"of no known format ({ending if 0 < len(ending) < 9 else 'no ending'})"


def check_class_folders(
    where: str, split: str, files: Collection[str], sure: bool, option: str = "folder"
) -> None:
    """Checks that class folders are not splits, "images", or parents of the real class folders.

    Args:
      files: CLASS/.../NAME of all images.
      sure: whether the user confirmed that the folders are classes, so that there is no error.
      option: the value of `label=` that confirms it.

    Raises:
      UserError: classes named like splits or "images", or a single class with all its images in
        folders below it.
    """
    direct, below = set(), {}
    for file in files:
        one, _, rest = file.partition("/")
        inner, deeper, _ = rest.partition("/")
        inside = below.setdefault(one, set())
        inside.add(inner) if deeper else direct.add(one)
    hint = f"or, if they are classes, write ,label={option} behind the path"
    if not sure and (splits := _splits_among(below, direct)):
        raise UserError(
            f"{where}: the folders {few(splits)} are called like splits, not classes: say "
            f"split={_joined(split, splits[0])} (prepare: --part={_joined(split, splits[0])}), "
            f"{hint}"
        )
    if not sure and len(below) == 1 and not direct:
        folders = {os.path.dirname(file) for file in files}
        shared = os.path.commonpath(folders)
        if shared not in folders:
            inside = {folder[len(shared) + 1 :].partition("/")[0] for folder in folders}
            part = _joined(split, shared)
            if all(map(split_kind, inside)):
                raise UserError(
                    f"{where}: all images are in {shared!r}, in the splits {few(inside)}: say "
                    f"split={(deeper := _joined(part, min(inside)))} (prepare: --part={deeper}), "
                    f"{hint}"
                )
            raise UserError(
                f"{where}: all images are in the folder {shared!r}, which would be the one class, "
                f"in folders of its own ({few(inside)}): if those are the classes, say "
                f"split={part} (prepare: --part={part}); if not, write ,label={option} behind "
                "the path"
            )
    if not sure and (called := sorted(filter(_CONTAINER.fullmatch, below))):
        how = "list its images and their classes in a table (table:FILE; prepare: --labels=FILE)"
        if called[0] not in direct:
            inside = _joined(split, called[0])
            how = f"say split={inside} if its folders are the classes (prepare: --part={inside})"
        raise UserError(
            f"{where}: the folder {called[0]!r} is called like one of all images, not a class: "
            f"{how}, {hint}"
        )
    first, *others = below.values()
    if others and not direct and len(first) > 1 and all(first == other for other in others):
        one = min(below)
        logger.warning(
            "%s: the classes are %s; each has the same folders (%s), which are taken as one: "
            "split=%s would take those of %s as classes",
            *(where, few(below), few(first), _joined(split, one), one),
        )
    if masks := _masks(files):
        logger.warning(
            "%s: %d files are called like masks of others, such as %s, and taken as images of "
            "their classes: move them away if they are masks",
            *(where, len(masks), masks[0]),
        )
    alike: dict[str, str] = {}
    for one in sorted(below):
        other = alike.setdefault(unicodedata.normalize("NFKC", one).casefold().strip(), one)
        if other != one:
            logger.warning("%s: %r and %r are two classes", where, other, one)


def _splits_among(below: Mapping[str, Collection[str]], direct: Collection[str]) -> list[str]:
    """The folders that are splits: all are named so, or two kinds are, or one has the classes.

    Args:
      below: folder -> the folders in it; `direct`: the folders with images directly in them.
    """
    kinds = {one: split_kind(one) for one in below}
    called = sorted(one for one, kind in kinds.items() if kind)
    with_classes = any(one not in direct and len(below[one]) > 1 for one in called)
    if below and all(map(_FOLD.fullmatch, below)):
        return sorted(below)
    if None not in kinds.values() or len({*kinds.values()} - {None}) > 1 or with_classes:
        return called
    alike: dict[str, dict[str | None, str]] = {}  # by their names without the split's word
    for one in below:
        if match := _SPLIT_WORD.search(one):
            rest = f"{one[: match.start()]}/{one[match.end() :]}".casefold()
            alike.setdefault(rest, {})[match.lastgroup] = one
    return next((sorted(each.values()) for each in alike.values() if len(each) > 1), [])


def _masks(files: Collection[str]) -> list[str]:
    """The files such as NAME_mask.png beside NAME.png."""
    called = {f: m for f in files if "_mask" in f and (m := _MASK.search(f))}
    stems = {os.path.splitext(file)[0] for file in files} if called else set()
    return [file for file, match in called.items() if file[: match.start()] in stems]


def _joined(split: str, folder: str) -> str:
    """The split of a folder in a split: ("train[:9%]", "images") -> "train/images[:9%]"."""
    name, bracket, part = split.partition("[")
    return (folder if name == "all" else f"{name}/{folder}") + bracket + part


def few(names: Iterable[str]) -> str:
    """The first five names, sorted, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def options(argument: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """Parses "PATH,label=breed" to ("PATH", {"label": "breed"}); paths may have commas.

    Raises:
      UserError: an unknown option, or one that is given twice.
    """
    path, found = argument, {}
    while match := re.fullmatch(r"(.+),(\w+)=([^,]*)", path, re.DOTALL):
        if storage.exists(os.path.expanduser(path)):
            break
        path, name, value = match.groups()
        if name not in known:
            raise UserError(f"{argument} has an option {name!r}; {nearest(name, known)}")
        if name in found or not value:
            raise UserError(f"{argument}: {name}= once, and with a value, was expected")
        found[name] = value
    return os.path.expanduser(path), found
