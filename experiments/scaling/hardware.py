"""What a TPU chip can do at best, as its maker has it.

bf16 products, memory, its rate, and the bytes that a chip can send over all of its links at once:
half of the bidirectional rate where that is stated.

- v4: https://docs.cloud.google.com/tpu/docs/v4 (275 TFLOP/s, 32 GiB at 1,200 GB/s), six links of
  50 GB/s: Jouppi et al., 2023, https://arxiv.org/abs/2304.01433
- v5e: https://docs.cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 16 GB at 819 GB/s; 1,600 Gbit/s)
- v5p: https://docs.cloud.google.com/tpu/docs/v5p (459 TFLOP/s, 95 GB at 2,765 GB/s; 4,800 Gbit/s)
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Peak rates of one chip, per second."""

    flops: float
    memory: float  # bytes, not a rate
    memory_bytes: float
    sent_bytes: float


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
}


def floor(chip: Chip, flops: float, touched: float, sent: float) -> tuple[float, str]:
    """The least seconds that a step can take, and the resource that is busy all the while."""
    times = {
        "compute": flops / chip.flops,
        "memory": touched / chip.memory_bytes,
        "links": sent / chip.sent_bytes,
    }
    limit = max(times, key=lambda name: times[name])
    return times[limit], limit
