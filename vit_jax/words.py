"""Suggestions for unknown names: by case, synonyms of the field, and spelling."""

import difflib
from collections.abc import Iterable

_FEW = 6  # names that one sentence may suggest
_MANY = 40  # of names with dots, those are no longer listed one by one

# Synonyms: our name -> its names elsewhere. Case, "-" and "_" do not matter. Only names that are
# valid where the question comes up are suggested.
KEYS = {
    "batch_size": "batch bs train_batch_size global_batch_size",
    "total_epochs": "epochs epoch num_epochs n_epochs max_epochs num_train_epochs",
    "total_steps": "steps num_steps max_steps train_steps training_steps num_train_steps iterations"
    " iters max_iters num_iterations max_iterations",
    "total_examples": "examples num_examples samples num_samples samples_seen images_seen",
    "seed": "random_seed rng_seed rng random_state",
    "init_from": "pretrained pretrained_path pretrained_model checkpoint checkpoint_path ckpt"
    " weights load_from model_path finetune fine_tune finetune_from from_checkpoint resume",
    "objective": "loss criterion loss_fn loss_function",
    "distill.teacher": "teacher_model teacher_path teacher_checkpoint teacher_name",
    "distill.kind": "distillation_type",
    "distill.temperature": "tau distillation_tau",
    "distill.weight": "distillation_alpha",
    "precision": "amp use_amp fp16 bf16 float16 bfloat16 half mixed_precision half_precision dtype"
    " compute_dtype",
    "model.variant": "arch architecture model_name model_type backbone network",
    "model.max_patches": "max_num_patches max_seq_len max_sequence_length naflex native_size",
    "model.image_size": "img_size imgsz resolution image_resolution input_size crop_size size",
    "model.patch_size": "patch patches",
    "model.in_channels": "channels num_channels in_chans input_channels",
    "model.width": "hidden hidden_size hidden_dim embed_dim emb_dim embedding_dim dim d_model",
    "model.depth": "layers num_layers n_layers num_hidden_layers blocks num_blocks n_layer",
    "model.num_heads": "heads n_heads n_head num_attention_heads",
    "model.mlp_dim": "intermediate_size mlp_hidden ffn_dim ff_dim d_ff",
    "model.num_classes": "classes n_classes nb_classes num_labels",
    "model.representation_size": "pre_logits",
    "model.dropout": "drop drop_rate dropout_rate hidden_dropout_prob",
    "model.drop_path": "drop_path_rate stochastic_depth stochdepth sd_rate",
    "model.patch_dropout": "patch_drop_rate patch_drop",
    "model.layernorm_eps": "eps layer_norm_eps ln_eps norm_eps",
    "model.layer_scale": "init_values layerscale",
    "model.gelu": "act activation hidden_act act_layer",
    "model.pool": "pooling global_pool classifier pool_type",
    "model.position": "pos_embed posemb position_embedding",
    "model.registers": "reg_tokens num_register_tokens register_tokens",
    "model.remat": "gradient_checkpointing grad_checkpointing activation_checkpointing",
    "model.attention": "attn attn_implementation flash_attention",
    "data.train.source": "data dataset data_set dataset_name data_dir data_path data_root root"
    " train_dir train_data path",
    "data.val.source": "data dataset data_set dataset_name data_dir data_path data_root root"
    " val_dir val_data path",
    "data.train.split": "train_split",
    "data.val.split": "val_split validation_split eval_split",
    "data.test.split": "test_split",
    "data.train.flip": "hflip horizontal_flip random_flip",
    "data.train.erasing": "reprob random_erasing random_erase",
    "data.train.resize": "interpolation",
    "data.val.resize": "interpolation",
    "data.train.crop": "crop_pct",
    "data.val.crop": "crop_pct",
    "data.train.repeats": "repeated_aug repeated_augmentation aug_repeats ra",
    "data.train.trivial_augment": "trivialaugment trivialaugmentwide ta ta_wide",
    "data.train.three_augment.jitter": "threeaugment three_aug 3augment",
    "data.train.rand_augment.magnitude": "auto_augment randaugment randaug aa",
    "data.train.rand_augment.layers": "auto_augment randaugment randaug aa",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "data.threads": "num_threads n_threads",
    "augment.mixup": "mixup_alpha",
    "augment.cutmix": "cutmix_alpha",
    "augment.image_sizes": "progressive_resizing resolutions image_size_schedule",
    "augment.mix_off": "mixup_off_epoch",
    "augment.label_smoothing": "smoothing label_smooth",
    "optim.name": "optimizer optimiser opt optim",
    "optim.lr": "learning_rate base_lr max_lr peak_lr init_lr base_learning_rate lr0",
    "optim.end_lr": "min_lr lr_min final_lr eta_min",
    "optim.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type sched",
    "optim.warmup": "warm_up warmup_steps warmup_epochs warmup_ratio num_warmup_steps warmup_iters",
    "optim.drops": "milestones lr_steps decay_steps boundaries",
    "optim.drop_factor": "gamma decay_rate lr_gamma",
    "optim.weight_decay": "wd",
    "optim.grad_clip": "clip clip_grad clip_norm grad_norm grad_clip_norm max_grad_norm"
    " gradient_clip gradient_clip_val",
    "optim.accumulate": "accumulation accum accum_iter accum_steps grad_accum grad_accum_steps"
    " accumulate_grad_batches gradient_accumulation gradient_accumulation_steps",
    "optim.ema": "ema_decay model_ema model_ema_decay ema_rate",
    "optim.ema_warmup": "model_ema_warmup use_num_updates ema_use_num_updates",
    "optim.b1": "beta1 adam_beta1 betas",
    "optim.b2": "beta2 adam_beta2 betas",
    "optim.eps": "eps epsilon adam_eps adam_epsilon opt_eps",
    "mesh.data": "gpus num_gpus n_gpu devices num_devices data_parallel dp",
    "mesh.fsdp": "zero fully_sharded sharding",
    "mesh.tensor": "tp tensor_parallel model_parallel",
    "eval.every": "eval_freq eval_steps eval_interval val_every val_interval validate_every",
    "eval.batch_size": "val_batch_size test_batch_size",
    "checkpoint.every": "save_every save_freq save_steps save_interval checkpoint_freq ckpt_every",
    "checkpoint.keep": "save_total_limit max_to_keep keep_last keep_checkpoints",
    "log.every": "log_freq log_interval log_steps logging_steps print_freq print_every",
    "log.wandb": "use_wandb",
    "log.wandb_project": "project",
    "log.tensorboard": "tb",
}
FLAGS = {
    "--workdir": "out output out_dir output_dir save_dir run_dir exp_dir log_dir checkpoint_dir"
    " dst resume",
    "--config": "cfg config_file config_path",
    "--model": "checkpoint ckpt weights pretrained model_path init_from",
    "--topk": "top k n",
    "--processes": "num_processes world_size nproc",
    "--process-id": "rank process_index node_rank",
    "--coordinator": "master master_addr coordinator_address",
    "--join-timeout": "timeout",
    "--topology": "devices target hardware accelerator tpu gpu",
    "--launcher": "executor backend",
    "--jobs": "parallel num_jobs max_jobs workers num_workers",
    "--nodes": "num_nodes",
    "--gpus-per-node": "gpus num_gpus gres",
    "--time": "time_limit walltime timeout",
    "--partition": "queue",
    "--pictures": "out output plots images figures out_dir output_dir",
    "--format": "to",
    "--set": "field fields",
    "--out": "output out_file output_file html",
    "--short-side": "size resize max_size image_size",
    "--shard-examples": "shard_size examples_per_shard",
    "--examples": "samples num_samples num_examples max_examples limit",
    "--threads": "num_threads workers num_workers",
    "--labels": "annotations label_file",
    "--classes": "class_names label_names",
}
COMMANDS = {
    "train": "fit finetune fine_tune pretrain resume",
    "evaluate": "eval test validate val",
    "predict": "infer inference classify",
    "convert": "export",
    "inspect": "show info describe summary",
    "prepare": "dataset import pack shard",
    "preflight": "check plan estimate dry_run memory",
    "sweep": "grid search tune launch",
    "report": "compare table",
}
VALUES = {
    "float32": "fp32 f32 float full single float64",
    "bfloat16": "bf16 fp16 float16 half mixed amp",
    "softmax": "ce cross_entropy xent softmax_xent categorical_crossentropy nll",
    "sigmoid": "bce binary_cross_entropy sigmoid_xent bce_with_logits multi_label",
    "adamw": "adam_w fused_adamw adamw_torch",
    "sgd": "momentum nesterov",
    "cosine": "cos cosine_annealing cosine_decay",
    "constant": "fixed const none",
    "rsqrt": "inverse_sqrt inv_sqrt",
    "staircase": "step steps multistep multi_step piecewise",
    "token": "cls cls_token class_token",
    "gap": "avg mean average avgpool global",
    "map": "attention attn",
    "tanh": "gelu_tanh gelu_new gelu_pytorch_tanh approximate",
    "erf": "gelu exact",
    "quick": "quick_gelu",
    "cudnn": "flash flash_attention",
    "full": "all blocks true",
    "bicubic": "cubic",
    "bicubic_antialias": "bicubic cubic",
    "bilinear": "linear",
    "folder": "imagefolder directory dir",
    "tar": "webdataset wds",
    "arrays": "npz npy numpy",
    "tfds": "tensorflow_datasets",
    "records": "arrayrecord array_record",
    "google": "jax flax npz augreg",
    "hf": "huggingface transformers",
    "timm": "torch pytorch",
    "slurm": "sbatch submitit",
    "print": "dry_run",
    "train": "training",
    "val": "validation valid dev eval",
    "validation": "val valid dev eval",
}


