"""Self-supervised pre-training by masked patch prediction: arXiv 2010.11929, sections 4.6, B.1.2.

    vit-jax train --config=masked:B/16,imagenet --workdir=runs/masked_b16
    vit-jax train --workdir=runs/masked_b16_jft \\
        --config=masked:B/16,jft,records:shards/mine
    vit-jax train --config=finetune:B/16,imagenet --workdir=runs/b16 \\
        --config.init_from=runs/masked_b16
    vit-jax train --config=masked:fractals --workdir=runs/masked
    vit-jax train --config=fractals:digits --workdir=runs/masked_digits \\
        --config.init_from=runs/masked

The argument is VARIANT,DATA[,small|pixels][,fewshot][,knn][,probe][,vtab][,SOURCE] with DATA one of
`imagenet`, `imagenet21k`, `jft` as in configs/pretrain.py, whose labels are not read; or
`fractals`, the small model and the grey pictures of configs/fractals.py, at 16x16 pixels. What is
predicted of each corrupted patch is its mean colour in 3 bits a channel, the patch shrunk to 4x4
pixels in 3 bits a channel (`small`), or all of its pixels (`pixels`).

Published, B/16 on JFT-300M, then fine-tuned: 79.9% on ImageNet, 2% above training from scratch, 4%
below supervised pre-training. One million steps of 4096 images.

What is known to matter: less than one may expect. All three targets work; that of pixels is
slightly worse. The number that says how a run goes is not its loss but a few-shot accuracy
(`fewshot`), which reads the class token though nothing trains that directly.

Not said by the paper, and so chosen here: the other patch that may replace one is of the same
image; no weight decay, no dropout, no clipping; inception crops and flips, as for supervised
pre-training; the images held out, on which the same prediction is measured.
"""

import fractals
import presets

OBJECTIVES = {"small": "masked_small", "pixels": "masked_pixels"}
EVALUATORS = ("fewshot", "knn", "probe", "vtab")


def get_config(arg="B/16,imagenet"):
    """VARIANT,DATA[,small|pixels][,EVALUATOR...][,SOURCE], or fractals[,small|pixels]"""
    name, _, word = arg.partition(",")
    if name == "fractals":
        if word not in ("", *OBJECTIVES):
            raise ValueError(
                f"argument {arg!r}: expected fractals, fractals,small, fractals,pixels"
            )
        config = fractals.get_config()
        config.objective = OBJECTIVES.get(word, "masked_colour")
        return config

    words = (*OBJECTIVES, *EVALUATORS)
    args = presets.read(arg, ("imagenet", "imagenet21k", "jft"), words, kind="vit")
    targets = [OBJECTIVES[word] for word in args.words if word in OBJECTIVES]
    if len(targets) > 1:
        raise ValueError(f"argument {arg!r}: small and pixels exclude each other")

    config = presets.base()
    config.batch_size = 4096
    config.total_steps = 1_000_000
    config.objective = targets[0] if targets else "masked_colour"

    config.model.variant = args.variant
    config.model.image_size = (args.size or 224,) * 2

    source = args.data.source
    config.data.train = dict(source=source, split=args.data.part(0, 99))
    config.data.train.update(jpeg="fast", flip=True)
    config.data.train.inception_crop = dict(area=(0.05, 1.0), ratio=(0.75, 1.33))
    how = dict(resize_dtype="float32", jpeg="fast")
    config.data.val = dict(source=source, split=args.data.part(99, 100), **how)

    config.optim.name = "adam"
    config.optim.lr = 2e-4
    config.optim.schedule = "cosine"
    config.optim.warmup = 10_000.0

    config.eval.evaluators = presets.evaluators(args, how)
    config.eval.every = 5000
    config.checkpoint = dict(every=1000, keep=2)
    config.log = dict(every=50)
    return config
