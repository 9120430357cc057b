"""Small models on garments or fractals, and then on digits: the laptop-scale runs of experiments/.

    python experiments/packages.py fashion_mnist mnist
    vit-jax train --config=evidence:garments,resnet --workdir=runs/garments_resnet
    python experiments/evidence.py --data
    vit-jax train --config=evidence --workdir=runs/small
    vit-jax train --config=evidence:fractals,resnet --workdir=runs/small_resnet
    vit-jax train --config=evidence:digits --workdir=runs/small_digits \\
        --config.init_from=runs/small
    vit-jax train --config=evidence:digits,vit --workdir=runs/digits_scratch

The argument is DATA[,FAMILY]. DATA is `garments`, the photographs of Fashion-MNIST at 32 x 32
pixels, of which 54,000 are trained on, 6,000 are `val` and 10,000 `test`; `fractals`, to pre-train
on 32,000 images of 100 classes; or `digits`, to fine-tune init_from on scikit-learn's 1,259, or
with a FAMILY to train on them from scratch. FAMILY is `vit` (16 patches of 6 x 6 pixels, or of
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
FAMILIES = {
    "vit": dict(variant="mu/6", width=64, depth=4, mlp_dim=128, num_heads=4),
    "resnet": dict(variant="R26x1", resnet=(1, 1), resnet_width=32),
}
FAMILIES["hybrid"] = FAMILIES["vit"] | dict(variant="R+Ti/16", resnet_width=32, patch_size=(2, 2))


def get_config(arg="fractals"):
    """fractals|garments|digits[,vit|resnet|hybrid]"""
    data, _, family = arg.partition(",")
    if data not in ("fractals", "garments", "digits") or family not in ("", *FAMILIES):
        raise ValueError(f"argument {arg!r}: expected such as fractals, fractals,resnet or digits")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.total_steps = placeholder(int)
    config.total_epochs = placeholder(float)
    config.total_examples = {"fractals": 40_000, "garments": 120_000, "digits": 12_590}[data]
    config.init_from = placeholder(str)

    config.model = ConfigDict(dict(image_size=(32, 32) if data == "garments" else (24, 24)))
    if family or data != "digits":
        config.model.update(in_channels=1, **FAMILIES[family or "vit"])
    if data == "garments" and family in ("", "vit"):
        config.model.patch_size = (8, 8)  # as many patches as in fractals

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 1e-3 if data == "digits" else 2e-3
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
        config.data.train = ConfigDict(dict(source="digits", split="train"))
        config.data.train.affine = ConfigDict(dict(degrees=10.0, translate=0.06, scale=(0.9, 1.1)))
        config.data.val = ConfigDict(dict(source="digits", split="val"))
        config.data.test = ConfigDict(dict(source="digits", split="test"))

    config.checkpoint = ConfigDict(dict(every=500, keep=1))
    config.log = ConfigDict(dict(every=50, tensorboard=False))
    return config
