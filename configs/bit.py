"""BiT's fine-tuning of ResNets, "BiT-HyperRule": arXiv 1912.11370, section 3.3, and its code.

    vit-jax train --config=bit:R50x1,cifar10 --workdir=runs/bit_cifar10 \\
        --config.init_from=BiT-M-R50x1.npz
    vit-jax train --config=bit:R50x1,cifar100 --workdir=runs/bit_cifar100 \\
        --config.init_from=BiT-M-R50x1.npz --config.batch_size=128 --config.optim.lr=0.001
    vit-jax train --config=bit:R152x2,imagenet --workdir=runs/bit_r152 \\
        --config.init_from=BiT-M-R152x2.npz --config.optim.accumulate=8

The argument is VARIANT,DATA[,dev][,SIZE][,EVALUATOR...][,SOURCE]. DATA and `dev` are as in
configs/finetune.py. Nothing is to be chosen on `dev`: the rule takes the length of the run and
mixup from the number of images (IMAGES), the crop from their size. It is 128 pixels of 160 where
images are smaller than 96 x 96, as CIFAR's, else 480 of 512. SIZE 384 is cut out of 448, which the
paper has for all models but R152x4. For images of your own: a SOURCE, and the DATA next to it.

Published for BiT-M, from ImageNet-21k (big_transfer's README). By the second command, which it
found as good as the rule, medians in TensorFlow, JAX and PyTorch:

    R50x1    cifar10  97.2  97.3  97.4    cifar100  86.5  86.4  86.6
    R152x2   cifar10        98.5  98.5    cifar100        91.2  91.3
    R101x3   cifar10  98.5  98.4  98.6    cifar100  90.8  91.2  91.2

By the rule on ImageNet, in PyTorch: R50x1 80.68, R152x2 85.15. In the paper R152x4 reaches on
ImageNet 85.39, CIFAR-10 98.91, CIFAR-100 92.17, Pets 94.46, Flowers 99.30; from JFT-300M 87.54,
99.37, 93.51, 96.62, 99.63. Cost: not stated; eight V100s take R50x1's batch of ImageNet in four
parts (`--config.optim.accumulate=4`).

What is known to matter: the length of the run, which is regularisation enough: no weight decay, no
dropout. Mixup helps on mid-sized data, and not where images are few. The head starts at zero.

As in the code, not the paper: with few images the learning rate drops at 40, 60 and 80% of the
run, not at 30, 60 and 90%. As in the code, where the paper is silent: the warm-up; a drop comes one
step behind the named one; no clipping, momentum in float32; bilinear resizing without antialiasing
(in PyTorch with it); evaluation squashed to the size of the crop. In TensorFlow and JAX the code
leaves out what `dev` holds out even where it tests; here, as in PyTorch, all images are trained on.
Chosen here: both halves of Flowers that TFDS has.
"""

import presets

# Training images.
IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "cifar100": 50_000, "pets": 3_680}
IMAGES |= {"flowers": 2_040}


# Steps, those of warm-up, drops of the learning rate as shares of the run, mixup's alpha.
def _rule(images):
    if images < 20_000:
        return 500, 100, (0.4, 0.6, 0.8), 0.0
    return 10_000 if images < 500_000 else 20_000, 500, (0.3, 0.6, 0.9), 0.1


def get_config(arg="R50x1,cifar10"):
    """VARIANT,DATA[,dev][,SIZE][,EVALUATOR...][,SOURCE]"""
    args = presets.read(arg, tuple(IMAGES), ("dev", *presets.EVALUATORS), kind="resnet")
    data, small = args.data, args.name.startswith("cifar")
    size = args.size or (128 if small else 480)
    steps, warmup, drops, mixup = _rule(IMAGES[args.name])

    config = presets.base()
    config.batch_size = 512
    config.total_steps = steps

    config.model = presets.fine_tuned(args, size)

    how = dict(resize_dtype="float32", jpeg="fast", aspect="squash", crop=1.0, resize="bilinear")
    dev = "dev" in args.words
    split = data.part(0, 100 - data.held_out) if dev else data.train
    config.data.train = dict(source=data.source, split=split, **how)
    cut = 128 / 160 if small else {384: 384 / 448}.get(size, 480 / 512)
    config.data.train.update(crop=cut, random_crop=True, flip=True)
    if dev:
        held_out = data.part(100 - data.held_out, 100)
        config.data.val = dict(source=data.source, split=held_out, **how)
    else:
        config.data.test = dict(source=data.source, split=data.test, **how)
    config.augment.mixup = mixup

    config.optim = dict(name="sgd", momentum=0.9, lr=0.003)
    config.optim.schedule = "staircase"
    config.optim.warmup = float(warmup)
    config.optim.drops = drops
    config.optim.drop_factor = 0.1

    config.eval.evaluators = presets.evaluators(args, how)
    config.eval.every = 1000
    config.checkpoint = dict(every=1000, keep=2)
    config.log = dict(every=50)
    return config
