"""The source python:experiments/your_data/emoji.py:emoji: npm's emoji-datasource-google.

Unpacked (`npm pack emoji-datasource-google@16.0.0`), it is emoji.json, a list of objects, and PNG
files of 64 x 64 pixels in img/google/64. EMOJI says where; by the files' names a tenth is held out.
"""

import json
import os
import pathlib

from vit_jax.data.forms.files import percentile

ROOT = pathlib.Path(os.environ.get("EMOJI", "package"))


def emoji(split):
    """Pictures and their categories: "Animals & Nature", "Flags", ..."""
    examples = []
    for each in json.loads((ROOT / "emoji.json").read_text()):
        file = ROOT / "img/google/64" / each["image"]
        part = "train" if percentile(each["image"]) < 90 else "val"
        if part == split and file.exists():
            image, label = file.read_bytes(), each["category"]
            examples.append({"image": image, "label": label, "name": file.name})
    return examples


emoji.splits = ("train", "val")
