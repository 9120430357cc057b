"""Small models on garments or fractals, and then on digits: the laptop-scale runs of experiments/.

    python experiments/packages.py fashion_mnist mnist
    vit-jax train --config=evidence:garments,resnet --workdir=runs/garments_resnet
    python experiments/evidence.py --data
    vit-jax train --config=evidence --workdir=runs/small
    vit-jax train --config=evidence:fractals,resnet --workdir=runs/small_resnet
    vit-jax train --config=evidence:digits --workdir=runs/small_digits \\
        --config.init_from=runs/small
    vit-jax train --config=evidence:few_digits,vit --workdir=runs/digits_scratch

The argument is DATA[,FAMILY]. DATA is `garments`, the photographs of Fashion-MNIST at 32 x 32
pixels, of which 54,000 are trained on, 6,000 are `val` and 10,000 `test`; `fractals`, to pre-train
on 32,000 images of 100 classes; or, to fine-tune init_from or with a FAMILY to train from scratch,
`digits`, scikit-learn's 1,259 at 24 x 24 pixels, or `few_digits` or `few_garments`, about 1,200 of
MNIST or Fashion-MNIST at 32 x 32. FAMILY is `vit` (16 patches of 6 x 6 pixels, or of
8 x 8, 4 layers of width 64), `resnet` (two units, 115,000 parameters below the head) or `hybrid`
(that ViT on the root of the ResNet, 9 or 16 patches).

Hardware and hours: two CPU cores, half a minute, garments a minute. Expected: of 15,000 garments
85 to 89%, and ten-shot linear accuracy on handwritten digits (`others/10shot`) 33 to 45%; held-out
fractals 25 to 30% of 100 classes; five-shot linear accuracy on 100 other classes
(`others/5shot`), the paper's measure of what was learnt (section 4.1), about 20%; digits 90 to 95%.

What is known to matter: the number of steps; batches of 32 learn more of the same images than 128
do. The images are written once, by experiments/evidence.py, since making one costs as much as a
training step of it.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

FRACTALS = "arrays:runs/evidence/fractals.npz"
OTHERS = "arrays:runs/evidence/others.npz"
GARMENTS = "idx:data/fashion_mnist"
MNIST = "idx:data/mnist"
# Images seen; of the last three 10, 20 and 20 passes.
EXAMPLES = {"fractals": 40_000, "garments": 120_000, "digits": 12_590}
EXAMPLES |= {"few_digits": 24_000, "few_garments": 24_000}
FAMILIES = {
    "vit": dict(variant="mu/6", width=64, depth=4, mlp_dim=128, num_heads=4),
    "resnet": dict(variant="R26x1", resnet=(1, 1), resnet_width=32),
}
FAMILIES["hybrid"] = FAMILIES["vit"] | dict(variant="R+Ti/16", resnet_width=32, patch_size=(2, 2))


def get_config(arg="fractals"):
    """fractals|garments|digits|few_digits|few_garments[,vit|resnet|hybrid]"""
    data, _, family = arg.partition(",")
    if data not in EXAMPLES or family not in ("", *FAMILIES):
        raise ValueError(f"argument {arg!r}: expected such as fractals, fractals,resnet or digits")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.total_steps = placeholder(int)
    config.total_epochs = placeholder(float)
    config.total_examples = EXAMPLES[data]
    config.init_from = placeholder(str)

    small = data in ("fractals", "digits")
    config.model = ConfigDict(dict(image_size=(24, 24) if small else (32, 32)))
    if family or data in ("fractals", "garments"):
        config.model.update(in_channels=1, **FAMILIES[family or "vit"])
        if not small and family in ("", "vit"):
            config.model.patch_size = (8, 8)  # as many patches as in fractals

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 2e-3 if data in ("fractals", "garments") else 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 1.0

    config.data = ConfigDict()
    config.eval = ConfigDict(dict(every=0, batch_size=256))
    if data == "fractals":
        config.data.train = ConfigDict(dict(source=FRACTALS, split="train32000"))
        config.data.val = ConfigDict(dict(source=FRACTALS, split="val"))
        few = dict(type="fewshot", shots=(5,), seeds=5)
        few |= {part: dict(source=OTHERS, split=part) for part in ("train", "test")}
        config.eval.evaluators = ConfigDict(dict(others=few))
    elif data == "garments":
        config.data.train = ConfigDict(dict(source=GARMENTS, split="train[:90%]"))
        config.data.val = ConfigDict(dict(source=GARMENTS, split="train[90%:]"))
        config.data.test = ConfigDict(dict(source=GARMENTS, split="test"))
        few = dict(type="fewshot", shots=(10,), seeds=5)
        few |= {
            "train": dict(source=MNIST, split="train[:5%]"),
            "test": dict(source=MNIST, split="test[:20%]"),
        }
        config.eval.evaluators = ConfigDict(dict(others=few))
    else:
        source = {"digits": "digits", "few_digits": MNIST, "few_garments": GARMENTS}[data]
        train, val = ("train", "val") if data == "digits" else ("train[:2%]", "train[90%:]")
        config.data.train = ConfigDict(dict(source=source, split=train))
        config.data.train.affine = ConfigDict(dict(degrees=10.0, translate=0.06, scale=(0.9, 1.1)))
        config.data.val = ConfigDict(dict(source=source, split=val))
        config.data.test = ConfigDict(dict(source=source, split="test"))

    config.checkpoint = ConfigDict(dict(every=500, keep=1))
    config.log = ConfigDict(dict(every=50, tensorboard=False))
    return config
