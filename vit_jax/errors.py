"""Errors that are not bugs: the user's mistakes, and stops on request."""

import contextlib
import errno
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator

from vit_jax.extras import install
from vit_jax.words import nearest, outermost

__all__ = [
    "Stopped",
    "Unreachable",
    "UserError",
    "check_refused",
    "during",
    "name_extra",
    "nearest",
    "outermost",
    "sentence",
    "why",
]


class UserError(ValueError):
    """An error that the user can fix: what was found, what was expected and what to do.

    The command line prints it without a traceback and ends with exit code 2. Control characters are
    escaped, as messages may contain names from files.
    """

    code = 2

    def __init__(self, message: str):
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(text if len(text) < 2000 else f"{text[:1900]} ...")


class Unreachable(UserError):
    """A store or a service does not answer: what was saved is whole, and the command ends with 75.

    That is EX_TEMPFAIL of sysexits.h, for launchers that start a command again by its exit code.
    """

    code = 75


class Stopped(Exception):
    """SIGTERM or Ctrl-C came; all is saved, and the same command resumes.

    `code` is the exit code: 143, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, code: int = 143):
        super().__init__(message)
        self.code = code


# What to do about an error of the operating system; what is not here may be a bug of ours.
_DO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room or choose another place"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        "change who may read and write there (`ls -l` and `chmod`), or choose another place",
    ),
    errno.EROFS: "that disk is mounted to be read only: choose another place",
    errno.EISDIR: "expected a file",
    errno.ENOTDIR: "a part of this path is a file; expected folders",
    errno.EEXIST: "choose another name, or move that away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle",
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "raise the limit of open files, as `ulimit -n 65536` does"
    ),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO),
        "the disk or the network to it failed: try again when it is back",
    ),
}
_MEMORY = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "Out of memory", "bad_alloc")
_NO_DEVICE = ("Unable to initialize backend", "failed to initialize: ")
_DRIVER = (
    *("CUDA driver version is insufficient", "cudaErrorInsufficientDriver"),
    *("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    *("DNN library initialization failed", "Loaded runtime CuDNN library"),
)
# What to do, by command, where memory does not suffice.
_LESS = {
    "train": "`vit-jax preflight` with the same flags looks for the smallest change that fits: "
    "raise optim.accumulate, set model.remat=full, lower batch_size or eval.batch_size, or split "
    "the model by mesh.fsdp=-1",
    "evaluate": "lower eval.batch_size",
    "predict": "lower --batch-size, or run with JAX_PLATFORMS=cpu",
}
_LESS_HOST = {
    "train": "lower data.threads or data.workers, batch_size or eval.batch_size",
    "evaluate": "lower data.threads or data.workers, or eval.batch_size",
    "predict": "lower --batch-size or --threads",
    "prepare": "lower --threads, or name --short-side",
}
_WHILE = "while "


@contextlib.contextmanager
def during(what: Callable[[], str]) -> Iterator[None]:
    """Context that notes on errors what was being done, for `sentence`: "step 3 of 100"."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{_WHILE}{what()}")
        raise


def sentence(error: BaseException, command: str = "") -> str | None:
    """Explains an error caused by the machine in one sentence; None if it is a bug of ours.

    Args:
      command: the name of the command that raised it, whose flags and keys the advice names.
    """
    text = str(error)
    command = "train" if command in ("preflight", "sweep") else command
    if isinstance(error, OSError) and error.errno in _DO:
        return why(error)
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "the current folder is no longer there: change to another one"  # of os.getcwd
    short = isinstance(error, OSError) and error.errno == errno.ENOMEM
    from_jax = isinstance(error, RuntimeError)  # JAX's own are such
    if from_jax and any(sign in text for sign in _DRIVER):
        return (
            f"the GPU's driver or libraries do not fit this JAX ({_brief(text)}): bring the driver "
            "up to date (nvidia-smi says which it is), or run with JAX_PLATFORMS=cpu"
        )
    if (from_jax and any(sign in text for sign in _NO_DEVICE)) or _no_platform(error):
        return _no_device(text)
    if short or isinstance(error, MemoryError):
        return _no_memory(error, "out of this machine's memory", _LESS_HOST.get(command))
    if from_jax and (killed := re.search(r"Worker process was .* with exit code -(\d+)", text)):
        return _worker(int(killed[1]))
    if from_jax and any(sign in text for sign in _MEMORY):
        return _no_memory(error, "out of the device's memory", _LESS.get(command))
    return None


def why(error: OSError) -> str:
    """An error of the operating system in one sentence, with what to do about it."""
    reason = error.strerror or str(error)
    files = " and ".join(str(each) for each in (error.filename, error.filename2) if each)
    do = f": {_DO[error.errno]}" if error.errno in _DO else ""
    return f"{files}: {reason}{do}" if files else f"{reason}{do}"


def check_refused(error: BaseException, path: str | os.PathLike) -> None:
    """Raises a UserError if the system refused access to a file, whatever is in it."""
    if isinstance(error, OSError) and error.errno in _DO:
        raise UserError(why(OSError(error.errno, os.strerror(error.errno), path))) from None


def _no_memory(error: BaseException, what: str, advice: str | None) -> str:
    notes = getattr(error, "__notes__", ())
    doing = next((f" {note}" for note in notes if note.startswith(_WHILE)), "")
    text = _brief(str(error)).removeprefix("RESOURCE_EXHAUSTED: ")
    advice = advice or "free some, or take a machine or device that has more"
    return f"{what}{doing} ({_sizes(text) or type(error).__name__}): {advice}"


def _worker(number: int) -> str:
    do = "start the same command again, which goes on from the last checkpoint"
    if number == signal.SIGKILL:
        reason, do = ", as the system does where memory is short", f"{do}, with fewer data.workers"
    elif number == signal.SIGBUS:
        reason = ", as where /dev/shm is full"
        do = f"{do}, with a larger /dev/shm (docker run --shm-size=8g) or data.workers=0"
    else:
        reason = ""
    return f"a worker that reads data was ended by signal {number}{reason}: {do}"


def _sizes(text: str) -> str:
    """Writes "4770354232 bytes" as "4.44 GiB"."""

    def short(match: re.Match[str]) -> str:
        count = int(match[1].replace(",", ""))
        for unit, size in (("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20)):
            if count >= 2**size:
                return f"{count / 2**size:.4g} {unit}"
        return match[0]

    return re.sub(r"\b(\d[\d,]*) ?(?:bytes|B)\b", short, text)


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
    if not _platforms():
        return f"JAX cannot use this machine's device{reason}: mend that, or set JAX_PLATFORMS=cpu"
    extra = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}.get(_platforms().partition(",")[0])
    wanted = f"install JAX for that device{f': {install(extra)}' if extra else ''}"
    if extra == "cuda" and not os.path.exists("/dev/nvidia0"):
        reason += ", and there is no NVIDIA GPU (no /dev/nvidia0)"
    return (
        f"JAX_PLATFORMS={_platforms()}, but JAX can use no such device here{reason}: unset it, "
        f"set JAX_PLATFORMS=cpu, or {wanted}"
    )


def name_extra(record: logging.LogRecord) -> bool:
    """A filter of JAX's log: its warning that a GPU or TPU lies idle also says what to install."""
    for kind, extra in {"NVIDIA GPU": "cuda", "Google TPU": "tpu"}.items():
        if f"{kind} may be present" in str(record.msg):
            record.msg = f"{record.msg} To use it: {install(extra)}"
    return True
