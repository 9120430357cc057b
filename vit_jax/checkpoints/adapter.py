"""Adapters (LoRA) in files of their own, apart from the model that they were trained on."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoints.card import BROKEN, Line, ModelCard, Report
from vit_jax.checkpoints.convert import shapes_of
from vit_jax.checkpoints.files import open_weights, write_weights
from vit_jax.errors import UserError, nearest
from vit_jax.models import positions
from vit_jax.models.lora import learns, merged

# What is resized or resampled for a model of another image or patch size.
_RESIZED = (*positions.NAMES, "patch_embed/kernel", "resnet/conv_root/kernel")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a run with LoRA has learnt.

    Attributes:
      card: of the adapted model; its config has `lora`.
      params: adapters and heads by path, float32.
      base: the name of the model that the run started from.
      fingerprint: of that model's weights (see `fingerprint`).
    """

    card: ModelCard
    params: Mapping[str, np.ndarray]
    base: str
    fingerprint: str

    @classmethod
    def of(cls, card: ModelCard, params: Mapping[str, np.ndarray], base: str) -> "Adapter":
        """The adapter of a model with these parameters, by path."""
        learnt = {name: np.array(value) for name, value in params.items() if learns(name)}
        return cls(card, learnt, base, fingerprint(params))

    @classmethod
    def read(cls, path: epath.PathLike) -> "Adapter":
        """Reads a file of `write`.

        Raises:
          UserError: it is no such file, it is damaged, or its arrays are not those of its model.
        """
        path = os.path.expanduser(path)
        weights = open_weights(path)
        if "adapter" not in weights.card:
            raise UserError(
                f"{path} is no adapter: expected a file that vit_jax.save wrote with format='lora'"
            )
        try:
            about = weights.card["adapter"]
            card, base, found = ModelCard.from_json(weights.card), about["base"], about["weights"]
            expected = {n: s for n, s in shapes_of(card.config).items() if learns(n)}
            if card.config.lora is None or not isinstance(base, str) or not isinstance(found, str):
                raise ValueError("no adapter is described")
        except BROKEN as error:
            raise UserError(f"the card of {path} is damaged: {error!r}") from None
        for name in [*expected, *weights.shapes]:
            if name not in weights.shapes:
                raise weights.missing(name, expected[name])
            if name not in expected:
                raise UserError(
                    f"{path} has {name}, which is no part of it; {nearest(name, expected)}"
                )
            if weights.shapes[name] != expected[name]:
                raise UserError(
                    f"{path}: {name} is {list(weights.shapes[name])}; expected "
                    f"{list(expected[name])}"
                )
        return cls(card, {name: weights.read(name) for name in expected}, base, found)

    def write(self, path: str) -> Report:
        """Writes a .safetensors file: the arrays by our paths, the card in its metadata."""
        about = {"base": self.base, "weights": self.fingerprint}
        write_weights(path, self.params, {**self.card.to_json(), "adapter": about})
        lines = tuple(Line(n, value.shape, "written", n) for n, value in self.params.items())
        return Report(lines, {"file": f"lora, {path}", "base": self.base})

    @property
    def kernels(self) -> list[str]:
        """The kernels that have an adapter."""
        ending = "/lora_a"
        layers = (n.removesuffix(ending) for n in self.params if n.endswith(ending))
        return [f"{layer}/kernel" for layer in layers]

    @property
    def plain_card(self) -> ModelCard:
        """The card of the plain model, with the adapters merged into its kernels."""
        config = dataclasses.replace(self.card.config, lora=None)
        return dataclasses.replace(self.card, config=config)

    def merged(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters of the plain model, from those of the base, by path."""
        return merged({**params, **self.params}, self.card.config.lora)

    def check_base(self, shapes: Mapping[str, tuple[int, ...]], name: Any) -> None:
        """Raises a UserError if a model with these parameters cannot be the base."""
        for key, shape in shapes_of(self.plain_card.config).items():
            if not _compared(key) or shapes.get(key) == shape:
                continue
            has = f"is {list(shapes[key])}" if key in shapes else "is missing"
            raise UserError(
                f"the adapter is of {self.base}, and {os.fspath(name)} is another model: {key} "
                f"{has} there; expected {list(shape)}"
            )

    def check_weights(self, params: Mapping[str, np.ndarray], name: Any) -> None:
        """Raises a UserError unless these are the weights of the base."""
        if fingerprint(params) != self.fingerprint:
            raise UserError(
                f"the adapter is of {self.base}, and {os.fspath(name)} has other weights than that "
                "had when it was trained: name the base of the adapter"
            )


def fingerprint(params: Mapping[str, np.ndarray]) -> str:
    """A checksum of the weights under an adapter that no other image size or head changes."""
    digest = hashlib.sha256()
    for name in sorted(filter(_compared, params)):
        digest.update(f"{name} {params[name].shape}".encode())
        digest.update(np.ascontiguousarray(params[name], np.float32))
    return digest.hexdigest()


def _compared(name: str) -> bool:
    return not (learns(name) or name.endswith(_RESIZED))
