"""Models of Hugging Face's transformers: their folders and files in, and what we write back out."""

import dataclasses
import functools
import json

import jax
import numpy as np
import PIL.Image
import pytest
import timm
import torch
import transformers as hf
from flax import nnx

import vit_jax
from parity.references import (
    agree,
    assert_same_models,
    error,
    load,
    pixels,
    randomise,
    same_tensors,
    save,
    theirs,
)
from parity.timm_cases import CASES as TIMM
from parity.timm_cases import model_of as timm_model_of
from vit_jax.errors import UserError
from vit_jax.models.create import structure
from vit_jax.models.rotary import Rotary

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
MLP = dict(intermediate_size=48)
LABELS = dict(id2label={i: f"class {i}" for i in range(5)})
DECODER = dict(
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=16,
)
TEXT = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    vocab_size=40,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A family; `back` is the class that loads what we write, where it is another one."""

    family: str
    kind: type
    config: hf.PreTrainedConfig
    processor: type = hf.ViTImageProcessorPil
    back: type | None = None
    encoded: bool = True  # whether the last hidden state has been normalised
    renamed: bool = False  # whether that class has other names for the same
    written: bool = True  # whether transformers has a class for it without its own name
    renamed: bool = False  # whether that has other names in memory

    @property
    def reference(self):
        return f"transformers {hf.__version__} {self.kind.__name__}"


vit_config = functools.partial(hf.ViTConfig, **SIZE, **MLP)
deit_config = functools.partial(hf.DeiTConfig, **SIZE, **MLP)
dinov2_config = functools.partial(hf.Dinov2Config, **SIZE)
registers_config = functools.partial(hf.Dinov2WithRegistersConfig, **SIZE, num_register_tokens=3)
DEIT = dict(processor=hf.DeiTImageProcessorPil)
DINOV2 = dict(processor=hf.BitImageProcessorPil)
SIGLIP = dict(processor=hf.SiglipImageProcessorPil, back=hf.SiglipVisionModel)
CLIP = dict(processor=hf.CLIPImageProcessorPil, back=hf.CLIPVisionModel, encoded=False)
AIMV2 = dict(processor=hf.CLIPImageProcessorPil)
INTERN = dict(processor=hf.CLIPImageProcessorPil)
aimv2_config = functools.partial(hf.Aimv2VisionConfig, **SIZE, **MLP, use_head=False)
intern_config = functools.partial(hf.InternVLVisionConfig, **SIZE, **MLP)
DINOV3 = dict(processor=hf.DINOv3ViTImageProcessor)
dinov3_config = functools.partial(hf.DINOv3ViTConfig, **SIZE, **MLP, num_register_tokens=3)
BEIT = dict(processor=hf.BeitImageProcessorPil)
beit_config = functools.partial(hf.BeitConfig, **SIZE, **MLP, use_relative_position_bias=True)
data2vec_config = functools.partial(hf.Data2VecVisionConfig, **SIZE, **MLP)
SHARED = dict(use_relative_position_bias=False, use_shared_relative_position_bias=True)
sapiens2_config = functools.partial(hf.Sapiens2Config, **SIZE, **MLP, num_register_tokens=3)
CASES = {
    "vit": Case("ViT", hf.ViTForImageClassification, vit_config(**LABELS)),
    "vit_model": Case("ViT, pooler", hf.ViTModel, vit_config(pooler_output_size=24)),
    "vit_no_bias": Case(
        "ViT, no QKV bias", hf.ViTForImageClassification, vit_config(qkv_bias=False)
    ),
    "deit": Case("DeiT", hf.DeiTForImageClassification, deit_config(**LABELS), **DEIT),
    "deit_model": Case("DeiT, pooler", hf.DeiTModel, deit_config(pooler_output_size=24), **DEIT),
    "distilled": Case(
        "DeiT, distilled", hf.DeiTForImageClassificationWithTeacher, deit_config(**LABELS), **DEIT
    ),
    "dinov2": Case("DINOv2", hf.Dinov2Model, dinov2_config(), **DINOV2),
    "dinov2_head": Case(
        "DINOv2, linear head", hf.Dinov2ForImageClassification, dinov2_config(**LABELS), **DINOV2
    ),
    "swiglu": Case("DINOv2, SwiGLU", hf.Dinov2Model, dinov2_config(use_swiglu_ffn=True), **DINOV2),
    "registers": Case(
        "DINOv2, registers", hf.Dinov2WithRegistersModel, registers_config(), **DINOV2
    ),
    "registers_head": Case(
        "DINOv2, registers, linear head",
        hf.Dinov2WithRegistersForImageClassification,
        registers_config(**LABELS),
        **DINOV2,
    ),
    "dinov3": Case("DINOv3", hf.DINOv3ViTModel, dinov3_config(), **DINOV3),
    "dinov3_gated": Case(
        "DINOv3, SwiGLU, another base",
        hf.DINOv3ViTModel,
        dinov3_config(use_gated_mlp=True, hidden_act="silu", rope_theta=30.0),
        **DINOV3,
    ),
    "dinov3_no_bias": Case(
        "DINOv3, no QKV bias",
        hf.DINOv3ViTModel,
        dinov3_config(query_bias=False, value_bias=False, use_gated_mlp=True, hidden_act="silu"),
        **DINOV3,
    ),
    "beit": Case("BEiT", hf.BeitForImageClassification, beit_config(**LABELS), **BEIT),
    "beit_token": Case(
        "BEiT, shared bias, a table of positions, class token",
        hf.BeitModel,
        beit_config(
            **SHARED,
            use_absolute_position_embeddings=True,
            use_mean_pooling=False,
            use_mask_token=True,
        ),
        **BEIT,
    ),
    "beit_mean": Case("BEiT, mean", hf.BeitModel, beit_config(layer_scale_init_value=0.0), **BEIT),
    "data2vec": Case(
        "Data2VecVision",
        hf.Data2VecVisionForImageClassification,
        data2vec_config(use_relative_position_bias=True, **LABELS),
        **BEIT,
        back=hf.BeitForImageClassification,
        renamed=True,
    ),
    "data2vec_model": Case(
        "Data2VecVision, shared bias, no norm",
        hf.Data2VecVisionModel,
        data2vec_config(**SHARED),
        **BEIT,
    ),
    "mae": Case(
        "MAE",
        hf.ViTMAEModel,
        hf.ViTMAEConfig(**SIZE, **MLP, **DECODER, mask_ratio=0.0),
        back=hf.ViTModel,
    ),
    "mae_decoder": Case(
        "MAE, its decoder left out",
        hf.ViTMAEForPreTraining,
        hf.ViTMAEConfig(**SIZE, **MLP, **DECODER, mask_ratio=0.0),
        back=hf.ViTModel,
    ),
    "msn": Case("MSN", hf.ViTMSNModel, hf.ViTMSNConfig(**SIZE, **MLP), back=hf.ViTModel),
    "vit_masked": Case(
        "ViT, SimMIM's decoder left out",
        hf.ViTForMaskedImageModeling,
        vit_config(),
        back=hf.ViTModel,
    ),
    "deit_masked": Case(
        "DeiT, SimMIM's decoder left out",
        hf.DeiTForMaskedImageModeling,
        deit_config(),
        **DEIT,
        back=hf.DeiTModel,
    ),
    "ijepa": Case("I-JEPA", hf.IJepaModel, hf.IJepaConfig(**SIZE, **MLP), written=False),
    "ijepa_head": Case(
        "I-JEPA, linear head",
        hf.IJepaForImageClassification,
        hf.IJepaConfig(**SIZE, **MLP, **LABELS),
        written=False,
    ),
    "siglip": Case("SigLIP", hf.SiglipVisionModel, hf.SiglipVisionConfig(**SIZE, **MLP), **SIGLIP),
    "siglip_tower": Case(
        "SigLIP, vision tower of both",
        hf.SiglipModel,
        hf.SiglipConfig(vision_config=SIZE | MLP, text_config=TEXT),
        **SIGLIP,
    ),
    "aimv2": Case("AIMv2", hf.Aimv2VisionModel, aimv2_config(), **AIMV2),
    "aimv2_biases": Case(
        "AIMv2, biases", hf.Aimv2VisionModel, aimv2_config(qkv_bias=True, mlp_bias=True), **AIMV2
    ),
    "intern": Case(
        "InternVL, vision tower",
        hf.InternVLVisionModel,
        intern_config(attention_bias=True),
        **INTERN,
    ),
    "intern_token": Case(
        "InternVL, vision tower, last norm",
        hf.InternVLVisionModel,
        intern_config(use_mean_pooling=False, intermediate_size=64),
        **INTERN,
        back=hf.Dinov2Model,
        renamed=True,
    ),
    "intern_rms": Case(
        "InternVL, vision tower, RMSNorm of queries and keys",
        hf.InternVLVisionModel,
        intern_config(norm_type="rms_norm", use_qk_norm=True),
        **INTERN,
    ),
    "sapiens2": Case("Sapiens 2", hf.Sapiens2Model, sapiens2_config(), **DINOV3),
    "sapiens2_no_bias": Case(
        "Sapiens 2, no QKV bias",
        hf.Sapiens2Model,
        sapiens2_config(query_bias=False, key_bias=False, value_bias=False),
        **DINOV3,
    ),
    "clip": Case("CLIP", hf.CLIPVisionModel, hf.CLIPVisionConfig(**SIZE, **MLP), **CLIP),
    "clip_tower": Case(
        "CLIP, vision tower of both",
        hf.CLIPModel,
        hf.CLIPConfig(vision_config=SIZE | MLP, text_config=TEXT),
        **CLIP,
    ),
    "clip_projection": Case(
        "CLIP, its projection left out",
        hf.CLIPVisionModelWithProjection,
        hf.CLIPVisionConfig(**SIZE, **MLP),
        **CLIP,
    ),
}
GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "gelu_python")


KEEP = (hf.BitImageProcessorPil, hf.CLIPImageProcessorPil)
# Resized, 36x48: where an odd number of pixels is cut off, the odd one is on the other side.
PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))


@functools.cache
def model_of(case):
    return randomise(CASES[case].kind(CASES[case].config))


def tower_of(model):
    """The vision encoder of a classifier, or of a model of images and text."""
    names = ("vit", "deit", "ijepa", "dinov2", "dinov2_with_registers", "vision_model")
    names += ("beit", "data2vec_vision")
    return next((getattr(model, name) for name in names if hasattr(model, name)), model)


def expected_of(case, model, config, **options):
    """What the model computes, by our names."""
    tower = tower_of(model)
    encoder = getattr(tower, "encoder", getattr(tower, "model", tower))
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    classifier = hasattr(model, "classifier") or hasattr(model, "cls_classifier")
    if type(tower) is hf.ViTMAEModel:  # which shuffles its patches by noise
        patches = config.num_tokens - 1
        options["noise"] = torch.arange(patches)[None].repeat(2, 1).float()

    def call(x):
        found = (model if classifier else tower)(pixel_values=x, **options)
        if classifier:
            return found.logits
        encoded = found.last_hidden_state if case.encoded else None
        pooled = getattr(found, "pooler_output", None)
        return {"encoded": encoded, "output": pooled}

    return theirs(config, blocks, call)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each case, as `save_pretrained` leaves it."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            model_of(name).save_pretrained(made[name])
            size = SIZE["image_size"]
            resized = {"shortest_edge": size + 4} if CASES[name].processor in KEEP else None
            CASES[name].processor(
                size=resized or {"height": size, "width": size},
                crop_size={"height": size, "width": size},
            ).save_pretrained(made[name])
        return made[name]

    return folder


def assert_same_preprocessing(preprocess, processor):
    expected = np.asarray(processor(PICTURE)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose(preprocess(PICTURE), expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_folder(name, folders, record):
    """Nothing is assumed: numbers, preprocessing and labels are those of its JSON files."""
    case, model = CASES[name], model_of(name)
    vit = load(folders(name))
    assert not set(vit.report.assumed) - {"labels"}, vit.report.assumed
    worst = agree(vit, expected_of(case, model, vit.config))
    record(case.family, case.reference, "folder", worst)
    assert_same_preprocessing(vit.preprocess, case.processor.from_pretrained(folders(name)))
    if vit.config.num_classes == 5:
        assert vit.labels == tuple(LABELS["id2label"].values())
    left = {line.name for line in vit.report.lines if line.status == "left over"}
    tower = [f"{prefix}{key}" for key in tower_of(model).state_dict() for prefix in ("", "vit.")]
    assert not left & set(tower) - {"embeddings.mask_token", "vit.embeddings.mask_token"}


@pytest.mark.parametrize("name", CASES)
def test_a_file_with_the_names_in_memory(name, folders, record, tmp_path):
    """Without a config.json only the number of heads has to be told, and MSN's own epsilon."""
    case, model = CASES[name], model_of(name)
    known = {"layernorm_eps": 1e-6} if name == "msn" else {}
    known |= {"num_heads": SIZE["num_attention_heads"]}
    if name.startswith(
        ("dinov3", "sapiens2")
    ):  # whose weights are those of any size, and of any base
        known |= {"image_size": SIZE["image_size"]}
        known |= {"rotary": Rotary(base=case.config.rope_theta)}
    vit = load(save(model, tmp_path / "model.safetensors"), **known)
    assert vit.report.assumed["architecture"].startswith("is not named")
    assert_same_models(vit, load(folders(name)))
    worst = agree(vit, expected_of(case, model, vit.config))
    record(case.family, case.reference, "names in memory", worst)


