"""The recipes of ResNets and hybrids against their publications, as test_recipes.py has ViTs'.

Paper: arXiv 2010.11929 v2, Table 3, sections 4.4 and B.1. AugReg's hybrids: the names of the
recommended checkpoints in the README of github.com/google-research/vision_transformer. BiT (arXiv
1912.11370, section 3.3): bit_hyperrule.py and input_pipeline_tf2_or_jax.py of
github.com/google-research/big_transfer; bit_i1k.py and bit_i21k.py of big_vision.
"""

import math

import jax.numpy as jnp
import pytest
import test_recipes
from conftest import without_training
from flax.traverse_util import flatten_dict
from test_recipes import (
    SMALL,
    SQUASHED,
    STEPS,
    WIDTHS,
    check,
    check_big_vision,
    check_resized,
    recipe,
)

from vit_jax.errors import UserError
from vit_jax.models import variants as models
from vit_jax.models.config import ResNetConfig
from vit_jax.models.create import structure
from vit_jax.models.variants import VARIANTS
from vit_jax.training.config import Config
from vit_jax.training.loop import train
from vit_jax.training.metrics import read_metrics
from vit_jax.training.model import model_config
from vit_jax.training.optim import is_kernel, make_schedule
from vit_jax.training.plan import count_steps

folder, here = test_recipes.folder, test_recipes.here

HYBRIDS = [name for name in VARIANTS if "+" in name]
RESNETS = [name for name, fields in VARIANTS.items() if "width" not in fields]

# Table 3's other rows of JFT-300M: variants, epochs, base learning rate.
TABLE_3 = [
    ("R50x1 R50x2", (7,), 1e-3),
    ("R101x1", (7,), 8e-4),
    ("R152x1 R152x2", (7,), 6e-4),
    ("R50+B/16 R50+B/32", (7,), 8e-4),
    ("R50+L/32", (7,), 2e-4),
    ("R50+L/16", (7, 14), 4e-4),
    ("R200x3", (14,), 6e-4),  # section 4.4; not in the table, the rate is that of R152
]


@pytest.mark.parametrize("variants, epochs, lr", TABLE_3)
def test_table_3(variants, epochs, lr):
    for variant in variants.split():
        config = recipe(f"pretrain:{variant},jft")
        assert config.total_epochs in epochs
        check(config, batch_size=4096, objective="sigmoid")
        check(
            config.optim,
            name="adamw",
            lr=lr,
            schedule="linear",
            end_lr=1e-5,
            warmup=10_000.0,
            weight_decay=0.1,
            decayed="kernels",
            b1=0.9,
            b2=0.999,
            grad_clip=None,
        )
        model = model_config(config, None, 10)
        check(model, image_size=(224, 224), head_bias=-10.0)
        if variant in RESNETS:
            assert isinstance(model, ResNetConfig) and model.resnet_style == "v2"
        else:
            width = WIDTHS[variant.split("+")[1][0]]
            check(model, width=width, representation_size=width, dropout=0.0, pool="token")


@pytest.mark.parametrize(
    "variant, listed", {"R26x1": "R50x1", "R50x3": "R50x1", "R101x3": "R101x1"}.items()
)
def test_resnets_that_table_3_lacks(variant, listed):
    found, expected = (recipe(f"pretrain:{name},jft") for name in (variant, listed))
    assert (found.optim, found.total_epochs) == (expected.optim, expected.total_epochs)


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize(
    "name, data",
    [
        ("pretrain", "imagenet"),
        ("pretrain", "imagenet21k"),
        ("augreg", "imagenet"),
        ("plain", "imagenet"),
        ("transfer", "pets,dev"),
        ("vtab", "dtd"),
    ],
)
def test_hybrids_have_the_settings_of_their_vit(name, data, hybrid):
    """Section B.1."""
    found, vit = (recipe(f"{name}:{v},{data}") for v in (hybrid, hybrid.split("+")[1]))
    for section in ("optim", "data", "augment", "objective", "batch_size", "total_epochs"):
        assert getattr(found, section) == getattr(vit, section), section
    model = model_config(found, None, 10)
    for field in ("image_size", "width", "representation_size", "dropout", "pool", "head_bias"):
        assert getattr(model, field) == getattr(model_config(vit, None, 10), field), field
    assert model.resnet == VARIANTS[hybrid]["resnet"]


# Checkpoint names: R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0, and so on.
AUGREG = {
    "R+Ti/16": ("none", 0.03, 0.0),
    "R26+S/32": ("light1", 0.1, 0.0),
    "R50+L/32": ("medium1", 0.1, 0.1),
}


