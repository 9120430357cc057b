"""Errors that are not bugs: the user's mistakes, and stops on request."""

import errno
import os
import re

from vit_jax.extras import install
from vit_jax.words import nearest

__all__ = ["Stopped", "UserError", "nearest", "sentence"]


class UserError(ValueError):
    """An error that the user can fix: what was found, what was expected and what to do.

    The command line prints it without a traceback and ends with exit code 2. Control characters are
    escaped, as messages may contain names from files.
    """

    def __init__(self, message: str):
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(text if len(text) < 2000 else f"{text[:1900]} ...")


class Stopped(Exception):
    """SIGTERM or Ctrl-C came; all is saved, and the same command resumes.

    `code` is the exit code: 143, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, code: int = 143):
        super().__init__(message)
        self.code = code


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_MEMORY = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "Out of memory", "bad_alloc")
_NO_DEVICE = ("Unable to initialize backend", "failed to initialize: ")
_DRIVER = (
    *("CUDA driver version is insufficient", "cudaErrorInsufficientDriver"),
    *("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    *("DNN library initialization failed", "Loaded runtime CuDNN library"),
)


def sentence(error: BaseException, has_config: bool) -> str | None:
    """Explains an error caused by the machine in one sentence; None if it is a bug of ours.

    Args:
      has_config: whether the command has a config, so that the advice can name its keys.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error}: make room or choose another place"
    short = isinstance(error, OSError) and error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError)  # JAX's own are such
    if told and any(sign in text for sign in _DRIVER):
        return (
            f"the GPU's driver or libraries do not fit this JAX ({_brief(text)}): bring the driver "
            "up to date (nvidia-smi says which it is), or run with JAX_PLATFORMS=cpu"
        )
    if (told and any(sign in text for sign in _NO_DEVICE)) or _no_platform(error):
        return _no_device(text)
    if short or isinstance(error, MemoryError) or (told and any(sign in text for sign in _MEMORY)):
        advice = "free some, or take a machine or device that has more"
        if has_config:
            advice = (
                "lower batch_size or eval.batch_size, raise optim.accumulate, set "
                "model.remat=full, or split the model by mesh.fsdp=-1; `vit-jax "
                "preflight` says what a run needs"
            )
        return f"out of memory ({_brief(text) or type(error).__name__}): {advice}"
    return None


def _brief(text: str) -> str:
    line = text.strip().split("\n")[0].strip()
    return line if len(line) < 300 else f"{line[:300]} ..."


def _no_platform(error: BaseException) -> bool:
    """Whether this is JAX's empty assertion for a platform in JAX_PLATFORMS that is missing."""
    if not (isinstance(error, AssertionError) and not str(error) and _platforms()):
        return False
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError):
        return True
    return False


def _platforms() -> str:
    return os.environ.get("JAX_PLATFORMS", "")


def _no_device(text: str) -> str:
    if held := re.search(r"TPU is already in use by process with pid (\d+)", text):
        return f"the TPU is in use by process {held[1]}: wait for its end, or set JAX_PLATFORMS=cpu"
    reason = re.sub(r"\s*\((set JAX_PLATFORMS|you may need to uninstall).*", "", _brief(text))
    reason = re.sub(r"^Unable to initialize backend '\w+': ", "", reason)
    reason = f" ({reason})" if reason else ""
    if _platforms():
        wanted = [install(extra) for extra in ("cuda", "tpu") if extra in _platforms().split(",")]
        return (
            f"JAX_PLATFORMS={_platforms()}, but JAX can use no such device here{reason}: unset it, "
            f"set JAX_PLATFORMS=cpu, or install JAX for that device{': ' if wanted else ''}"
            f"{' '.join(wanted)}"
        )
    return f"JAX cannot use this machine's device{reason}: mend that, or set JAX_PLATFORMS=cpu"
