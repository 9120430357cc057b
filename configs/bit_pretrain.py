"""BiT's pre-training of ResNets by SGD: arXiv 1912.11370, section 3.3; and big_vision's form of it.

    vit-jax train --config=bit_pretrain:R50x1,imagenet --workdir=runs/bit_s
    vit-jax train --workdir=runs/bit_m \\
        --config=bit_pretrain:R152x2,imagenet21k,records:shards/imagenet21k
    vit-jax train --workdir=runs/bit_cosine \\
        --config=bit_pretrain:R50x1,imagenet,cosine,real,v2

The argument is VARIANT,DATA[,cosine][,EVALUATOR...][,SOURCE]. DATA is `imagenet` (BiT-S),
`imagenet21k` (BiT-M) or `jft` (BiT-L). With `cosine` it is big_vision's bit_i1k.py or bit_i21k.py,
of which there is none for JFT-300M.

Published: R50x1 on ImageNet 76.0% (Table 4). R152x4 after configs/bit.py on ImageNet: BiT-S 81.30%,
BiT-M 85.39%, BiT-L 87.54%. Cost: R152x4 on JFT-300M 9,900 TPUv3-core-days (arXiv 2010.11929, Table
2); R50x1 on ImageNet with `cosine` 32 minutes on a TPUv3-128.

What is known to matter (section 4.2): long runs on large data, where little seems to happen before
the learning rate drops; and the weight decay: less of it looks better at first and ends worse. The
learning rate is 0.03 for 256 images, here 0.48.

Not said by the paper: how weight decay is meant. Here 1e-4 is taken as a part of the gradient,
which momentum of 0.9 repeats tenfold: decoupled, and multiplied by the learning rate, that is 1e-3,
to which big_vision's absolute numbers come too. As big_vision has it: kernels alone are decayed; a
sigmoid loss with a head bias of -10 where images have more than one true class; evaluation by
resize_small(256), central_crop(224); momentum in bfloat16. Chosen here: 1% is held out. The paper's
ResNets are of version 2, big_vision's on ImageNet of version 1 (`--config.model.resnet_style=v1`).
"""

import presets


def get_config(arg="R50x1,imagenet"):
    """VARIANT,DATA[,cosine][,EVALUATOR...][,SOURCE]"""
    names = ("imagenet", "imagenet21k", "jft")
    args = presets.read(arg, names, ("cosine", *presets.EVALUATORS), kind="resnet")
    data, cosine = args.data, "cosine" in args.words
    if cosine and args.name == "jft":
        raise ValueError(f"argument {arg!r}: cosine goes with imagenet or imagenet21k")
    epochs, drops = (40, (10, 23, 30, 37)) if args.name == "jft" else (90, (30, 60, 80))

    config = presets.base()
    config.batch_size = 4096
    config.total_epochs = float(epochs)

    config.model.variant = args.variant
    config.model.image_size = (args.size or 224,) * 2
    if args.name != "imagenet":
        config.objective = "sigmoid"
        config.model.head_bias = -10.0

    train, val = data.part(0, 99), data.part(99, 100)
    config.data.train = dict(source=data.source, split=train, **presets.BIG_VISION_TRAIN)
    config.data.val = dict(source=data.source, split=val, **presets.BIG_VISION_EVAL)
    if data.test is not None:
        config.data.test = dict(source=data.source, split=data.test, **presets.BIG_VISION_EVAL)

    config.optim = dict(name="sgd", momentum=0.9, mu_dtype="bfloat16")
    config.optim.update(weight_decay=1e-3, decayed="kernels", warmup=5000.0)
    config.optim.lr = 0.03 * 4096 / 256
    if cosine:
        config.optim.update(schedule="cosine", grad_clip=1.0)
        if args.name == "imagenet":
            config.optim.update(lr=0.1 * 4096 / 256, warmup=1000.0)
    else:
        config.optim.schedule = "staircase"
        config.optim.drops = tuple(epoch / epochs for epoch in drops)

    config.eval.evaluators = presets.evaluators(args, presets.BIG_VISION_EVAL, 25_000)
    config.eval.every = 1000
    config.checkpoint = dict(every=1000, keep=2)
    config.log = dict(every=50)
    return config