@pytest.mark.parametrize("variant", AUGREG)
def test_augregs_hybrids(variant):
    setting, weight_decay, rate = AUGREG[variant]
    config = recipe(f"augreg:{variant},imagenet21k")
    check(config, batch_size=4096, total_epochs=300.0, objective="sigmoid")
    check(config.optim, lr=1e-3, weight_decay=weight_decay)
    model = model_config(config, None, 10)
    check(model, dropout=rate, drop_path=rate, pool="gap", representation_size=None)
    # The rest is what test_recipes.py checks of all AugReg recipes.
    flags = ["--config.optim.weight_decay=0.1"]
    flags += [f"--config.model.{name}=0.0" for name in ("dropout", "drop_path")]
    check_big_vision(recipe(f"augreg:{variant},imagenet21k", *flags), setting)
    check_big_vision(recipe(f"augreg:{variant},imagenet21k,strong2", *flags), "strong2")


# vit_jax's configs/models.py, which has no R50+B/32 and no R50+L/16.
DROPOUT = {
    "R+Ti/16": 0.0,
    "R26+S/32": 0.0,
    "R26+B/32": 0.0,
    "R50+B/16": 0.1,
    "R50+L/32": 0.1,
    "R50+L/16": 0.1,
    "R50+B/32": 0.0,
}


@pytest.mark.parametrize("variant", [*HYBRIDS, *RESNETS])
@pytest.mark.parametrize("name", ["finetune", "transfer"])
def test_fine_tuning(name, variant):
    """Section B.1.1: as ViTs, at 384 pixels."""
    vit = recipe(f"{name}:B/16,cifar100")
    config = recipe(f"{name}:{variant},cifar100")
    assert (config.optim, config.data) == (vit.optim, vit.data)
    model = model_config(config, None, 100)
    assert model.image_size == (384, 384)
    if variant in RESNETS:
        assert isinstance(model, ResNetConfig)
        trained = models.variant(variant, head_bias=-10.0)
        check(model_config(config, trained, 7), num_classes=7, head_bias=0.0)
    else:
        rate = DROPOUT[variant] if name == "finetune" else 0.0
        check(model, dropout=rate, drop_path=0.0, representation_size=None)
        had = dict(representation_size=768, head_bias=-10.0, drop_path=0.1)
        trained = models.variant(variant, **had)
        tuned = model_config(config, trained, 7)
        check(tuned, drop_path=0.0, representation_size=None, head_bias=0.0)


# bit_hyperrule.py: training images; end of the warm-up, drops, end of the run.
RULE = {
    "flowers": (2_040, (100, 200, 300, 400, 500)),
    "pets": (3_680, (100, 200, 300, 400, 500)),
    "cifar10": (50_000, (500, 3_000, 6_000, 9_000, 10_000)),
    "cifar100": (50_000, (500, 3_000, 6_000, 9_000, 10_000)),
    "imagenet": (1_281_167, (500, 6_000, 12_000, 18_000, 20_000)),
}


def hyperrule(step, supports, base=0.003):
    """The learning rate of BiT's code."""
    if step < supports[0]:
        return base * step / supports[0]
    return base / 10 ** sum(support < step for support in supports[1:])


@pytest.mark.parametrize("data", RULE)
def test_bits_rule(data):
    images, supports = RULE[data]
    for dev in ("", ",dev"):
        config = recipe(f"bit:R50x1,{data}{dev}")
        check(config, batch_size=512, total_steps=supports[-1], objective="softmax")
        check(
            config.optim,
            name="sgd",
            lr=0.003,
            momentum=0.9,
            mu_dtype="float32",
            weight_decay=0.0,
            grad_clip=None,
            ema=None,
        )
        check(
            config.augment,
            mixup=0.1 if images >= 20_000 else 0.0,
            cutmix=0.0,
            per_image=False,
            label_smoothing=0.0,
        )
        schedule = make_schedule(config.optim, supports[-1])
        for step in (0, 1, *(s + k for s in supports[:-1] for k in (-1, 0, 1)), supports[-1] - 1):
            found = float(schedule(jnp.int32(step)))
            expected = hyperrule(step, supports)
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7 * 0.003), step


