"""Object detection: boxes by FCOS's head on ViTDet's simple pyramid of a ViT.

    vit-jax train --config=detect --workdir=runs/scenes
    vit-jax train --config=detect:B/16,coco:/data/coco --workdir=runs/coco \\
        --config.init_from=B_16.npz
    vit-jax evaluate --workdir=runs/coco

Without an argument, a small ViT learns scenes of two digits that may hide each other, which are
made on the spot, in 20 minutes of one core: after 3,000 steps it has an AP of 0.670 and an AP50 of
0.922 on scenes of other digits (seed 0). Of one digit, at 48 pixels, 2,000 steps (5 minutes) give
an AP of 0.824, 0.820 and 0.819, and an AP50 of 0.989, 0.986 and 0.992 (seeds 0, 1 and 2). The
argument is [VARIANT,]SOURCE[,TRAIN,VAL], a source with boxes: images of 512x512 pixels, from
`init_from`, whose model it is without a VARIANT. Images and boxes are scaled by 0.5 to 2, cut out
anywhere and mirrored. The pyramid has 256 channels and each tower of the head four convolutions, as
ViTDet's and FCOS's. Evaluation is COCO's, by pycocotools (the extra `detection`), in pixels of each
image's own size: map, ap50, ap75, by size, and ap/NAME of each class.
"""

import presets
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg="scenes:digits,size=64,objects=2,labels=boxes"):
    """[VARIANT,]SOURCE[,TRAIN,VAL]

    A source with boxes, which may itself have commas.
    """
    own = presets.read_own(arg)
    small = own.source.startswith("scenes:") and not own.variant

    config = ConfigDict()
    config.seed = 0
    config.objective = "detection"
    config.batch_size = 32 if small else 16
    config.total_steps = 3000 if small else 20_000
    config.total_epochs = placeholder(float)
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)

    config.model = ConfigDict(dict(variant=own.variant) if own.variant else {})
    if small:
        config.model.update(variant="mu/8", width=64, depth=4, mlp_dim=128, num_heads=4)
        config.model.update(in_channels=1, image_size=(64, 64), pyramid=32, towers=1)
    else:
        config.model.image_size = (512, 512)

    config.data = ConfigDict(dict(max_boxes=100))
    config.data.train = ConfigDict(dict(source=own.source, split=own.train))
    if small and "objects=2," in own.source:
        config.data.max_boxes = 8
    if small and "examples=" not in own.source:
        config.data.train.source += ",examples=64000"
    if not small:
        config.data.train.update(random_scale=(0.5, 2.0), flip=True)
    config.data.val = ConfigDict(dict(source=own.source, split=own.val))

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 3e-3 if small else 1e-4
    config.optim.schedule = "cosine" if small else "linear"
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.1 if small else 0.05
    config.optim.grad_clip = 1.0

    config.eval = ConfigDict(dict(every=500 if small else 2000))
    config.checkpoint = ConfigDict(dict(every=500 if small else 2000, keep=2))
    config.log = ConfigDict(dict(every=50))
    return config
