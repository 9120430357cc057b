"""How to install an extra of this package, which is on no index."""

import json
import os
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote


def install(extra: str) -> str:
    """The command that installs what an extra of this package needs, such as "plot".

    It takes the extra from the checkout that runs or, if that is an installed package, from where
    pip installed it from; if that is not recorded or gone, it names the extra's own requirements.
    """
    beside = os.path.dirname(shutil.which("pip") or "") == os.path.dirname(sys.executable)
    pip = "pip install" if beside else f"{shlex.quote(sys.executable)} -m pip install"
    checkout = Path(__file__).parents[1]
    if (checkout / "setup.py").is_file():
        here = "." if Path.cwd() == checkout else checkout
        return f"{pip} -e {shlex.quote(f'{here}[{extra}]')}"
    package = metadata.distribution("vit_jax")
    origin = _origin(json.loads(package.read_text("direct_url.json") or "{}"))
    if origin:
        return f"{pip} {shlex.quote(f'vit_jax[{extra}] @ {origin}')}"
    parts = (each.partition(";") for each in package.requires or ())
    wanted = [name.strip() for name, _, when in parts if re.search(rf"extra == .{extra}.", when)]
    return f"{pip} {shlex.join(wanted)}"


def _origin(recorded: dict[str, Any]) -> str | None:
    """The URL in pip's record of where it found a package (PEP 610), if it is still there."""
    url, vcs = recorded.get("url"), recorded.get("vcs_info")
    if not url or (url.startswith("file:") and not os.path.exists(unquote(url[len("file://") :]))):
        return None
    if vcs:
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    folder = recorded.get("subdirectory")
    return f"{url}#subdirectory={folder}" if folder else url
