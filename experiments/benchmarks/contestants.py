"""The programs that are compared, training steps or forward passes, and what bounds them."""

import contextlib
import dataclasses
import functools
import re
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from names import ATTENTION, Contestant

from vit_jax.checkpoints.card import ModelCard
from vit_jax.checkpoints.export import to_names
from vit_jax.compiler import compiler_options
from vit_jax.data.masks import IGNORED
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ModelConfig, ResNetConfig
from vit_jax.models.create import init_params, structure
from vit_jax.training.config import Config
from vit_jax.training.optim import OptimConfig
from vit_jax.training.plan import Plan
from vit_jax.training.program import make_program
from vit_jax.training.sharding import MeshConfig, make_mesh, to_devices
from vit_jax.training.state import make_state
from vit_jax.training.steps import images, merged

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
# A linear head of as many classes as ADE20K has, on each patch: fields of a segmenting ViT.
MASKS = {"pool": "none", "class_token": True, "num_classes": 150}


def segments(config: ModelConfig) -> bool:
    """Whether a model's classes are those of pixels."""
    return getattr(config, "pool", None) == "none"


def random_batch(config: ModelConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Images uint8 [b h w c], labels int32 [b] and a mask [b], the same for all contestants.

    Where the model segments, labels are uint8 [b h w], of which a tenth does not count.
    """
    random = np.random.default_rng(0)
    shape = (batch_size, *config.image_size, config.in_channels)
    batch = {
        "image": random.integers(0, 256, shape, np.uint8),
        "label": random.integers(0, config.num_classes, batch_size, np.int32),
        "mask": np.ones(batch_size, bool),
    }
    if segments(config):
        batch["label"] = random.integers(0, config.num_classes, shape[:3], np.uint8)
        batch["label"][random.random(shape[:3]) < 0.1] = IGNORED
    return batch


def shared_weights(config: ModelConfig) -> Any | None:
    """What all contestants of a segmenting model begin with, so that their losses can be compared.

    Noise in the head, too: a fresh one gives the same loss whatever comes before it. None for other
    models, which each contestant initialises.
    """
    if not segments(config):
        return None
    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = 0.05 * random.standard_normal(leaf.shape, np.float32)
        return noise + np.float32(path[-1].key == "scale")

    return jax.tree.map_with_path(draw, structure(config)[1])


def our_program(
    task: str,
    contestant: Contestant,
    config: ModelConfig,
    batch_size: int,
    devices: list[Any] | None = None,
) -> tuple[Any, tuple[Any, Any], Any, Callable[[], Any]]:
    """The program that vit_jax runs: mesh, shapes of its arguments, jitted, and what starts it.

    For the first device at hand, or for `devices`, which need not be there.
    """
    config = dataclasses.replace(config, **contestant.fields)
    where = MeshConfig(deterministic=contestant.deterministic)
    mesh = make_mesh(where, devices or jax.devices()[:1])
    optim = OptimConfig(lr=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY)
    run = Config(
        batch_size=batch_size,
        total_steps=1,
        objective="segmentation" if segments(config) else "softmax",
        optim=optim,
        precision=config.dtype,
        mesh=where,
    )
    preprocess = Preprocess(config.image_size, config.in_channels)
    program = make_program(Plan(run, ModelCard(config, preprocess, ())), mesh)
    if task == "train":
        what = (program.state, config, program.optimizer)

        def start() -> Any:
            return make_state(*what, seed=0, params=shared_weights(config))

        return mesh, (program.state, program.batch), program.step, start
    graphdef, _ = structure(config)
    params = program.state.params
    forward = jax.jit(
        lambda params, batch: merged(graphdef, params, None)(images(batch, preprocess)),
        compiler_options=compiler_options(mesh, deterministic=where.deterministic),
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    make = jax.jit(lambda: init_params(config, 0), out_shardings=places)
    return mesh, (params, {"image": program.batch["image"]}), forward, make


def program_bytes(compiled: Any) -> int:
    """What a compiled program needs at once: what it is given, makes and works with."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


class Ours:
    """The step of `vit_jax.training` with its state donated, or the forward pass of evaluation."""

    def __init__(self, task: str, contestant: Contestant, config: ModelConfig, batch_size: int):
        self.trains, self.xla = task == "train", contestant.xla
        mesh, self.shapes, self.program, make = our_program(task, contestant, config, batch_size)
        self.state, batch = make(), random_batch(config, batch_size)
        batch = {name: batch[name] for name in self.shapes[1]}
        self.batch = jax.block_until_ready(to_devices(batch, batch_size, mesh))
        params = self.state.params if self.trains else self.state
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def compile(self) -> None:
        self.step = self.program.lower(*self.shapes).compile(compiler_options=self.xla)

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last to end, and returns its loss, or its first logit."""
        for _ in range(steps):
            if self.trains:
                self.state, out = self.step(self.state, self.batch)
            else:
                out = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, out))
        return float(out["loss"] if self.trains else out[0, 0])

    def memory(self) -> dict[str, int | None]:
        """By XLA's analysis, and by the device's count for the process; a CPU keeps none."""
        stats = jax.devices()[0].memory_stats() or {}
        peaks = {"process_peak_bytes": stats.get("peak_bytes_in_use")}
        return {"peak_bytes": program_bytes(self.step), **peaks}


class Timm:
    """timm's model in PyTorch's usual step or forward pass: autocast, perhaps torch.compile."""

    def __init__(
        self, task: str, contestant: Contestant, config: ModelConfig, batch_size: int, backend: str
    ):
        import torch

        self.trains, self.cuda = task == "train", backend == "gpu"
        self.name, self.mode, self.attention = (
            contestant.name,
            contestant.mode,
            contestant.attention,
        )
        device = "cuda" if self.cuda else "cpu"
        if self.cuda:
            if not torch.cuda.is_available():
                raise UserError("jax runs on a gpu here, and this torch cannot")
            torch.set_float32_matmul_precision("high")  # float32 as TF32, XLA's default too
            torch.backends.cudnn.benchmark = True
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
            self.bytes_before = torch.cuda.memory_allocated()
        model = timm_model(config).to(device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        batch = random_batch(config, batch_size)
        pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
        if isinstance(config, ResNetConfig):  # convolutions like it better
            model = model.to(memory_format=torch.channels_last)
        else:
            pixels = pixels.contiguous()
        self.batch = (pixels.to(device),)
        dtype, half = getattr(torch, config.dtype), config.dtype != "float32"

        def logits_of(images):
            with torch.autocast(device, dtype, enabled=half):
                return model((images.float() / 255 - 0.5) / 0.5).float()

        def loss_of(images, labels):
            return torch.nn.functional.cross_entropy(logits_of(images), labels)

        def loss_of_masks(images, masks):
            with torch.autocast(device, dtype, enabled=half):
                tokens = model.forward_features((images.float() / 255 - 0.5) / 0.5)
                logits = model.head(tokens[:, model.num_prefix_tokens :])
            maps = logits.float().transpose(1, 2).unflatten(2, config.grid)
            maps = maps.contiguous()  # twice as fast from here on, on a CPU
            pixels = torch.nn.functional.interpolate(maps, config.image_size, mode="bilinear")
            return torch.nn.functional.cross_entropy(pixels, masks.long(), ignore_index=IGNORED)

        self.function = loss_of if self.trains else logits_of
        if segments(config):
            self.function = loss_of_masks
            shared = flatten_dict(shared_weights(config), sep="/")
            alike = dataclasses.replace(config, pool="token")  # whose parameters have these names
            arrays, *_ = to_names(shared, alike, "timm")
            model.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()})
        if self.trains:
            labels = torch.from_numpy(batch["label"])
            self.batch += ((labels if segments(config) else labels.long()).to(device),)
            skipped = getattr(model, "no_weight_decay", set)()
            groups = import_timm().optim.param_groups_weight_decay(
                model, WEIGHT_DECAY, no_weight_decay_list=skipped
            )
            self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        else:
            model.eval()

    def compile(self) -> None:
        import torch

        if self.mode is None:
            return
        # torch keeps compiled programs by code object, and may take one that was compiled for
        # another contestant's attention: each one gets a code object of its own.
        old = self.function
        code = old.__code__.replace(co_name=re.sub(r"\W", "_", self.name))
        own = types.FunctionType(code, old.__globals__, code.co_name, None, old.__closure__)
        self.function = torch.compile(own, mode=self.mode)

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last to end, and returns its loss, or its first logit."""
        import torch

        with contextlib.ExitStack() as stack:
            if self.attention:
                only = getattr(torch.nn.attention.SDPBackend, ATTENTION[self.attention])
                stack.enter_context(torch.nn.attention.sdpa_kernel(only))
            if not self.trains:
                stack.enter_context(torch.inference_mode())
            for _ in range(steps):
                if self.mode is not None:
                    torch.compiler.cudagraph_mark_step_begin()
                if self.trains:
                    self.optimizer.zero_grad()
                out = self.function(*self.batch)
                if self.trains:
                    out.backward()
                    self.optimizer.step()
            if self.cuda:
                torch.cuda.synchronize()
            return out.flatten()[0].item()

    def memory(self) -> dict[str, int | None]:
        """What this contestant added, by torch's count; None on a CPU."""
        import torch

        added = torch.cuda.max_memory_allocated() - self.bytes_before if self.cuda else None
        return {"peak_bytes": added}


def timm_model(config: ModelConfig) -> Any:
    """timm's module for the same model.

    Raises:
      UserError: a hybrid.
    """
    timm = import_timm()
    sizes = dict(num_classes=config.num_classes, in_chans=config.in_channels)
    if isinstance(config, ResNetConfig):
        from timm.layers import StdConv2d

        convolution = functools.partial(StdConv2d, eps=1e-8)
        return timm.models.ResNetV2(
            layers=list(config.resnet),
            width_factor=config.resnet_width // 64,
            stem_type="fixed",
            conv_layer=convolution,
            **sizes,
        )
    if config.resnet is not None:
        raise UserError("hybrids are not compared with timm's")
    return timm.models.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.width,
        act_layer={"tanh": "gelu_tanh", "erf": "gelu", "quick": "quick_gelu"}[config.gelu],
        **sizes,
    )


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
