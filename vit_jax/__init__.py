"""Vision Transformers in JAX and Flax: train, fine-tune, evaluate, load in a notebook."""

import importlib

__version__ = "0.1.0"

# Public names and their modules, imported at first use: `import vit_jax` touches no device.
_PUBLIC = {
    "VARIANTS": "vit_jax.models.variants",
    "ResNet": "vit_jax.models.resnet",
    "ResNetConfig": "vit_jax.models.config",
    "ViT": "vit_jax.models.vit",
    "ViTConfig": "vit_jax.models.config",
    "create": "vit_jax.models.create",
    "evaluate": "vit_jax.commands",
    "features": "vit_jax.commands",
    "find_images": "vit_jax.data.inputs",
    "load": "vit_jax.checkpoints.load",
    "open_source": "vit_jax.data.sources",
    "predict": "vit_jax.commands",
    "published": "vit_jax.checkpoints.published",
    "save": "vit_jax.checkpoints.export",
    "train": "vit_jax.commands",
    "upload": "vit_jax.training.hub",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted([*globals(), *_PUBLIC])
