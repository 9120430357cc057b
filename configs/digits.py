"""A small ViT on real handwritten digits, from pixels to high-resolution fine-tuning.

    vit-jax train --config=digits --workdir=runs/digits
    vit-jax train --config=digits:finetune --workdir=runs/digits_16 \\
        --config.init_from=runs/digits

Data: the 1,797 images of 8x8 pixels that ship inside scikit-learn, split once and for all into
1,259 / 179 / 359 for training, validation and test. Nothing is downloaded.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg="pretrain"):
    """pretrain|finetune

    At 8x8 pixels, or such a run at 16x16, where the grid is 8x8 patches, not 4x4.
    """
    if arg not in ("pretrain", "finetune"):
        raise ValueError(f"argument {arg!r}: expected pretrain or finetune")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.total_steps = placeholder(int)
    config.total_epochs = 60.0
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)

    config.model = ConfigDict()
    config.model.variant = "mu/2"
    config.model.width = 64
    config.model.depth = 4
    config.model.mlp_dim = 128
    config.model.num_heads = 4
    config.model.in_channels = 1
    config.model.image_size = (8, 8)
    config.model.representation_size = 64

    config.data = ConfigDict()
    config.data.train = ConfigDict(dict(source="digits", split="train"))
    config.data.train.affine = ConfigDict(dict(degrees=10.0, translate=0.06, scale=(0.9, 1.1)))
    config.data.val = ConfigDict(dict(source="digits", split="val"))
    config.data.test = ConfigDict(dict(source="digits", split="test"))

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 3e-3
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 1.0

    config.eval = ConfigDict(dict(every=200))
    config.checkpoint = ConfigDict(dict(every=200, keep=2))
    config.log = ConfigDict(dict(every=50))

    if arg == "finetune":
        config.model = ConfigDict(dict(image_size=(16, 16)))
        config.total_epochs = 8.0
        config.optim.lr = 5e-4
    return config
