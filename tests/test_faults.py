"""The list of faults.toml: each is in one place, and its tests are there (`make test-faults`)."""

import collections
import re

from conftest import ROOT
from faults import FAULTS, SOURCES, place, room

LEAST = {
    **{"models": 10, "data": 10, "data/forms": 10, "checkpoints": 12, "training": 14},
    **{"analysis": 4, "launch": 4, "": 2},
}


def test_every_fault_is_made_in_one_place():
    for fault in FAULTS:
        assert sum(text.count(fault["before"]) for text in SOURCES.values()) == 1, fault["name"]
        assert fault["before"] != fault["after"], fault["name"]


def test_every_fault_has_its_tests():
    for fault in FAULTS:
        files = [word.split("::") for word in fault["tests"] if word.startswith("tests/")]
        assert files, fault["name"]
        for file, *names in files:
            text = (ROOT / file).read_text()
            assert all(f"def {name.partition('[')[0]}(" in text for name in names), fault["name"]
        if "-k" in fault["tests"]:
            words = re.findall(r"\w+", fault["tests"][fault["tests"].index("-k") + 1])
            texts = " ".join([file, *((ROOT / file).read_text() for file, *_ in files)]).lower()
            missing = [w for w in words if w not in ("and", "or", "not") and w.lower() not in texts]
            assert not missing, (fault["name"], missing)


def test_every_room_has_its_faults():
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS) >= 66
    counts = collections.Counter(room(place(fault)) for fault in FAULTS)
    assert all(counts[name] >= least for name, least in LEAST.items()), counts
