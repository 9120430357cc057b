"""A good plain ViT on ImageNet in hours: "Better plain ViT baselines", arXiv 2205.01580.

    vit-jax train --config=plain:S/16,imagenet --workdir=runs/plain_s16
    vit-jax train --config=plain:S/16,imagenet,real,v2 \\
        --workdir=runs/plain_s16_300 --config.total_epochs=300
    vit-jax train --config=plain:S/16,imagenet,fractals:classes=1000 \\
        --workdir=runs/plain_fractals --config.data.train.split=train --config.data.val.split=val \\
        --config.data.test=None --config.total_steps=10000 --config.optim.warmup=1000

The argument is VARIANT,imagenet[,EVALUATOR...][,SOURCE]; evaluators are real, v2, fewshot, knn,
probe, vtab.

Published for S/16: 76.5% at 90 epochs in 6 to 7 hours on a TPUv3-8, 80% at 300 epochs in less than
a day. What is known to matter, together about 10% over the paper's ImageNet recipe at 90 epochs: a
batch of 1,024, not 4,096; RandAugment (2, 10) and mixup of 0.2; the mean of the patches, not a
class token; fixed sine and cosine positions.

As in big_vision's vit_s16_i1k.py: a hidden layer before the head; Adam's first moment in bfloat16;
1% of the training images held out; evaluation by resize_small(256), central_crop(224).
"""

import presets


def get_config(arg="S/16,imagenet"):
    """VARIANT,imagenet[,EVALUATOR...][,SOURCE]"""
    args = presets.read(arg, ("imagenet",), presets.EVALUATORS, kind="vit")
    source, evaluated = args.data.source, presets.BIG_VISION_EVAL

    config = presets.base()
    config.batch_size = 1024
    config.total_epochs = 90.0

    config.model.variant = args.variant
    config.model.image_size = (args.size or 224,) * 2
    config.model.pool = "gap"
    config.model.position = "sincos2d"
    config.model.representation_size = args.width

    split = args.data.part(0, 99)
    config.data.train = dict(source=source, split=split, **presets.BIG_VISION_TRAIN)
    config.data.train.rand_augment = dict(layers=2, magnitude=10)
    config.data.val = dict(source=source, split=args.data.part(99, 100), **evaluated)
    config.data.test = dict(source=source, split=args.data.test, **evaluated)
    config.augment.mixup = 0.2

    config.optim = presets.big_vision_adam()

    config.eval.evaluators = presets.evaluators(args, evaluated)
    config.eval.every = 2500
    config.checkpoint = dict(every=1000, keep=2)
    config.log = dict(every=50)
    return config
