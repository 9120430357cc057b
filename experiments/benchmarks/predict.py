"""Images a second of `predict` from JPEG files to lines of JSON, beside its program alone.

    python experiments/benchmarks/predict.py [--variant=S/16] [--image-size=224] [--batches=8]

In turns, in one process: `forward`, the compiled program on a batch that stays on the device;
`reader`, decoding alone, one thread a core; `predict`, what the command does once the model is
loaded and compiled. Ratios are taken within a round; on a busy machine those of processor time are
steadier. Random weights; JPEGs of the model's size, noise with the spectrum of photographs, so that
decoding takes little.
"""

import argparse
import concurrent.futures
import datetime
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from input import cores, device, picture, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="S/16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--batches", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rounds = measure(args, folder)
    import jax

    kind = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    print(f"{datetime.date.today()}, {device()}, load average {load:.1f} at the start, {kind},")
    print(f"jax {jax.__version__}; {args.variant}, {args.image_size} pixels, {args.dtype},")
    print(f"{args.rounds} rounds of {args.batches} batches, median (lowest-highest)\n")
    print(f"| what | images/s | / forward | CPU ms an image | forward / this |\n{'|---' * 5}|")
    for name in rounds[0]:
        row = [name]
        for i, form in enumerate((".4g", ".1f")):
            both = [(each[name][i], each["forward"][i]) for each in rounds]
            ratios = [(a / b, b / a)[i] for a, b in both]
            row += [spread([a for a, _ in both], form), spread(ratios, ".3f")]
        print(f"| {' | '.join(row)} |")


def measure(args: argparse.Namespace, folder: str) -> list[dict[str, tuple[float, float]]]:
    """Images/s and CPU ms an image by turn and round, without the first, which compiles."""
    import jax
    import numpy as np

    import vit_jax
    from vit_jax.data.inputs import find_images
    from vit_jax.training.evaluation.predict import Predictor
    from vit_jax.training.evaluation.predict_output import predict_to
    from vit_jax.training.sharding import to_devices

    made = os.path.join(folder, "model.safetensors")
    vit_jax.save(
        vit_jax.create(args.variant, image_size=args.image_size, num_classes=1000),
        made,
        format="vit_jax",
    )
    loaded = vit_jax.load(made, dtype=args.dtype)
    predictor = Predictor(loaded, batch_size=args.batch_size)
    size, how = predictor.batch_size, predictor.preprocess
    files = write(os.path.join(folder, "images"), args.image_size, size * args.batches)
    images = find_images(files)
    pixels = [how.pixels(how.read(images[i])) for i in range(size)]
    batch = to_devices({"image": np.stack(pixels)}, size, predictor.mesh)

    def forward():
        jax.block_until_ready([predictor.forward(batch) for _ in range(args.batches)])

    def reader():
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            list(pool.map(lambda i: how.pixels(how.read(images[i])) is None, range(len(images))))

    def predict():
        predict_to(f"{folder}/out.jsonl", images, lambda: loaded, batch_size=args.batch_size)

    turns: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "reader": reader,
        "predict": predict,
    }
    rounds = []
    for number in range(args.rounds + 1):
        order = list(turns)[:: -1 if number % 2 else 1]
        found = {}
        for name in order:
            start = time.perf_counter(), time.process_time()
            turns[name]()
            seconds, busy = time.perf_counter() - start[0], time.process_time() - start[1]
            found[name] = len(images) / seconds, busy / len(images) * 1e3
        rounds.append({name: found[name] for name in turns})
    return rounds[1:]


def write(folder: str, size: int, count: int) -> str:
    """Writes JPEGs of size x size pixels, of 64 different pictures; returns where."""
    import cv2
    import simplejpeg

    os.makedirs(folder)
    data = [
        simplejpeg.encode_jpeg(cv2.resize(picture(number), (size, size)), 90)
        for number in range(min(count, 64))
    ]
    for number in range(count):
        with open(os.path.join(folder, f"{number:06}.jpg"), "wb") as file:
            file.write(data[number % len(data)])
    return folder


if __name__ == "__main__":
    main()