@pytest.mark.parametrize("name", CASES)
def test_written_for_transformers(name, folders, record, tmp_path):
    case, model = CASES[name], model_of(name)
    vit = load(folders(name))
    if not case.written:
        with pytest.raises(UserError, match=r"hf has no models with model\.pool='gap'"):
            vit_jax.save(vit, tmp_path, format="hf")
        return
    vit_jax.save(vit, tmp_path, format="hf")
    back = read_back(tmp_path, case.back or case.kind)
    state = model.state_dict()
    if case.back:  # of the whole model, the vision tower alone
        state = tower_of(model).state_dict()
    if not case.renamed:
        same_tensors(without_mask(back.state_dict()), without_mask(state))
    worst = agree(vit, expected_of(case, back, vit.config))
    record(case.family, case.reference, "written for transformers", worst)
    processor = case.processor.from_pretrained(tmp_path)
    assert_same_preprocessing(vit.preprocess, processor)
    assert_same_models(load(tmp_path), vit)
    if vit.config.num_classes:
        known = vit.labels != ("0", "1")  # which is for names that are not known
        names = vit.labels if known else ("LABEL_0", "LABEL_1")
        assert tuple(back.config.id2label.values()) == names


def without_mask(state):
    """The token that stands for masked patches in DINOv2's pre-training is no part of the model."""
    return {key: value for key, value in state.items() if not key.endswith("mask_token")}


