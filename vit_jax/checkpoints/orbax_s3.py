"""Checkpoints on s3://: Orbax knows the URL, but asks tensorstore for S3 only with what is here."""

import os
import re
from typing import Any

from etils import epath

from vit_jax.errors import UserError
from vit_jax.objects import driver


def options(directory: epath.Path) -> dict[str, Any]:
    """Options of an Orbax checkpointer for a directory; on s3://, prepares Orbax for it.

    S3 has no renaming of folders: a checkpoint is complete when a file in it says so, as on gs://.

    Raises:
      UserError: this version of Orbax has these functions no more.
    """
    if not os.fspath(directory).startswith("s3://"):
        return {}
    from orbax.checkpoint._src.path import atomicity
    from orbax.checkpoint._src.serialization import tensorstore_utils as module

    needed = ("_normalize_path", "_use_gcs_driver", "gcs_utils")
    if not all(hasattr(module, name) for name in needed):
        import orbax.checkpoint as ocp

        raise UserError(
            f"orbax-checkpoint {ocp.__version__} cannot be prepared for s3://: install 0.12.8, or "
            "use a folder or gs://"
        )
    if not getattr(module, "s3_is_prepared", False):
        _prepare(module)
    return {"temporary_path_class": atomicity.CommitFileTemporaryPath}


def _prepare(module: Any) -> None:
    google = module.gcs_utils.get_kvstore_for_gcs

    def of_bucket(path: str) -> dict[str, Any]:
        return driver(path) if path.startswith("s3://") else google(path)

    module._normalize_path = lambda path: re.sub(
        "^(gs|s3):/(?!/)", r"\1://", os.path.normpath(path)
    )
    module._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    module.gcs_utils.get_kvstore_for_gcs = of_bucket
    module.s3_is_prepared = True
