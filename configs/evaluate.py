"""What a model is worth, without training it: for `evaluate --model`.

    python -m vit_jax evaluate --model=B_16.npz --config=configs/evaluate.py:imagenet
    python -m vit_jax evaluate --model=B_16.npz \\
        --config=configs/evaluate.py:imagenet,classify,real,v2
    python -m vit_jax evaluate --model=B_16.npz --config=configs/evaluate.py:pets,knn,probe,vtab

The argument is DATA[,WHAT...][,SOURCE]; DATA is imagenet, cifar10, cifar100, pets or flowers.
WHAT is `classify` (the default): accuracy on the test images of DATA, whose classes the model has;
`real` and `v2`: other labels and images of ImageNet; `knn`, `probe`: nearest neighbours and a
linear probe of its frozen features on DATA; `fewshot`: the paper's few-shot accuracy on seven data
sets; `vtab`: linear probes of VTAB-1k's 19 tasks. Images are prepared as the model's own
preprocessing says, but for few-shot and VTAB, which squash them.
"""

import presets
from ml_collections import ConfigDict


def get_config(arg="imagenet"):
    """DATA[,WHAT...][,SOURCE]."""
    names = ("imagenet", "cifar10", "cifar100", "pets", "flowers")
    args = presets.read_data(arg, names, ("classify", *presets.EVALUATORS))
    config = ConfigDict(dict(batch_size=256, data={}, eval={}))
    if "classify" in args.words or not args.words:
        config.data.test = dict(source=args.data.source, split=args.data.test)
    config.eval.evaluators = presets.evaluators(args, {})
    return config
