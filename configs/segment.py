"""Semantic segmentation: the class of each pixel, by a linear head on the patches of a ViT.

    vit-jax train --config=segment --workdir=runs/scenes
    vit-jax train --config=segment:B/16,pairs:/data/streets --workdir=runs/streets \\
        --config.init_from=B_16.npz
    vit-jax evaluate --workdir=runs/streets

Without an argument, a small ViT learns scenes of digits, which are made on the spot, in minutes on
a laptop: after 1,000 steps it has an mIoU of 0.273, 0.289 and 0.283 on scenes of other digits
(seeds 0, 1 and 2), where background everywhere has 0.067. The argument is
[VARIANT,]SOURCE[,TRAIN,VAL], a source with masks: images of 512x512 pixels, from `init_from`, whose
model it is without a VARIANT. Images and masks are scaled by 0.5 to 2, cut out anywhere and
mirrored; the linear decay of the rate is mmsegmentation's. The logits of the patches are
interpolated bilinearly to the masks' size; evaluation is exact over the set, at the masks' own
size: miou, pixel_accuracy, and iou/NAME of each class.
"""

import presets
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg="scenes:digits,size=48"):
    """[VARIANT,]SOURCE[,TRAIN,VAL]

    A source with masks, which may itself have commas.
    """
    own = presets.read_own(arg)
    small = own.source.startswith("scenes:") and not own.variant

    config = ConfigDict()
    config.seed = 0
    config.objective = "segmentation"
    config.batch_size = 32 if small else 16
    config.total_steps = 1000 if small else 20_000
    config.total_epochs = placeholder(float)
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)

    config.model = ConfigDict(dict(variant=own.variant) if own.variant else {})
    if small:
        config.model.update(variant="mu/4", width=64, depth=4, mlp_dim=128, num_heads=4)
        config.model.update(in_channels=1, image_size=(48, 48))
    else:
        config.model.image_size = (512, 512)

    config.data = ConfigDict()
    config.data.train = ConfigDict(dict(source=own.source, split=own.train))
    if small and "examples=" not in own.source:
        config.data.train.source += ",examples=32000"
    if not small:
        config.data.train.update(random_scale=(0.5, 2.0), flip=True)
    config.data.val = ConfigDict(dict(source=own.source, split=own.val))
    if small:
        config.data.test = ConfigDict(dict(source=own.source, split="test"))

    config.augment = ConfigDict(dict(dice=0.0))

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 2e-3 if small else 1e-4
    config.optim.schedule = "cosine" if small else "linear"
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.1 if small else 0.05
    config.optim.grad_clip = 1.0

    config.eval = ConfigDict(dict(every=500 if small else 2000))
    config.checkpoint = ConfigDict(dict(every=500 if small else 2000, keep=2))
    config.log = ConfigDict(dict(every=50))
    return config