@pytest.mark.parametrize(
    "argument, resized, size",
    [
        *((data, 160, 128) for data in ("cifar10", "cifar100")),
        *((data, 512, 480) for data in ("flowers", "pets", "imagenet")),
        *((f"{data},384", 448, 384) for data in ("flowers", "pets", "imagenet")),
    ],
)
def test_bits_images(argument, resized, size):
    """get_resolution; the paper has 384 of 448 for all models but the largest."""
    spec = f"bit:R50x1,{argument}"
    for config in (recipe(spec), recipe(f"{spec},dev")):
        check(model_config(config, None, 10), image_size=(size, size), head_bias=0.0)
        found = config.data.train
        check(found, aspect="squash", resize="bilinear", resize_dtype="float32", jpeg="fast")
        check(found, random_crop=True, flip=True, inception_crop=None, rand_augment=None)
        assert math.floor(size / found.crop + 1e-6) == resized
        check(config.data.val or config.data.test, **SQUASHED)


# Section 3.3: epochs, at whose ends the learning rate drops; images.
UPSTREAM = {
    "imagenet": (90, (30, 60, 80), 1_268_355),
    "imagenet21k": (90, (30, 60, 80), 14_000_000),
    "jft": (40, (10, 23, 30, 37), 300_000_000),
}


@pytest.mark.parametrize("data", UPSTREAM)
def test_bits_pretraining(data):
    epochs, drops, images = UPSTREAM[data]
    config = recipe(f"bit_pretrain:R50x1,{data}")
    check(config, batch_size=4096, total_epochs=float(epochs))
    check_upstream(config, data)
    assert config.optim.lr == pytest.approx(0.03 * 4096 / 256)
    assert config.optim.grad_clip is None
    steps = count_steps(config, images)
    schedule = make_schedule(config.optim, steps)
    assert [float(schedule(step)) for step in (2500, 5000)] == pytest.approx([0.24, 0.48])
    for k, epoch in enumerate(drops):
        step = round(epoch * images / 4096)
        rates = [float(schedule(step + aside)) for aside in (-5, 5)]
        assert rates == pytest.approx([0.48 / 10**k, 0.48 / 10 ** (k + 1)], rel=1e-5)
    # A part of the gradient of weight 1e-4, which momentum repeats: 1 + 0.9 + 0.81 + ... times.
    assert config.optim.weight_decay == pytest.approx(1e-4 / (1 - 0.9))


# bit_i1k.py and bit_i21k.py: learning rate and absolute weight decay for 256 images, warm-up.
BIG_VISION = {"imagenet": (0.1, 1e-4, 1000.0), "imagenet21k": (0.03, 3e-5, 5000.0)}


@pytest.mark.parametrize("data", BIG_VISION)
def test_big_visions_pretraining(data):
    lr, weight_decay, warmup = BIG_VISION[data]
    config = recipe(f"bit_pretrain:R50x1,{data},cosine")
    check(config, batch_size=4096, total_epochs=90.0)
    check_upstream(config, data)
    check(config.optim, schedule="cosine", end_lr=0.0, warmup=warmup, grad_clip=1.0)
    assert config.optim.lr == pytest.approx(lr / 256 * 4096)
    found = config.optim.lr * config.optim.weight_decay
    assert found == pytest.approx(weight_decay / 256 * 4096)


