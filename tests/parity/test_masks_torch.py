"""Losses of masks and feature pyramids against torch's own operators."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import jit
from tiny_models import as_float32, random_params, run

from vit_jax.models.config import ViTConfig
from vit_jax.models.dense import stretched
from vit_jax.training import segmentation


def test_logits_and_cross_entropies_of_pixels():
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 5, 7, 4)).astype(np.float32)
    masks = random.integers(0, 4, (2, 40, 33)).astype(np.uint8)
    masks[random.random(masks.shape) < 0.3] = 255
    channels_first = torch.tensor(logits).permute(0, 3, 1, 2)
    for size in ((40, 33), (3, 9)):
        wanted = F.interpolate(channels_first, size, mode="bilinear", align_corners=False)
        found = jit(stretched, static_argnums=1)(logits, size)
        np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), atol=2e-6)
    wanted = F.cross_entropy(
        F.interpolate(channels_first, (40, 33), mode="bilinear", align_corners=False),
        torch.tensor(masks, dtype=torch.long),
        ignore_index=255,
        label_smoothing=0.1,
    )
    sums = segmentation.sums(jnp.asarray(logits), jnp.asarray(masks), smoothing=0.1)
    np.testing.assert_allclose(sums["loss"].sum() / (masks != 255).sum(), wanted, rtol=1e-5)


def test_the_pyramid_is_of_torchs_layers():
    config = ViTConfig(
        image_size=(12, 20),
        patch_size=(4, 5),
        width=16,
        depth=1,
        mlp_dim=16,
        num_heads=2,
        num_classes=3,
        pool="none",
        pyramid=6,
    )
    params = as_float32(random_params(config))
    images = np.random.default_rng(0).normal(size=(2, 12, 20, 3)).astype(np.float32)
    logits, captured = run(config, params, images, capture="pooled")
    p = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf)), params["pyramid"])
    x = torch.tensor(np.array(captured["pooled"])).permute(0, 3, 1, 2)

    def norm(x, p):
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], p["scale"], p["bias"], 1e-6)
        return x.permute(0, 3, 1, 2)

    def doubled(x, p):  # whose kernels are [i o h w], and not counted backwards
        kernel = p["kernel"].flip(0, 1).permute(2, 3, 0, 1)
        return F.conv_transpose2d(x, kernel, p["bias"], stride=2)

    def level(x, p):
        for conv, after in (("conv1", "norm1"), ("conv2", "norm2")):
            kernel = p[conv]["kernel"].permute(3, 2, 0, 1)
            x = norm(F.conv2d(x, kernel, padding=kernel.shape[2] // 2), p[after])
        return x

    up = doubled(F.gelu(norm(doubled(x, p["conv_up1"]), p["norm_up1"])), p["conv_up2"])
    maps = [
        level(up, p["level1"]),
        level(doubled(x, p["conv_up"]), p["level2"]),
        level(x, p["level3"]),
        level(F.max_pool2d(x, 2, 2), p["level4"]),
    ]
    total = sum(
        F.interpolate(each, up.shape[2:], mode="bilinear", align_corners=False) for each in maps
    )
    wanted = F.gelu(total).permute(0, 2, 3, 1).numpy() @ params["head"]["kernel"]
    wanted += params["head"]["bias"]
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max())
