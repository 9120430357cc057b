"""Measures our forward pass in evaluation beside timm's on random data, on one device.

    python experiments/benchmarks/infer.py --variants=B/16,L/16 --batch-sizes=128,256 --json=i.json
    python experiments/benchmarks/infer.py --resolutions=64,128,224,320,384,448,512 \
        --variants=S/16,B/16,L/16,R50x1 --contestants=ours --picture=resolutions.png

From uint8 images that are on the device already to logits in float32; the rest is as in train.py.
With --resolutions, how speed and the largest batch depend on the image (the paper's appendix D.5).
"""

import engine

if __name__ == "__main__":
    engine.main("infer", __doc__)