def _squashed(name: str) -> str:
    return "".join(c for c in name.lower() if c not in "-_. ")


_MEANT: dict[str, list[str]] = {}  # a name as others have it -> ours
for _ours, _theirs in (pair for t in (KEYS, FLAGS, COMMANDS, VALUES) for pair in t.items()):
    for _word in _theirs.split():
        _MEANT.setdefault(_squashed(_word), []).append(_ours)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message that suggests what `name` may have meant, from `known`.

    Names may be flags ("--topk"), or keys of a config ("optim.lr").
    """
    known = sorted({str(k) for k in known})
    found = [] if name in ("", "None") else [repr(k) for k in meant(str(name), known)]
    if found:
        *others, last = found
        return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    section = _plain(str(name)).rpartition(".")[0]
    inside = [k for k in known if section and _plain(k).startswith(f"{section}.")]
    if not inside and len(known) > _MANY:
        heads = {k.partition(".")[0] + (".*" if "." in k else "") for k in known}
        inside = sorted(head for head in heads if not head.startswith("-"))
    return f"known: {', '.join(inside or known)}"


def meant(name: str, known: list[str]) -> list[str]:
    """Those of `known` that `name` may stand for, at most a few; only the most likely reading."""
    plain = {k: _plain(k) for k in known}
    wanted = _plain(name)
    section, _, last = wanted.rpartition(".")
    same = [k for k, p in plain.items() if _squashed(p) == _squashed(wanted) != ""]
    if same:
        return same[:_FEW]
    for word in (wanted, last):
        found = _ours_for(_squashed(word), plain)
        if found:
            return [k for k in found if section and _section(plain[k]) == section] or found
    found = [k for k, p in plain.items() if _squashed(_last(p)) == _squashed(last) != ""]
    found = outermost(found)
    if 0 < len(found) <= _FEW:
        close = difflib.get_close_matches(wanted, [plain[k] for k in found], n=1, cutoff=0.8)
        return [k for k in found if plain[k] in close] or found

    spelt: dict[str, list[str]] = {}
    for k, p in plain.items():
        if _section(p) == section:
            spelt.setdefault(_last(p), []).append(k)
    for word in _MEANT:
        found = _ours_for(word, plain)
        if len(word) > 4 and found and word not in spelt:
            spelt[word] = [k for k in found if _section(plain[k]) == section] or found
    close = difflib.get_close_matches(last, spelt, n=1, cutoff=0.7)
    if close:
        return spelt[close[0]][:_FEW]
    if section and any(_section(p) == section for p in plain.values()):
        return []  # what the section itself is like says nothing
    whole = {p: k for k, p in plain.items()}
    return [whole[p] for p in difflib.get_close_matches(wanted, whole, n=1, cutoff=0.5)]


def outermost(names: list[str]) -> list[str]:
    """Of keys that end alike the one whose section holds the others', if there is one; or all.

    Of optim.lr and optim.probe.lr it is optim.lr.
    """
    first = min(names, key=len, default="")
    inside = f"{_section(first)}."
    return [first] if all(name.startswith(inside) for name in names) and names else names


def _ours_for(word: str, plain: dict[str, str]) -> list[str]:
    """Names known here that are synonyms of `word` (squashed)."""
    found = []
    for ours in _MEANT.get(word, ()):
        # If all known keys are of one section, they are known without its name.
        found += [k for k, p in plain.items() if ours in (k, p) or ours == f"model.{p}"]
    return list(dict.fromkeys(found))[:_FEW]


def _plain(name: str) -> str:
    return name.lower().lstrip("-").removeprefix("config.")


def _section(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
