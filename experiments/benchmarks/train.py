"""Measures our training step beside timm's on random data, on one device.

    python experiments/benchmarks/train.py --variants=B/16,L/16 --batch-sizes=128,256 --json=b.json

All contestants train the same model (their parameters are counted) with the same AdamW, from uint8
images that are on the device already: normalise, forward, backward, update. They take turns, round
after round, together with a large matrix product, the ceiling; so what slows the machine down for
a while slows all of them. Medians are reported, with the lowest and the highest round.
"""

import engine

if __name__ == "__main__":
    engine.main("train", __doc__)
