"""VTAB-1k: each of 19 tasks fine-tuned on 1,000 images (arXiv 1910.04867), as in the ViT paper.

    vit-jax train --config=vtab:B/16,pets --workdir=runs/vtab/pets \\
        --config.init_from=B_16.npz
    vit-jax sweep experiments/recipes/vtab_sweep.py:B/16,B_16.npz --workdir=runs/vtab  # all tasks

The argument is VARIANT,TASK[,dev][,SIZE]. Tasks, natural: caltech101 cifar100 dtd flowers102 pets
sun397 svhn; specialized: patch_camelyon eurosat resisc45 diabetic_retinopathy; structured:
clevr_count clevr_distance dmlab kitti_distance dsprites_location dsprites_orientation
smallnorb_azimuth smallnorb_elevation. Each is read where tensorflow-datasets prepares it. With
`dev` a model is trained on 800 images and evaluated on the other 200; without, it is trained on all
1,000 and tested on the benchmark's test images.

Published (arXiv 2010.11929, Tables 2 and 9): from JFT-300M H/14 77.63, L/16 76.28 on average, L/16
from ImageNet-21k 72.72. All tasks have the same settings (Table 4): 2,500 steps of 512 images at
384 pixels, learning rate 0.01, which was chosen among two on the 200 images.

As in BiT (arXiv 1912.11370, appendix F), whose preprocessing the paper takes: images are resized to
a square, and a smaller square is cut out of them and mirrored, except where that would change the
label. Cut out of 448 pixels, as in vit_jax's later configs. Warm-up and momentum are those of
configs/finetune.py.
"""

import presets

TASKS = "caltech101 cifar100 dtd flowers102 pets sun397 svhn".split()
TASKS += "patch_camelyon eurosat resisc45 diabetic_retinopathy".split()
TASKS += "clevr_count clevr_distance dmlab kitti_distance dsprites_location".split()
TASKS += "dsprites_orientation smallnorb_azimuth smallnorb_elevation".split()
TABLE = {task: presets.DataSet(f"vtab:{task}", "train800val200", "test", 20) for task in TASKS}
NOT_CUT = "clevr_count clevr_distance dmlab kitti_distance dsprites_location".split()
NOT_MIRRORED = "dsprites_location dsprites_orientation smallnorb_azimuth".split()


def get_config(arg="B/16,caltech101"):
    """VARIANT,TASK[,dev][,SIZE]"""
    args = presets.read(arg, tuple(TASKS), ("dev",), TABLE)
    source, size = args.data.source, args.size or (378 if args.variant.endswith("/14") else 384)

    config = presets.base()
    config.batch_size = 512
    config.total_steps = 2500

    config.model = presets.fine_tuned(args, size)

    how = dict(aspect="squash", resize="bilinear", jpeg="fast", resize_dtype="float32", crop=1.0)
    dev = "dev" in args.words
    split = "train800" if dev else args.data.train
    config.data.train = dict(source=source, split=split, **how)
    config.data.train.flip = args.name not in NOT_MIRRORED
    if args.name not in NOT_CUT:
        config.data.train.update(crop=384 / 448, random_crop=True)
    name, split = ("val", "val200") if dev else ("test", args.data.test)
    config.data[name] = dict(source=source, split=split, **how)

    config.optim = presets.sgd(500)

    config.eval.every = 500
    config.checkpoint = dict(every=500, keep=2)
    config.log = dict(every=50)
    return config
