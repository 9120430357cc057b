"""What devices can do, by their kind: memory, products, bandwidth."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device.

    Attributes:
      memory: bytes.
      peak: bfloat16 products in FLOP/s, dense, by the data sheet.
      products: those that large products reach, FLOP/s.
      bandwidth: of its memory that large copies reach, bytes/s.
      launch: seconds that starting a kernel costs.
    """

    memory: int
    peak: float
    products: float
    bandwidth: float
    launch: float = 0.0

    def rate(self, dtype: str) -> float:
        """FLOP/s that large products of this dtype reach."""
        return self.products * {"f32": 0.5, "f64": 0.05}.get(dtype, 1.0)


CHIPS = {
    "NVIDIA H100 80GB HBM3": Chip(80 * GIB, 989e12, 790e12, 3.0e12, 2e-6),
}
