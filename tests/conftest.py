"""Eight faked CPU devices, and shapes in signatures enforced, before anything imports jax."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("vit_jax", "beartype.beartype")