def check_upstream(config, data):
    check(config.optim, name="sgd", momentum=0.9, mu_dtype="bfloat16", decayed="kernels")
    many = data != "imagenet"
    assert config.objective == ("sigmoid" if many else "softmax")
    model = model_config(config, None, 10)
    check(model, image_size=(224, 224), head_bias=-10.0 if many else 0.0, resnet_style="v2")
    check(config.augment, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    check(config.data.train, flip=True, rand_augment=None, resize="bilinear", jpeg="fast")
    assert config.data.train.inception_crop.area == (0.05, 1.0)
    assert (config.data.train.split, config.data.val.split) == ("train[:99%]", "train[99%:]")
    for split in filter(None, (config.data.val, config.data.test)):
        check_resized(split, 224, 256)


def test_what_is_decayed_of_a_resnet():
    """Kernels: of the root, of units and their shortcuts, of the head; no norm, no bias."""
    config = model_config(recipe("bit_pretrain:R26x1,imagenet"), None, 5)
    _, params = structure(config)
    marks = flatten_dict(is_kernel(params), sep="/")
    assert {name.rpartition("/")[2]: mark for name, mark in marks.items()} == {
        "kernel": True,
        "scale": False,
        "bias": False,
    }
    assert marks["head/kernel"] and any("root" in name for name, mark in marks.items() if mark)


# A ResNet, alone or before a ViT, of two units and a stride of 8.
TINY = [
    *STEPS,
    "--config.eval.batch_size=8",
    "--config.data.same_images=True",
    "--config.model.resnet=(1,1)",
    "--config.model.resnet_width=32",
    "--config.model.image_size=32",
]
HYBRID = [*TINY, *SMALL]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Run folders of a ResNet and a hybrid, made by pre-training that was traced alone."""
    with pytest.MonkeyPatch.context() as patch:
        without_training(patch)
        patch.chdir(folder)
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        made = {}
        for spec, flags in {
            "bit_pretrain:R50x1,imagenet": TINY,
            "augreg:R50+L/32,imagenet21k": HYBRID,
        }.items():
            made[spec] = tmp_path_factory.mktemp("run")
            made[spec, "result"] = train(recipe(spec, *flags), made[spec])
    return made


def test_two_steps_of_fine_tuning_a_hybrid(here, trained, tmp_path):
    before = trained["augreg:R50+L/32,imagenet21k"]
    config = recipe("finetune:R50+L/32,cifar100", *HYBRID, f"--config.init_from={before}")
    result = train(config, tmp_path)
    first, second = (line for line in read_metrics(tmp_path) if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(math.log(100), rel=1e-5)
    assert (first["train/lr"], second["train/lr"]) == pytest.approx((0, 0.01))
    assert {name.split("/")[0] for name in result if "/" in name} == {"train", "test"}
    assert all(math.isfinite(value) for value in result.values())


def test_the_pretraining_runs_have_measured(trained):
    for spec, measured in {
        "bit_pretrain:R50x1,imagenet": {"train", "val", "test"},
        "augreg:R50+L/32,imagenet21k": {"train", "val"},
    }.items():
        result = trained[spec, "result"]
        assert {name.split("/")[0] for name in result if "/" in name} == measured
        assert all(math.isfinite(value) for value in result.values())


def test_ten_steps_of_bits_fine_tuning(here, trained, tmp_path):
    """The staircase, shortened with the run, in what the run writes down; a head of zeros."""
    flags = [*TINY, "--config.total_steps=10", "--config.optim.warmup=2"]
    flags.append(f"--config.init_from={trained['bit_pretrain:R50x1,imagenet']}")
    config = recipe("bit:R50x1,cifar10", *flags)
    result = train(config, tmp_path)
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert lines[0]["train/loss"] == pytest.approx(math.log(10), rel=1e-5)
    rates = [hyperrule(step, (2, 3, 6, 9)) for step in range(10)]
    assert [line["train/lr"] for line in lines] == pytest.approx(rates, rel=1e-5)
    assert all(math.isfinite(value) for value in result.values())
    assert "test/accuracy" in result


@pytest.mark.parametrize(
    "spec, base",
    [
        ("bit:R50x1,cifar10", "R50+B/32"),
        ("bit:R50x1,imagenet,512", "B/16"),
        ("bit:R50x1,cifar10", "R101x1"),
        ("finetune:R50x1,cifar10", "R50+L/32"),
        ("finetune:B/16,cifar10,512", "R50+B/16"),
        ("finetune:B/16,cifar10", "R50x1"),
        ("finetune:R50+B/16,cifar10", "B/16"),
        ("finetune:R50+B/16,cifar10", "R26+B/32"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(spec, base):
    config = recipe(spec)
    with pytest.raises(UserError, match=r"is to be a .* the checkpoint of init_from is a "):
        model_config(config, models.variant(base), 10)


@pytest.mark.parametrize("fields", [{"resnet": (1,)}, {"resnet": ()}, {"resnet": 3}])
def test_a_resnet_is_not_put_before_a_vit(fields):
    config = Config(batch_size=8, model=fields)
    with pytest.raises(UserError, match="the checkpoint of init_from is a ViT without a ResNet"):
        model_config(config, models.variant("B/16"), 10)


def test_what_fine_tuning_may_change_of_a_hybrid():
    base = models.variant("R50+B/16", resnet_style="timm_v1", representation_size=768)
    config = Config(batch_size=8, model={"variant": "R50+B/16", "image_size": (384, 384)})
    new = model_config(config, base, 10)
    assert (new.resnet, new.resnet_style, new.grid) == ((3, 4, 9), "timm_v1", (24, 24))
    with pytest.raises(UserError, match="a ViT on a pre-activation ResNet"):
        model_config(Config(batch_size=8, model={"resnet_style": "v2"}), base, 10)
