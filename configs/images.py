"""A ViT from scratch on images of your own, or on any other source of them.

    vit-jax train --config=images:S/16,folder:/data/pets --workdir=runs/pets
    vit-jax predict --model=runs/pets new.jpg

The argument is VARIANT,SOURCE, and where the splits are not called train and val,
VARIANT,SOURCE,TRAIN,VAL: `Ti/16,folder:/data/pets,all[:90%],all[90%:]` holds a tenth of
/data/pets/CLASS/*.jpg out. Sources are folder:PATH, tar:PATH, tfds:NAME, records:PATH and
arrays:FILE.npz.

What is known to matter: thousands of images are few for a ViT, which knows nothing of images at
first. `--config.init_from=FILE` starts from weights of another code base (the variant must be the
same; lower optim.lr to 1e-4 and total_epochs to 10). The crop and flip of Inception are the
published ones ("How to train your ViT?", arXiv 2106.10270); evaluation resizes the shorter side
to 8/7 of the model's size and cuts the centre out. Photographs are turned upright as their EXIF
orientation says, in training, evaluation and `predict`; exif=False reads them as they are stored.
"""

import presets
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg="S/16,folder:images"):
    """VARIANT,SOURCE[,TRAIN,VAL]

    A source may itself have commas.
    """
    own = presets.read_own(arg, variant_needed=True)

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256
    config.total_steps = placeholder(int)
    config.total_epochs = 100.0
    config.total_examples = placeholder(int)
    config.init_from = placeholder(str)

    config.model = ConfigDict(dict(variant=own.variant, image_size=(224, 224)))

    config.data = ConfigDict(dict(on_corrupt="stop"))
    config.data.train = ConfigDict(dict(source=own.source, split=own.train, flip=True, jpeg="fast"))
    config.data.train.exif = True
    config.data.train.inception_crop = ConfigDict(dict(area=(0.05, 1.0), ratio=(0.75, 1.33)))
    config.data.val = ConfigDict(dict(source=own.source, split=own.val, aspect="keep", crop=0.875))
    config.data.val.update(resize="bilinear_antialias", exif=True)

    config.augment = ConfigDict(dict(label_smoothing=0.1))

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.1
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 1.0

    config.eval = ConfigDict(dict(every=1000))
    config.checkpoint = ConfigDict(dict(every=1000, keep=2))
    config.log = ConfigDict(dict(every=50))
    return config
