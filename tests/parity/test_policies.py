"""TrivialAugment and the adjustments of colours against torchvision's, of the same images."""

import numpy as np
import PIL.Image
import pytest
from torchvision.transforms import ColorJitter, InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import TrivialAugmentWide, _apply_op

from vit_jax.data import policies

PICTURES = [
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    for shape in ((45, 60, 3), (45, 60))
]


def assert_same(found, expected, name):
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=name)


def test_trivial_augment_has_the_operations_of_torchvision():
    space = TrivialAugmentWide()._augmentation_space(policies.BINS)
    assert list(policies.OPS) == list(space)
    for name, (operation, first, last, signed) in policies.OPS.items():
        magnitudes, has_sign = space[name]
        assert signed == has_sign
        for i, theirs in enumerate(magnitudes.reshape(-1).tolist()):
            ours = first + (last - first) * i / (policies.BINS - 1)
            assert (round(ours) if name == "Posterize" else ours) == pytest.approx(theirs)
            for m in (theirs, -theirs) if signed else (theirs,):
                for picture in PICTURES:
                    expected = _apply_op(picture, name, m, InterpolationMode.NEAREST, None)
                    assert_same(operation(picture, m), expected, f"{name} {m}")


def test_adjustments_are_those_of_torchvision():
    for name in ("brightness", "contrast", "saturation", "hue"):
        for factor in (-0.5, -0.2, 0.0, 0.1, 0.5) if name == "hue" else (0.0, 0.6, 1.0, 1.4, 2.5):
            for picture in PICTURES:
                expected = getattr(F, f"adjust_{name}")(picture, factor)
                found = getattr(policies, f"adjust_{name}")(picture, factor)
                assert_same(found, expected, f"{name} {factor}")
    jitter = ColorJitter(0.3, 1.5, 0.3, 0.1)
    assert tuple(jitter.contrast) == (0.0, 2.5) and tuple(jitter.hue) == (-0.1, 0.1)
