"""A small ViT from scratch on 60,000 photographs of garments, Fashion-MNIST (arXiv 1708.07747).

    python experiments/packages.py fashion_mnist
    vit-jax train --config=fashion_mnist --workdir=runs/garments

Images are grey, 28 x 28, in 49 patches of 4 x 4. Five per cent of `train` are held out as `val`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

IMAGES = "idx:data/fashion_mnist"


def get_config(arg=""):
    """No argument."""
    if arg:
        raise ValueError(f"argument {arg!r}: expected none")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.total_steps = placeholder(int)
    config.total_epochs = 40.0
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)

    config.model = ConfigDict()
    config.model.variant = "mu/4"
    config.model.width = 128
    config.model.depth = 6
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.pool = "gap"
    config.model.drop_path = 0.1
    config.model.in_channels = 1
    config.model.image_size = (28, 28)

    config.data = ConfigDict()
    config.data.train = ConfigDict(dict(source=IMAGES, split="train[:95%]"))
    config.data.train.update(random_crop=True, crop_padding=2, aspect="keep", flip=True)
    config.data.train.erasing = 0.25
    config.data.val = ConfigDict(dict(source=IMAGES, split="train[95%:]"))
    config.data.test = ConfigDict(dict(source=IMAGES, split="test"))
    config.augment = ConfigDict(dict(label_smoothing=0.1))

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.05
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 1.0

    config.eval = ConfigDict(dict(every=1781, batch_size=256))  # every fourth epoch
    config.checkpoint = ConfigDict(dict(every=445, keep=2))
    config.log = ConfigDict(dict(every=100))
    return config
