"""What the recipes share: published data sets with their splits, and how arguments are read.

A data set is named in a recipe's argument, `finetune:B/16,cifar100`. It is looked for
where tensorflow-datasets prepares it; one more word with a colon names another place of the same
images, `B/16,imagenet,records:/data/imagenet`, whose splits have the same names.

Development splits are the paper's (arXiv 2010.11929, sections 4.1 and B.1): 10% of Pets and
Flowers, 2% of CIFAR, 1% of ImageNet are held out of the training images to choose
hyper-parameters; for the number to report, a model is trained on all of them.
"""

from typing import NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


class DataSet(NamedTuple):
    """A source, its splits, the percent of training images to hold out; how long to fine-tune.

    Without test images, those held out are tested on.
    """

    source: str
    train: str
    test: str | None
    held_out: int
    steps: int = 0
    warmup: int = 0

    def part(self, low: int, high: int) -> str:
        """The training images from percent `low` to `high`."""
        parts = (f"{name}[{low}%:{high}%]" for name in self.train.split("+"))
        return "+".join(parts).replace("[0%", "[").replace(":100%]", ":]").replace("[:]", "")


# Steps: the paper's Table 4. Warm-up: the code that was published with the checkpoints
# (vit_jax's common.py and augreg.py) and big_vision's transfer.py, which agree.
_CIFAR = dict(held_out=2, steps=10_000, warmup=500)
_SMALL = dict(held_out=10, steps=500, warmup=100)
_IMAGENET = dict(held_out=1, steps=20_000, warmup=500)
DATASETS = {
    "imagenet": DataSet("tfds:imagenet2012", "train", "validation", **_IMAGENET),
    "cifar10": DataSet("tfds:cifar10", "train", "test", **_CIFAR),
    "cifar100": DataSet("tfds:cifar100", "train", "test", **_CIFAR),
    "pets": DataSet("tfds:oxford_iiit_pet", "train", "test", **_SMALL),
    # TFDS keeps the 2,040 training images in two splits.
    "flowers": DataSet("tfds:oxford_flowers102", "train+validation", "test", **_SMALL),
    # No public TFDS data set has these: `vit-jax prepare` makes them.
    "imagenet21k": DataSet("records:imagenet21k", "train", None, held_out=1),
    "jft": DataSet("records:jft300m", "train", None, held_out=1),
}
# Table 1; Ti and S are those of DeiT and AugReg.
WIDTHS = {"mu": 32, "Ti": 192, "S": 384, "B": 768, "L": 1024, "So400m": 1152}
WIDTHS |= {"H": 1280, "g": 1408, "G": 1664, "22B": 6144}
# Whole names: hybrids are as wide as their ViT, ResNets have nothing of that width.
HYBRIDS = "R+Ti/16 R26+S/32 R26+B/32 R50+B/16 R50+B/32 R50+L/16 R50+L/32".split()
HYBRIDS = {name: WIDTHS[name.partition("+")[2].partition("/")[0]] for name in HYBRIDS}
RESNETS = "R26x1 R50x1 R50x2 R50x3 R101x1 R101x3 R152x1 R152x2 R152x4 R200x3".split()


class Arguments(NamedTuple):
    """What a recipe's argument says; `width` is the variant's, 0 for a ResNet."""

    name: str
    data: DataSet
    words: tuple[str, ...]
    variant: str = ""
    width: int = 0
    size: int | None = None


VITS = "one of " + ", ".join(WIDTHS) + ", a slash and the patch size"
KINDS = {
    "any": f"{VITS}, or one of {', '.join([*HYBRIDS, *RESNETS])}",
    "vit": f"{VITS}, or one of {', '.join(HYBRIDS)}",
    "resnet": "one of " + ", ".join(RESNETS),
}


