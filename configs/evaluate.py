"""What a model is worth, without training it: for `evaluate --model`.

    vit-jax evaluate --model=B_16.npz --config=evaluate:imagenet
    vit-jax evaluate --model=B_16.npz \\
        --config=evaluate:imagenet,classify,real,v2
    vit-jax evaluate --model=B_16.npz --config=evaluate:pets,knn,probe,vtab

The argument is DATA[,WHAT...][,SOURCE]; DATA is imagenet, cifar10, cifar100, pets or flowers.
WHAT is `classify` (the default): accuracy on the test images of DATA, whose classes the model has;
`real` and `v2`: other labels and images of ImageNet; `knn`, `probe`: nearest neighbours and a
linear probe of its frozen features on DATA; `fewshot`: the paper's few-shot accuracy on seven data
sets; `vtab`: linear probes of VTAB-1k's 19 tasks. Images are prepared as the model's own
preprocessing says, but for few-shot and VTAB, which squash them.

The argument `scenes` asks what patches know, in minutes on a laptop and without a download:

    vit-jax evaluate --model=runs/digits --config=evaluate:scenes
    vit-jax evaluate --model=runs/fractals \\
        --config=evaluate:scenes,scenes:fractals,objects=2

A linear classifier of patches learns the masks of scenes of digits, or of another source of masks,
and is measured in mIoU (type segmentation). Scenes are squashed to the model's size.
"""

import presets
from ml_collections import ConfigDict


def get_config(arg="imagenet"):
    """DATA[,WHAT...][,SOURCE], or scenes[,SOURCE]"""
    name, _, source = arg.partition(",")
    if name == "scenes":
        return scenes(source or "scenes:digits")
    names = ("imagenet", "cifar10", "cifar100", "pets", "flowers")
    args = presets.read_data(arg, names, ("classify", *presets.EVALUATORS))
    config = ConfigDict(dict(batch_size=256, data={}, eval={}))
    if "classify" in args.words or not args.words:
        config.data.test = dict(source=args.data.source, split=args.data.test)
    config.eval.evaluators = presets.evaluators(args, {})
    return config


def scenes(source):
    """A linear classifier of patches on 1000 scenes, its l2 chosen on others."""
    if ":" not in source:
        raise ValueError(f"{source!r} is no source of masks; expected such as scenes:fractals")
    config = ConfigDict(dict(batch_size=64, data={}, eval={}))
    splits = {
        split: dict(source=source, split=split, aspect="squash", crop=1.0)
        for split in ("train", "val", "test")
    }
    head = dict(type="segmentation", **splits, l2=(1e-5, 1e-4, 1e-3, 1e-2), steps=100)
    config.eval.evaluators = ConfigDict(dict(scenes=head))
    return config
