"""Detection against torchvision's FCOS: its head, and its assignment and losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import as_float32, random_params, run
from torchvision.models.detection.fcos import FCOS, FCOSHead

from vit_jax.models.config import ViTConfig
from vit_jax.models.detector import locations
from vit_jax.models.pyramid import sizes
from vit_jax.training import detection

CONFIG = ViTConfig(
    image_size=(128, 96),
    patch_size=8,
    width=16,
    depth=1,
    mlp_dim=16,
    num_heads=2,
    num_classes=3,
    pool="locations",
    pyramid=64,
    towers=2,
)
CENTRES, STRIDES = locations(CONFIG)
COUNTS = [h * w for h, w in sizes(CONFIG.grid)]
assign, sums = (jax.jit(each, static_argnums=0) for each in (detection.assign, detection.sums))


def test_the_head_is_that_of_torchvision():
    params = as_float32(random_params(CONFIG))
    images = np.random.default_rng(0).normal(size=(2, 128, 96, 3)).astype(np.float32)
    found, captured = run(CONFIG, params, images, capture="pre_logits")
    head, ours = FCOSHead(64, 1, 3, num_convs=2), params["detector"]

    def conv(layer, p, outputs=slice(None)):
        layer.weight.data = torch.tensor(p["kernel"][..., outputs].transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.tensor(p["bias"][outputs])

    def tower(layers, p):
        for i in (0, 1):
            conv(layers[3 * i], p[f"conv{i + 1}"])
            layers[3 * i + 1].weight.data = torch.tensor(p[f"norm{i + 1}"]["scale"])
            layers[3 * i + 1].bias.data = torch.tensor(p[f"norm{i + 1}"]["bias"])

    tower(head.classification_head.conv, ours["classes"])
    tower(head.regression_head.conv, ours["boxes"])
    conv(head.classification_head.cls_logits, ours["classes"]["conv_out"])
    conv(head.regression_head.bbox_reg, ours["boxes"]["conv_out"], slice(4))
    conv(head.regression_head.bbox_ctrness, ours["boxes"]["conv_out"], slice(4, 5))
    maps = np.split(np.asarray(captured["pre_logits"]), np.cumsum(COUNTS)[:-1], axis=1)
    maps = [
        torch.tensor(each.reshape(2, h, w, 64).transpose(0, 3, 1, 2).copy())
        for each, (h, w) in zip(maps, sizes(CONFIG.grid), strict=True)
    ]
    with torch.no_grad():
        theirs = head(maps)
    names = ("cls_logits", "bbox_regression", "bbox_ctrness")
    wanted = np.concatenate([theirs[name].numpy() for name in names], axis=-1)
    assert wanted.shape == found.shape
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_new_head_begins_as_theirs():
    theirs = FCOSHead(64, 1, 3)
    np.testing.assert_allclose(
        theirs.classification_head.cls_logits.bias.detach(), -np.log(99), rtol=1e-6
    )
    assert len(theirs.classification_head.conv) == 3 * ViTConfig().towers


def random_label(random, most=12):
    """Boxes of areas that differ by more than torchvision's choice of the smallest can tell."""
    label = np.full((4, most, 5), -1, np.float32)
    for image, count in enumerate((most, 5, 1, 0)):
        high = np.log([96, 128])
        while True:
            sides = np.exp(random.uniform(np.log(4), high, (count, 2)))
            if np.diff(np.sort(sides.prod(axis=1))).min(initial=99) > 17:
                break
        low = random.uniform(0, 1, (count, 2)) * ([96, 128] - sides)
        rows = random.integers(0, 3, (count, 1)), low, low + sides
        label[image, :count] = np.concatenate(rows, axis=1)
    return label


class Head(torch.nn.Module):
    """torchvision's head, which also keeps which box each location learns."""

    def __init__(self):
        super().__init__()
        self.own = FCOSHead(64, 1, 3)

    def compute_loss(self, targets, outputs, anchors, matched):
        self.matched = matched
        return self.own.compute_loss(targets, outputs, anchors, matched)