def read(
    arg: str,
    names: tuple[str, ...],
    words: tuple[str, ...] = (),
    table: dict = DATASETS,
    kind: str = "any",
) -> Arguments:
    """Reads VARIANT,DATA and, in any order: some of `words`, an image size, another source.

    Args:
      kind: which variants a recipe is for: `vit` (hybrids are among them), `resnet` or `any`.

    Raises:
      ValueError: another variant, another data set than `names`, or a word that means nothing.
    """
    variant, _, rest = arg.partition(",")
    known = dict.fromkeys(RESNETS, 0) if kind != "vit" else {}
    if kind != "resnet":
        known |= HYBRIDS
        size, slash, _ = variant.partition("/")
        known |= {variant: WIDTHS[size]} if slash and size in WIDTHS else {}
    if variant not in known:
        example = "R50x1" if kind == "resnet" else "B/16"
        raise ValueError(
            f"argument {arg!r}: expected VARIANT,DATA such as {example},{names[0]}; a variant is "
            f"{KINDS[kind]}"
        )
    name, *given = rest.split(",")
    sizes = [word for word in given if word.isdigit() and int(word)]
    given = [word for word in given if word not in sizes]
    args = read_data(",".join([name, *given]), names, words, table)
    size = int(sizes[-1]) if sizes else None
    return args._replace(variant=variant, width=known[variant], size=size)


class Own(NamedTuple):
    """A source of one's own, with its splits, and the variant, if one is named."""

    variant: str
    source: str
    train: str
    val: str


def read_own(arg: str, *, variant_needed: bool = False) -> Own:
    """Reads [VARIANT,]SOURCE[,TRAIN,VAL]. Before a comma, what has a colon is no variant.

    Raises:
      ValueError: there is no source, or no variant where one is needed.
    """
    first, _, rest = arg.partition(",")
    variant, rest = ("", arg) if ":" in first else (first, rest)
    parts = rest.split(",")
    named = len(parts) >= 3 and "=" not in parts[-1] + parts[-2]
    source = ",".join(parts[:-2]) if named else rest
    if not source or (variant_needed and not variant):
        form = "VARIANT,SOURCE such as S/16," if variant_needed else "SOURCE such as "
        raise ValueError(f"argument {arg!r}: expected {form}folder:/data/pets")
    return Own(variant, source, *(parts[-2:] if named else ("train", "val")))


def read_data(
    arg: str, names: tuple[str, ...], words: tuple[str, ...] = (), table: dict = DATASETS
) -> Arguments:
    """Reads DATA and, in any order: some of `words`, another source. Raises as `read` does."""
    name, *given = arg.split(",")
    if name not in names:
        raise ValueError(f"expected the name of a data set, not {name!r}: {', '.join(names)}")
    data, found = table[name], []
    for word in given:
        if ":" in word:
            data = data._replace(source=word)
            if not word.startswith("tfds:"):  # where all training images are one split
                data = data._replace(train="train")
        elif word in words:
            found.append(word)
        else:
            known = ", ".join(("a source such as records:PATH", *words))
            raise ValueError(f"argument {arg!r}: {word!r} means nothing here; expected {known}")
    return Arguments(name, data, tuple(found))


def base() -> ConfigDict:
    """A config with its placeholders and empty sections."""
    config = ConfigDict(dict(seed=0, model={}, data={}, augment={}, optim={}, eval={}))
    config.total_steps = placeholder(int)
    config.total_epochs = placeholder(float)
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)
    # Parameters stay float32. On TPUs the published codes multiply in bfloat16 as well.
    config.precision = "bfloat16"
    return config


def fine_tuned(args: Arguments, size: int, dropout: float = 0.0) -> ConfigDict:
    """The section `model` for fine-tuning: what regularised the checkpoint is set anew.

    A ResNet has neither dropout nor stochastic depth.
    """
    model = ConfigDict(dict(variant=args.variant, image_size=(size, size)))
    if args.width:
        model.update(dropout=dropout, drop_path=0.0)
    return model


# What big_vision's configs do to images: decode_jpeg_and_inception_crop(224)|flip_lr for training,
# decode|resize_small(256)|central_crop(224) for evaluation; both cast to uint8, which cuts.
BIG_VISION_TRAIN = dict(
    inception_crop=dict(area=(0.05, 1.0), ratio=(0.75, 1.33)),
    resize="bilinear",
    resize_dtype="truncated",
    jpeg="fast",
    flip=True,
)
BIG_VISION_EVAL = dict(
    aspect="small", crop=0.875, resize="area", resize_dtype="truncated", jpeg="fast"
)


