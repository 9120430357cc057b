"""The paper's supervised pre-training: arXiv 2010.11929, section 4.1 and Table 3.

    vit-jax train --config=pretrain:B/16,imagenet --workdir=runs/b16_imagenet
    vit-jax train --workdir=runs/b16_imagenet21k \\
        --config=pretrain:B/16,imagenet21k,records:shards/imagenet21k
    vit-jax train --workdir=runs/l16 \\
        --config=pretrain:L/16,jft,records:shards/mine
    vit-jax train --workdir=runs/r50 \\
        --config=pretrain:R50x1,jft,records:shards/mine

The argument is VARIANT,DATA[,EVALUATOR...][,SOURCE]. DATA is `imagenet`, `imagenet21k`, or `jft`
for a private set of that size, in the shards of `prepare`. It chooses Table 3's row: epochs,
learning rate, its decay, weight decay, dropout. For variants not in the table, B's row is taken;
for ResNets from `jft`, the row of the nearest depth. From the other two the paper trained none: it
compares with BiT's, which configs/bit_pretrain.py trains.

Published: after fine-tuning at 384 pixels on ImageNet (Table 5), from ImageNet alone B/16 77.91%,
B/32 73.38%, L/16 76.53%, L/32 71.16%; from ImageNet-21k B/16 83.97%, B/32 81.28%, L/16 85.15%,
L/32 80.99%, H/14 85.13%; from JFT-300M B/16 84.15%, B/32 80.73%, L/16 87.12%, L/32 84.37%, H/14
88.04%. From JFT-300M at 7 epochs (Table 6) R50x1 77.54%, R50x2 82.12%, R101x1 80.67%, R152x1
81.88%, R152x2 84.97%, R50+B/32 84.90%, R50+B/16 85.58%, R50+L/32 85.68%, R50+L/16 86.60%; at 14
R152x2 85.56%, R200x3 87.22%, R50+L/16 87.12%. Cost (Table 2): L/16 on ImageNet-21k 230
TPUv3-core-days, L/16 on JFT 680, H/14 2,500; of all on JFT in exaFLOPs, Table 6.

What is known to matter: the strong weight decay. It is decoupled and, as in optax, multiplied by
the learning rate: 0.1 at 8e-4 takes 8e-5 of each kernel a step (big_vision writes 8e-5). From
ImageNet alone, AugReg's recipe (configs/augreg.py) is far better than this one. Adam is for ResNets
as well: from JFT-300M and fine-tuned, the mean of five data sets is 89.33% for R50x1 by Adam and
88.79% by BiT's SGD, 94.01% and 93.72% for R152x2 (Table 7).

Not said by the paper, and so chosen here as its authors' later code has it: kernels alone are
decayed; no label smoothing (section 4.3 tunes it on small data); inception crops and flips; a
sigmoid loss with a head bias of -10 where images have more than one true class (ImageNet-21k, JFT);
`linear` ends at 1e-5; the images held out; ResNets of version 2, as BiT's. Evaluation squashes
images to the model's size, as vit_jax does.
"""

import presets

# Table 3's rows of JFT-300M: epochs and learning rate. L/16 and R50+L/16 also for 7, R152x2 for 14.
JFT = {
    "L/32": (7, 6e-4),
    "L/16": (14, 4e-4),
    "H/14": (14, 3e-4),
    "R50+L/32": (7, 2e-4),
    "R50+L/16": (14, 4e-4),
    **dict.fromkeys(("R26x1", "R50x1", "R50x2", "R50x3"), (7, 1e-3)),
    **dict.fromkeys(("R101x1", "R101x3"), (7, 8e-4)),
    **dict.fromkeys(("R152x1", "R152x2", "R152x4"), (7, 6e-4)),
    "R200x3": (14, 6e-4),  # its epochs: section 4.4
}


# Table 3: epochs, learning rate, decay, weight decay, dropout.
def _row(name, variant):
    if name == "imagenet":
        return 300, 3e-3, "cosine", 0.3, 0.1
    if name == "imagenet21k":
        return 90, 1e-3, "linear", 0.03, 0.1  # L also for 30 epochs
    epochs, lr = JFT.get(variant, (7, 8e-4))
    return epochs, lr, "linear", 0.1, 0.0


def get_config(arg="B/16,imagenet"):
    """VARIANT,DATA[,EVALUATOR...][,SOURCE]"""
    args = presets.read(arg, ("imagenet", "imagenet21k", "jft"), presets.EVALUATORS)
    epochs, lr, schedule, weight_decay, dropout = _row(args.name, args.variant)
    source, many = args.data.source, args.name != "imagenet"

    config = presets.base()
    config.batch_size = 4096
    config.total_epochs = float(epochs)

    config.model.variant = args.variant
    config.model.image_size = (args.size or 224,) * 2
    if args.width:  # a ResNet has neither
        config.model.representation_size = args.width
        config.model.dropout = dropout
    if many:
        config.objective = "sigmoid"
        config.model.head_bias = -10.0

    config.data.train = dict(source=source, split=args.data.part(0, 99))
    config.data.train.update(jpeg="fast", flip=True)
    config.data.train.inception_crop = dict(area=(0.05, 1.0), ratio=(0.75, 1.33))
    how = dict(resize_dtype="float32", jpeg="fast")
    config.data.val = dict(source=source, split=args.data.part(99, 100), **how)

    config.optim.name = "adamw"
    config.optim.lr = lr
    config.optim.schedule = schedule
    config.optim.warmup = 10_000.0
    config.optim.weight_decay = weight_decay
    config.optim.decayed = "kernels"
    if schedule == "linear":
        config.optim.end_lr = 1e-5
    if args.name == "imagenet":
        config.optim.grad_clip = 1.0
        config.data.test = dict(source=source, split=args.data.test, **how)

    config.eval.evaluators = presets.evaluators(args, how)
    config.eval.every = 5000
    config.checkpoint = dict(every=1000, keep=2)
    config.log = dict(every=50)
    return config
