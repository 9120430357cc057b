"""A small ViT pre-trained on fractals, which are made by formula, then fine-tuned on digits.

    vit-jax train --config=fractals --workdir=runs/fractals
    vit-jax train --config=fractals:digits --workdir=runs/fractals_digits \\
        --config.init_from=runs/fractals
    vit-jax train --config=fractals:digits --workdir=runs/digits_scratch

Data: 100 classes of random iterated function systems, 16x16 pixels, grey, never the same image
twice ("Pre-training without Natural Images", arXiv 2101.08515); then scikit-learn's digits at
24x24 pixels, where the grid is 6x6, not 4x4. Nothing is downloaded. Seen on two CPU cores, means of
three seeds: after 1, 3 and 10 passes over the digits 27.8, 36.9 and 64.1% from scratch, and 37.3,
62.7 and 93.3% from fractals (experiments/transfer has real images). At scale the same line is
`fractals:classes=1000,size=224` with images:B/16,fractals:classes=1000,size=224.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

FRACTALS = "fractals:classes=100,size=16,color=false"


def get_config(arg="pretrain"):
    """pretrain|digits

    On fractals, or on digits: from init_from or, without it, from scratch.
    """
    if arg not in ("pretrain", "digits"):
        raise ValueError(f"argument {arg!r}: expected pretrain or digits")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.total_steps = placeholder(int)
    config.total_epochs = placeholder(float)
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)

    config.model = ConfigDict()
    config.model.variant = "mu/4"
    config.model.width = 64
    config.model.depth = 4
    config.model.mlp_dim = 128
    config.model.num_heads = 4
    config.model.in_channels = 1

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 1.0

    config.data = ConfigDict()
    if arg == "pretrain":
        config.total_steps = 2000
        config.model.image_size = (16, 16)
        config.data.train = ConfigDict(dict(source=FRACTALS, split="train"))
        config.data.val = ConfigDict(dict(source=FRACTALS, split="val"))
        config.optim.lr = 2e-3
    else:
        config.total_epochs = 10.0
        config.model.image_size = (24, 24)
        config.data.train = ConfigDict(dict(source="digits", split="train"))
        config.data.train.affine = ConfigDict(dict(degrees=10.0, translate=0.06, scale=(0.9, 1.1)))
        config.data.val = ConfigDict(dict(source="digits", split="val"))
        config.data.test = ConfigDict(dict(source="digits", split="test"))
        config.optim.lr = 1e-3

    config.eval = ConfigDict(dict(every=500))
    config.checkpoint = ConfigDict(dict(every=500, keep=2))
    config.log = ConfigDict(dict(every=50))
    return config