def theirs(outputs, label):
    """Losses of FCOS, their gradients, and the box of each location.

    Its own anchors are centred at multiples of the stride; these are centred where our locations
    are.
    """
    model = FCOS.__new__(FCOS)
    torch.nn.Module.__init__(model)
    model.center_sampling_radius, model.head = 1.5, Head()
    boxes = np.concatenate([CENTRES - STRIDES[:, None] / 2, CENTRES + STRIDES[:, None] / 2], axis=1)
    targets = [
        {
            "boxes": torch.tensor(rows[rows[:, 0] >= 0, 1:]),
            "labels": torch.tensor(rows[rows[:, 0] >= 0, 0], dtype=torch.long),
        }
        for rows in label
    ]
    x = torch.tensor(outputs, requires_grad=True)
    found = model.compute_loss(
        targets,
        {"cls_logits": x[..., :3], "bbox_regression": x[..., 3:7], "bbox_ctrness": x[..., 7:]},
        [torch.tensor(boxes)] * len(label),
        COUNTS,
    )
    sum(found.values()).backward()
    losses = {name: float(value.detach()) for name, value in found.items()}
    return losses, x.grad.numpy(), torch.stack(model.head.matched).numpy()


@pytest.mark.parametrize("seed", range(3))
def test_assignment_and_losses_are_those_of_torchvision(seed):
    """Equal distances to a limit, which theirs leaves out above, do not happen at random."""
    random = np.random.default_rng(seed)
    label = random_label(random)
    outputs = random.normal(size=(4, len(STRIDES), 8)).astype(np.float32)
    outputs[..., 3:7] = np.abs(outputs[..., 3:7]) * 3
    losses, gradient, matched = theirs(outputs, label)
    np.testing.assert_array_equal(assign(CONFIG, label), matched)
    label = jnp.asarray(label)
    weight = detection.positives(CONFIG, label).sum()
    assert weight == (matched >= 0).sum() > 100

    def loss(outputs):
        found = {name: x.sum() / weight for name, x in sums(CONFIG, outputs, label).items()}
        return found["loss"], found

    (total, found), ours = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(outputs))
    names = {
        "classification": "class_loss",
        "bbox_regression": "box_loss",
        "bbox_ctrness": "centerness_loss",
    }
    for name, value in losses.items():
        np.testing.assert_allclose(found[names[name]], value, rtol=1e-5)
    np.testing.assert_allclose(total, sum(losses.values()), rtol=1e-5)
    np.testing.assert_allclose(ours, gradient, atol=2e-6)


def test_images_without_boxes():
    """Theirs divides by 1 where no location learns, as the batch's least is here."""
    label = np.full((2, 3, 5), -1, np.float32)
    outputs = np.random.default_rng(0).normal(size=(2, len(STRIDES), 8)).astype(np.float32)
    losses, _, matched = theirs(np.abs(outputs), label)
    assert (matched == -1).all()
    found = sums(CONFIG, np.abs(outputs), label)
    np.testing.assert_allclose(found["class_loss"].sum(), losses["classification"], rtol=1e-5)
    assert losses["bbox_regression"] == losses["bbox_ctrness"] == 0
    assert not found["box_loss"].any() and not found["centerness_loss"].any()


def test_equal_areas_and_limits_differ_as_said():
    """Of boxes within 4 pixels of area theirs takes the first, as float32 says of 1e8 - area.

    A largest distance of 8 strides is in our range, and in neither of theirs.
    """
    label = np.array([[(0, 20, 20, 30, 30), (1, 20, 20, 30, 29.9)]], np.float32)
    at = (CENTRES == (25, 25)).all(axis=1).argmax()
    outputs = np.zeros((1, len(STRIDES), 8), np.float32)
    assert theirs(outputs, label)[2][0, at] == 0
    assert assign(CONFIG, label)[0, at] == 1
    label = np.array([[(0, 9, 33, 38, 49)]], np.float32)
    at = (CENTRES == (25, 41)).all(axis=1).argmax()
    assert theirs(outputs, label)[2][0, at] == -1
    assert assign(CONFIG, label)[0, at] == 0
