"""AugReg's fine-tuning: arXiv 2106.10270, section 3.5, as big_vision's transfer.py has it.

    vit-jax train --config=transfer:B/32,cifar10 --workdir=runs/b32_cifar10 \\
        --config.init_from=B_32.npz --config.optim.lr=0.003
    vit-jax train --config=transfer:B/32,pets,dev,inception_crop \\
        --workdir=runs/b32_pets --config.init_from=B_32.npz

The argument is VARIANT,DATA[,dev][,CROP][,SIZE][,EVALUATOR...][,SOURCE]. DATA and `dev` are as in
configs/finetune.py. CROP is `resmall_crop` (the shorter side to 448, any 384 x 384 of it; the
default), `resize_crop` (squashed to 448 x 448 first) or `inception_crop`.

Published for B/32 from ImageNet-21k, mean and range of 5 runs, with the crop and the learning rate
that were best on the held-out images:

    imagenet  inception_crop  0.03   83.27  83.22 - 83.33
    cifar10   resmall_crop    0.003  98.55  98.46 - 98.60
    cifar100  resmall_crop    0.01   91.35  91.09 - 91.62
    pets      inception_crop  0.003  93.78  93.62 - 94.00
    flowers   inception_crop  0.003  99.43  99.42 - 99.45

They held out what `dev` holds out and did not train on it for these numbers: name `dev` and set
`--config.data.test` to get both. Of Flowers they take the half that TFDS calls train. What is known
to matter: the learning rate and the crop, so both are chosen on `dev`. No dropout or stochastic
depth, no weight decay, momentum in bfloat16. ResNets and hybrids take the same; what hybrids reach
on ImageNet is in configs/augreg.py.
"""

import presets

CROPS = ("resmall_crop", "resize_crop", "inception_crop")


def get_config(arg="B/32,cifar10"):
    """VARIANT,DATA[,dev][,CROP][,SIZE][,EVALUATOR...][,SOURCE]"""
    names = ("cifar10", "cifar100", "imagenet", "pets", "flowers")
    args = presets.read(arg, names, ("dev", *CROPS, *presets.EVALUATORS))
    data, size = args.data, args.size or 384
    if args.name == "flowers":
        data = data._replace(train="train")
    crop = next((word for word in args.words if word in CROPS), "resmall_crop")

    config = presets.base()
    config.batch_size = 512
    config.total_steps = data.steps

    config.model = presets.fine_tuned(args, size)

    # 384 of 448; resize_small and its kin cast to uint8, which cuts.
    evaluated = dict(presets.BIG_VISION_EVAL, crop=384 / 448)
    if crop == "inception_crop":
        how = presets.BIG_VISION_TRAIN
    elif crop == "resmall_crop":
        how = dict(evaluated, random_crop=True, flip=True)
    else:
        how = dict(evaluated, aspect="squash", resize="bilinear", random_crop=True, flip=True)
    dev = "dev" in args.words
    split = data.part(0, 100 - data.held_out) if dev else data.train
    config.data.train = dict(source=data.source, split=split, **how)
    if dev:
        held_out = data.part(100 - data.held_out, 100)
        config.data.val = dict(source=data.source, split=held_out, **evaluated)
    else:
        config.data.test = dict(source=data.source, split=data.test, **evaluated)

    config.optim = presets.sgd(data.warmup)

    config.eval.evaluators = presets.evaluators(args, evaluated)
    config.eval.every = 100
    config.checkpoint = dict(every=1000, keep=2)
    config.log = dict(every=10)
    return config