def read_back(folder, kind):
    """What transformers makes of a folder of ours, without a word about its keys."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [kind.__name__]
    assert type(hf.AutoConfig.from_pretrained(folder)) is kind.config_class
    # A ViTModel without a pooler has to be asked for.
    poolers = {hf.ViTModel, hf.DeiTModel}
    options = (
        {}
        if "pooler_output_size" in config or kind not in poolers
        else {"add_pooling_layer": False}
    )
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    amiss = {key for keys in info.values() for key in keys}
    if (
        "register" in config["model_type"] or kind is hf.DINOv3ViTModel
    ):  # which has no say in whether it has a mask token
        amiss = {key for key in amiss if not key.endswith("embeddings.mask_token")}
    assert not amiss
    return model.eval()


@pytest.mark.parametrize("name", [name for name in TIMM if "hf" in TIMM[name].writes])
def test_from_timm_to_transformers(name, record, tmp_path):
    """A model of timm, written for transformers, computes there what it computed in timm."""
    model = timm_model_of(name)
    vit = load(save(model, tmp_path / "timm.safetensors"), **TIMM[name].known)
    if vit.config.image_size[0] != vit.config.image_size[1]:
        with pytest.raises(UserError, match="square"):
            vit_jax.save(vit, tmp_path / "hf", format="hf")
        return
    vit_jax.save(vit, tmp_path / "hf", format="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    back = read_back(tmp_path / "hf", getattr(hf, config["architectures"][0]))
    case = Case(TIMM[name].family, type(back), back.config, encoded=not vit.config.pre_norm)
    worst = agree(vit, expected_of(case, back, vit.config))
    agree(vit, theirs(vit.config, model.blocks, model))
    record(case.family, f"timm {timm.__version__}", f"written for {case.reference}", worst)


@pytest.mark.parametrize("hidden_act", GELUS)
def test_every_gelu(hidden_act, tmp_path, record):
    config = vit_config(hidden_act=hidden_act, layer_norm_eps=1e-6, **LABELS)
    model = randomise(hf.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert found.config.layernorm_eps == 1e-6
    case = Case("ViT, other GELUs", hf.ViTForImageClassification, config)
    worst = agree(found, expected_of(case, model, found.config))
    record(case.family, case.reference, hidden_act, worst)


@pytest.mark.parametrize(
    "name, size",
    [
        ("vit", (48, 40)),
        ("vit", (24, 16)),
        ("distilled", (40, 64)),
        ("mae", (48, 48)),
        ("dinov2", (56, 40)),
        ("registers", (24, 56)),
        ("registers", (64, 72)),
        ("dinov3", (48, 40)),
        *(("beit", (48, 40)), ("beit_mean", (24, 16)), ("data2vec_model", (40, 64))),
        ("siglip", (40, 48)),
        ("clip", (64, 24)),
    ],
)
def test_another_image_size(name, size, folders, record):
    case = CASES[name]
    vit = load(folders(name), image_size=size)
    by_itself = ("dino", "registers", "beit", "data2vec")
    always = {} if name.startswith(by_itself) else {"interpolate_pos_encoding": True}
    worst = agree(vit, expected_of(case, model_of(name), vit.config, **always))
    record(case.family, case.reference, "resized", worst)


def test_training_moves_places_as_theirs_does(tmp_path, record, monkeypatch):
    """The whole DINOv3 as it trains, and timm's table of positions, with the same draws."""
    moves = dict(shift=0.3, jitter=1.5, rescale=2.0)
    theirs_of = {f"pos_embed_{name}": most for name, most in moves.items()}
    model = randomise(hf.DINOv3ViTModel(dinov3_config(**theirs_of)))
    model.save_pretrained(tmp_path)
    vit, draws = load(tmp_path), np.random.default_rng(0).random(5).astype(np.float32)
    config = dataclasses.replace(vit.config, rotary=dataclasses.replace(vit.config.rotary, **moves))

    def drawing(fill):
        """What draws the same numbers of [0, 1) in turn, here and there."""
        left = list(draws)
        taken = lambda count: np.float32([left.pop(0) for _ in range(count)])  # noqa: E731
        return lambda shape, low, high: fill(low + (high - low) * taken(int(np.prod(shape))), shape)

    ours_draw = drawing(lambda values, shape: values.reshape(shape))
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, minval, maxval: ours_draw(shape, minval, maxval)
    )
    graphdef, images = structure(config)[0], pixels(config)
    with jax.default_matmul_precision("highest"):
        found = nnx.merge(graphdef, nnx.state(vit.model))(images, key=jax.random.key(0))

    def theirs_draws():
        draw = drawing(lambda values, shape: torch.from_numpy(values.reshape(shape)))
        monkeypatch.setattr(
            torch.Tensor, "uniform_", lambda x, low, high: x.copy_(draw(x.shape, low, high))
        )

    theirs_draws()
    with torch.no_grad():
        wanted = model.train()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    worst = error(found, wanted.pooler_output.numpy())
    assert worst < 2e-5
    record("DINOv3", "transformers DINOv3ViTModel", "places moved in training", worst)
    assert error(found, vit.model(images)) > 1e-3  # which are not moved

    theirs_draws()
    rope = timm.layers.RotaryEmbeddingDinoV3(
        8, **{f"{name}_coords": most for name, most in moves.items()}
    )
    sines, cosines = (
        rope.train().get_embed([4, 4]).numpy().reshape(16, 2, 2, 4)[:, :, 0].swapaxes(0, 1)
    )
    ours_draw = drawing(lambda values, shape: values.reshape(shape))
    places = config.rotary.augmented(config.rotary.places((4, 4), 0), 0, jax.random.key(0))
    table = config.rotary.turns(places, 8, np)
    np.testing.assert_allclose(table, np.concatenate([cosines, sines], axis=-1), atol=3e-6)


def test_another_gate_is_refused(tmp_path):
    model = hf.DINOv3ViTModel(dinov3_config(use_gated_mlp=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="use_gated_mlp with hidden_act 'gelu'; expected 'silu'"):
        load(tmp_path)


@pytest.mark.parametrize(
    "kind, config",
    [
        (hf.SiglipForImageClassification, hf.SiglipConfig(vision_config=SIZE | MLP, **LABELS)),
        (hf.CLIPForImageClassification, hf.CLIPConfig(vision_config=SIZE | MLP, **LABELS)),
    ],
    ids=["SigLIP", "CLIP"],
)
def test_heads_on_another_pooling_are_refused(kind, config, tmp_path):
    """They average the patches' outputs, whatever pooling the tower has."""
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ForImageClassification', which is not known"):
        load(tmp_path)
    with pytest.raises(UserError, match="classifier"):
        load(tmp_path, architecture="SiglipVisionModel")
