"""The training steps that are compared, and the matrix product that bounds them."""

import functools
import re
import sys
import time
from typing import Any

import jax

from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.vit import structure
from vit_jax.training.objectives import Augment
from vit_jax.training.optim import OptimConfig, make_optimizer, make_schedule
from vit_jax.training.sharding import MeshConfig, make_mesh, to_devices
from vit_jax.training.state import abstract_state, make_state
from vit_jax.training.steps import make_train_step

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1


class Ours:
    """The step of `vit_jax.training`, its state donated as in the training loop."""

    def __init__(self, config: ViTConfig, batch: dict[str, Any]):
        self.device = jax.devices()[0]
        mesh = make_mesh(MeshConfig(), [self.device])
        optim = OptimConfig(lr=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY)
        schedule = make_schedule(optim, total_steps=1)
        optimizer = make_optimizer(optim, schedule)
        step = make_train_step(
            structure(config)[0],
            optimizer,
            schedule,
            Preprocess(config.image_size, config.in_channels),
            num_classes=config.num_classes,
            objective="softmax",
            augment=Augment(),
        )
        abstract = abstract_state(config, optimizer, ema=False, mesh=mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        self.state = make_state(abstract, config, optimizer, seed=0)
        self.batch = to_devices(batch, len(batch["image"]), mesh)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        began = time.perf_counter()
        self.step = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last to end, and returns its loss."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return float(metrics["loss"])

    def peak_bytes(self) -> int | None:
        """The device's own count, None where it keeps none."""
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")


class Timm:
    """timm's model in PyTorch's usual step: autocast, fused AdamW, perhaps torch.compile."""

    def __init__(self, config: ViTConfig, batch: dict[str, Any], *, compiled: bool = False):
        import torch

        timm = import_timm()
        backend, half = jax.default_backend(), config.dtype != "float32"
        device = {"cpu": "cpu", "gpu": "cuda"}.get(backend)
        self.cuda = device == "cuda"
        if device is None or (self.cuda and not torch.cuda.is_available()):
            raise UserError(f"jax runs on a {backend} here, and this torch cannot")
        if self.cuda:
            torch.set_float32_matmul_precision("high")  # float32 as TF32, XLA's default too
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
            self.bytes_before = torch.cuda.memory_allocated()
        model = timm.models.VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.in_channels,
            num_classes=config.num_classes,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.width,
            act_layer={"tanh": "gelu_tanh", "erf": "gelu"}[config.gelu],
        ).to(device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        groups = timm.optim.param_groups_weight_decay(
            model, WEIGHT_DECAY, no_weight_decay_list=model.no_weight_decay()
        )
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)

        def loss_of(images, labels):
            with torch.autocast(device, getattr(torch, config.dtype), enabled=half):
                logits = model((images.float() / 255 - 0.5) / 0.5)
            return torch.nn.functional.cross_entropy(logits.float(), labels)

        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous()
        self.batch = images.to(device), torch.from_numpy(batch["label"]).long().to(device)
        self.loss_of = torch.compile(loss_of) if compiled else loss_of
        began = time.perf_counter()
        self.run(1)
        self.compile_seconds = time.perf_counter() - began if compiled else None

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last to end, and returns its loss."""
        import torch

        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.loss_of(*self.batch)
            loss.backward()
            self.optimizer.step()
        if self.cuda:
            torch.cuda.synchronize()
        return loss.item()

    def peak_bytes(self) -> int | None:
        """What this contestant added, by torch's count; None on a CPU."""
        import torch

        return torch.cuda.max_memory_allocated() - self.bytes_before if self.cuda else None


CONTESTANTS = {"ours": Ours, "timm": Timm, "timm-compile": functools.partial(Timm, compiled=True)}


def start(name: str, config: ViTConfig, batch: dict[str, Any], result: dict[str, Any]) -> Any:
    """Returns a contestant that is compiled and warm; what that took goes into `result`."""
    contestant = CONTESTANTS[name](config, batch)
    contestant.run(2)
    result["parameters"] = contestant.parameters
    result["compile_seconds"] = contestant.compile_seconds
    result["peak_bytes"] = contestant.peak_bytes()
    return contestant


def import_timm() -> Any:
    """timm, even where torchvision was built for another torch and its operators are missing."""
    import torch

    try:
        import timm.optim
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if re.match(r"(timm|torchvision)\b", name)]:
            del sys.modules[name]
        nms = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        align = (
            "(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
            "int sampling_ratio, bool aligned) -> Tensor"
        )
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for signature in ("nms" + nms, "qnms" + nms, "roi_align" + align):
            operators.define(signature)
        import timm.optim

        timm.torchvision_operators = operators  # defined as long as this object lives
    return timm


class Ceiling:
    """A large matrix product in the compute dtype, each waiting for the one before."""

    def __init__(self, dtype: str):
        self.size, self.products = (1024, 5) if jax.default_backend() == "cpu" else (8192, 20)
        factors = jax.random.normal(jax.random.key(0), (2, self.size, self.size), dtype)
        self.a, self.b = factors[0] * self.size**-0.5, factors[1]  # so that products stay small
        self.product = jax.jit(lambda a, b: a @ b)
        self.measure()

    def measure(self) -> float:
        """Returns floating-point operations a second."""
        began = time.perf_counter()
        for _ in range(self.products):
            self.b = self.product(self.a, self.b)
        jax.block_until_ready(self.b)
        return self.products * 2 * self.size**3 / (time.perf_counter() - began)
