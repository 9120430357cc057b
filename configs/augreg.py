"""AugReg's pre-training, "How to train your ViT?": arXiv 2106.10270, as big_vision published it.

    vit-jax train --config=augreg:B/16,imagenet --workdir=runs/augreg_b16
    vit-jax train --workdir=runs/augreg_s16 --config.total_epochs=30 \\
        --config=augreg:S/16,imagenet21k,light2,records:shards/imagenet21k

The argument is VARIANT,DATA[,AUGMENTATION][,EVALUATOR...][,SOURCE]. DATA is `imagenet` or
`imagenet21k`; AUGMENTATION is one of the paper's seven settings: none, light1, light2, medium1,
medium2, strong1, strong2. Without one it is what the authors' configs choose for the variant and
data (B/16: medium2 and light2). Those have no hybrids: from ImageNet-21k R+Ti/16, R26+S/32 and
R50+L/32 get the settings of their best checkpoints, else hybrids get what their ViT does. The
evaluators are in configs/presets.py. The paper's other axes: `--config.model.dropout=0.1
--config.model.drop_path=0.1`, `--config.optim.weight_decay=0.03`.

Published, from ImageNet-21k and fine-tuned on ImageNet at 384 pixels (the table of checkpoints in
vit_jax's README): Ti/16 78.22%, S/32 79.58%, S/16 83.73%, B/32 83.59%, B/16 85.49%, L/16 85.59%,
R+Ti/16 75.40%, R26+S/32 83.85%, R50+L/32 85.99%. Those are the best of all settings (B/16:
medium1). From ImageNet alone (Table 3), at 224 pixels and fine-tuned at 384: Ti/16 72.59, 74.64;
S/32 72.07, 75.65; S/16 79.00, 80.70; B/32 74.42, 76.60; B/16 79.84, 81.63; L/16 75.72, 77.21;
R+Ti/16 70.13, 73.48; R26+S/32 79.61, 81.55; R50+L/32 76.84, 76.71. Cost: not stated for single
runs.

What is known to matter: more augmentation helps where images are few for the model and its epochs,
and hurts otherwise. A weight decay of 0.1 is 0.0001 as big_vision counts, which does not multiply
it by the learning rate of 0.001; 0.03 works as well. light1 is not nothing: RandAugment of
magnitude 0 still changes images. Learned positions start as elsewhere here, with a deviation of
0.02 and a row for the class token; big_vision's have 1 / sqrt(width) and none.

As in the authors' big_vision configs, not in their paper: on ImageNet a class token and a hidden
layer before the head, on ImageNet-21k the mean of the patches and none; a sigmoid loss with a head
bias of -10 there; Adam's first moment in bfloat16; evaluation by resize_small(256) and
central_crop(224); the images held out, which here are 1% of both.
"""

import presets

# RandAugment's (layers, magnitude) and mixup's alpha: the paper's section 3.3.
AUGMENTATIONS = {
    "none": (None, 0.0),
    "light1": ((2, 0), 0.0),
    "light2": ((2, 10), 0.2),
    "medium1": ((2, 15), 0.2),
    "medium2": ((2, 15), 0.5),
    "strong1": ((2, 20), 0.5),
    "strong2": ((2, 20), 0.8),
}
CHOSEN = {
    "imagenet": {"Ti/16": "light1", "S/32": "light2"},
    "imagenet21k": {
        "Ti/16": "none",
        "S/32": "none",
        "S/16": "light1",
        "B/32": "light2",
        "B/16": "light2",
    },
}
# Hybrids' best checkpoints from ImageNet-21k (vit_jax's README): augmentation, weight decay, and
# the rate of dropout and of stochastic depth.
HYBRIDS = {
    "R+Ti/16": ("none", 0.03, 0.0),
    "R26+S/32": ("light1", 0.1, 0.0),
    "R50+L/32": ("medium1", 0.1, 0.1),
}


def get_config(arg="B/16,imagenet"):
    """VARIANT,DATA[,AUGMENTATION][,EVALUATOR...][,SOURCE]"""
    words = (*AUGMENTATIONS, *presets.EVALUATORS)
    args = presets.read(arg, ("imagenet", "imagenet21k"), words, kind="vit")
    data, many = args.data, args.name == "imagenet21k"
    chosen = CHOSEN[args.name].get(args.variant.rpartition("+")[2], "medium2")
    weight_decay, dropout = 0.1, 0.0
    if many and args.variant in HYBRIDS:
        chosen, weight_decay, dropout = HYBRIDS[args.variant]
    named = [word for word in args.words if word in AUGMENTATIONS]
    rand_augment, mixup = AUGMENTATIONS[named[-1] if named else chosen]

    config = presets.base()
    config.batch_size = 4096
    config.total_epochs = 300.0

    config.model.variant = args.variant
    config.model.image_size = (args.size or 224,) * 2
    config.model.dropout = config.model.drop_path = dropout
    if many:
        config.objective = "sigmoid"
        config.model.head_bias = -10.0
        config.model.pool = "gap"
    else:
        config.model.pool = "token"
        config.model.representation_size = args.width

    train, val = data.part(0, 99), data.part(99, 100)
    config.data.train = dict(source=data.source, split=train, **presets.BIG_VISION_TRAIN)
    if rand_augment:
        layers, magnitude = rand_augment
        config.data.train.rand_augment = dict(layers=layers, magnitude=magnitude)
    config.data.val = dict(source=data.source, split=val, **presets.BIG_VISION_EVAL)
    config.augment.mixup = mixup

    config.optim = presets.big_vision_adam()
    config.optim.weight_decay = weight_decay

    config.eval.every = 2500
    config.eval.evaluators = presets.evaluators(args, presets.BIG_VISION_EVAL, 10_000)
    if not many:
        config.data.test = dict(source=data.source, split=data.test, **presets.BIG_VISION_EVAL)
    config.checkpoint = dict(every=1000, keep=2)
    config.log = dict(every=50)
    return config