def big_vision_adam() -> ConfigDict:
    """AugReg's optimiser and its successors': warm-up, then a cosine; lr 0.001.

    The weight decay is big_vision's 0.0001, divided by the learning rate as optax has it.
    """
    return ConfigDict(
        dict(
            name="adamw",
            lr=1e-3,
            schedule="cosine",
            warmup=10_000.0,
            weight_decay=0.1,
            decayed="kernels",
            grad_clip=1.0,
            mu_dtype="bfloat16",
        )
    )


def sgd(warmup: float) -> ConfigDict:
    """The paper's optimiser for fine-tuning (Table 4); its momentum is kept as in both codes."""
    return ConfigDict(
        dict(
            name="sgd",
            lr=0.01,
            schedule="cosine",
            warmup=float(warmup),
            momentum=0.9,
            mu_dtype="bfloat16",
            grad_clip=1.0,
        )
    )


# Other labels and other images for the classes of ImageNet: arXiv 2006.07159 and 1902.10811.
IMAGENET = {
    "real": ("tfds:imagenet2012_real,label=real_label", "validation"),
    "v2": ("tfds:imagenet_v2/matched-frequency", "test"),
}
# big_vision's few-shot data sets (common_fewshot.py). The paper's own is ImageNet, five-shot.
FEW_SHOT = {
    "caltech": ("tfds:caltech101", "train", "test"),
    "cars": ("tfds:cars196:2.1.0", "train", "test"),
    "cifar100": ("tfds:cifar100", "train", "test"),
    "dtd": ("tfds:dtd", "train", "test"),
    "pets": ("tfds:oxford_iiit_pet", "train", "test"),
    "uc_merced": ("tfds:uc_merced", "train[:1000]", "train[1000:]"),
}
EVALUATORS = (*IMAGENET, "fewshot", "knn", "probe", "vtab")


def evaluators(args: Arguments, how: dict, few_shot_every: int | None = None) -> ConfigDict:
    """Sections of eval.evaluators for the words of an argument; most need data sets of their own.

    real, v2: ImageNet's other labels and images, read as `how` says. fewshot: the paper's linear
    few-shot accuracy on the data sets of FEW_SHOT, and on ImageNet if that is trained on. knn,
    probe: nearest neighbours and a linear probe on the data that is trained on. vtab: linear
    probes of all VTAB-1k tasks.
    """
    data, found = args.data, {}
    for name, (source, split) in IMAGENET.items():
        if name in args.words:
            test = dict(source=source, split=split, **how)
            found[name] = dict(type="classification", test=test)
    if "fewshot" in args.words:
        sets = dict(FEW_SHOT)
        if args.name == "imagenet":
            # In TFDS's order these have at least 30 images of each class.
            first = "train[:65000]" if data.source.startswith("tfds:") else "train[:5%]"
            sets["imagenet"] = (data.source, first, data.test)
        # decode|resize(256)|central_crop(224)
        squashed = dict(BIG_VISION_EVAL, aspect="squash", resize="bilinear")
        for name, (source, *splits) in sets.items():
            train, test = (dict(source=source, split=split, **squashed) for split in splits)
            section = dict(type="fewshot", train=train, test=test, every=few_shot_every)
            found[f"{name}_fewshot"] = dict(section, shots=(1, 5, 10, 25), seeds=3, l2=1024.0)
    tested = data.test is not None and "dev" not in args.words
    end = 100 if tested else 100 - data.held_out
    train, fitted, chosen, test = (
        dict(source=data.source, split=split, **how)
        for split in (
            data.part(0, end),
            data.part(0, end - 10),
            data.part(end - 10, end),
            data.test if tested else data.part(end, 100),
        )
    )
    if "knn" in args.words:
        found["knn"] = dict(type="knn", train=train, test=test)
    if "probe" in args.words:
        found["probe"] = dict(type="probe", train=fitted, val=chosen, test=dict(test))
    if "vtab" in args.words:
        found["vtab"] = dict(type="vtab")
    return ConfigDict(found)
