"""A published model on thousands of photographs of your own.

    vit-jax train --config=finetune_own:folder:/data/pets --workdir=runs/pets \\
        --config.init_from=S_16.npz
    vit-jax evaluate --workdir=runs/pets/checkpoints/best

The argument is [VARIANT,]SOURCE[,TRAIN,VAL]. Without a variant, the model is the checkpoint's; with
one, another checkpoint is refused. SOURCE, TRAIN and VAL are as in configs/images.py:
`finetune_own:folder:/data/pets,all[:90%],all[90%:]` holds a tenth of the images out. Images have
the size of the checkpoint, and `--config.model.image_size=384` is another.

Why it is as it is:

- The rate is small, and smaller near the input: what the first blocks know is general, and few
  images would spoil it. `layer_decay` of 0.65 to 0.75 is what BEiT and MAE fine-tune with. The new
  head is the one layer with all of `lr`, and a warm-up keeps its first gradients small.
- The weights that are evaluated and loaded are an average over about the last hundred steps, which
  is as good as a lower rate at the end. In a run of fewer than 400 steps it holds too much of the
  first ones: `--config.optim.ema=None`, or `--config.optim.ema_warmup=True`, which begins with a
  shorter average.
- Val is measured every 50 steps, the best checkpoint is kept, and the run stops after ten
  measurements without a better one, since small data is over-fitted sooner or later.
- Crops keep at least a quarter of the image: of a few thousand photographs, smaller parts often
  show nothing of the class. Left and right are swapped half of the time; where that changes the
  class, `--config.data.train.flip=False`. Photographs are turned upright by EXIF. Val is resized as
  the checkpoint's own family does it.
- An image that cannot be read stops the run: `--config.data.on_corrupt=skip` goes on, and counts.

To choose first: the learning rate, of 1e-4, 3e-4 and 1e-3. With fewer than a thousand images LoRA
is worth a try, `--config.model.lora.rank=8 --config.optim.layer_decay=None --config.optim.lr=1e-3`:
in experiments/finetune no other of five ways was better on garments, solar cells or emoji.
"""

import presets
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg="folder:images"):
    """[VARIANT,]SOURCE[,TRAIN,VAL]

    A source may itself have commas.
    """
    own = presets.read_own(arg)

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64
    config.total_steps = placeholder(int)
    config.total_epochs = 20.0
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)

    config.model = ConfigDict(dict(variant=own.variant) if own.variant else {})

    config.data = ConfigDict(dict(on_corrupt="stop"))
    config.data.train = ConfigDict(dict(source=own.source, split=own.train, flip=True, exif=True))
    config.data.train.inception_crop = ConfigDict(dict(area=(0.25, 1.0), ratio=(0.75, 1.33)))
    config.data.val = ConfigDict(dict(source=own.source, split=own.val, exif=True))

    config.augment = ConfigDict(dict(label_smoothing=0.1))

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 3e-4
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.05
    config.optim.grad_clip = 1.0
    config.optim.layer_decay = 0.75
    config.optim.ema = 0.99

    config.eval = ConfigDict(dict(every=50))
    config.checkpoint = ConfigDict(dict(best="val/accuracy", keep=1))
    config.stop = ConfigDict(dict(patience=10))
    config.log = ConfigDict(dict(every=10))
    return config
