"""The ready job files: fields that their systems know, and commands that this program knows."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

from vit_jax.__main__ import COMMANDS
from vit_jax.flags import make_parser
from vit_jax.training.config_file import load_config

FOLDER = ROOT / "experiments" / "launch"
SKYPILOT = sorted(path.name for path in FOLDER.glob("skypilot_*.yaml"))

# From the reference of SkyPilot's YAML: field -> kind, or the fields below it.
TASK = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "infra": r"(aws|azure|gcp|k8s|kubernetes)(/[\w-]+){0,2}",
        "accelerators": r"[A-Za-z0-9-]+(:\d+)?",
        "accelerator_args": {"runtime_version": str, "tpu_name": str, "tpu_vm": bool},
        "cpus": r"\d+\+?",
        "memory": r"\d+\+?",
        "instance_type": str,
        "use_spot": bool,
        "disk_size": int,
        "disk_tier": r"low|medium|high|ultra|best",
        "network_tier": r"standard|best",
        "image_id": str,
        "ports": int,
        "labels": dict,
        "autostop": int,
        "any_of": list,
        "ordered": list,
        "job_recovery": {
            "strategy": str,
            "max_restarts_on_errors": int,
            "recover_on_exit_codes": [int],
        },
    },
    "envs": dict,
    "secrets": dict,
    "volumes": dict,
    "file_mounts": dict,
    "setup": str,
    "run": str,
    "config": dict,
}
# From the API of JobSet v1alpha2, batch/v1 and core/v1, as far as they are used here.
POD = {
    "restartPolicy": r"Never|OnFailure",
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "tolerations": list,
    "hostNetwork": bool,
    "containers": [
        {
            "name": r"[a-z]([a-z0-9-]*[a-z0-9])?",
            "image": str,
            "workingDir": str,
            "command": [str],
            "env": list,
            "ports": list,
            "resources": {"limits": dict, "requests": dict},
        }
    ],
}
EXIT_CODES = {"containerName": str, "operator": r"In|NotIn", "values": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": r"FailJob|Ignore|Count|FailIndex", "onExitCodes": EXIT_CODES}]
    },
    "template": {"metadata": dict, "spec": POD},
}
JOBSET = {
    "apiVersion": r"jobset\.x-k8s\.io/v1alpha2",
    "kind": r"JobSet",
    "metadata": {"name": r"[a-z]([a-z0-9-]*[a-z0-9])?", "annotations": dict, "labels": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": str,
                    "action": r"FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": [r"PodFailurePolicy|BackoffLimitExceeded"],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
}


def wrong(value, expected, where=""):
    """What in a value is not as expected: kinds, texts that match, lists, fields."""
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for key, below in value.items():
            if key not in expected:
                yield f"{where}.{key} is no field"
            else:
                yield from wrong(below, expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        for each in value if isinstance(value, list) else [None]:
            yield from wrong(each, expected[0], f"{where}[]")
    elif isinstance(expected, str):
        if not re.fullmatch(expected, str(value)):
            yield f"{where} is {value!r}"
    elif type(value) is not expected:
        yield f"{where} is {value!r}"


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def commands(text):
    """Our commands with a config in a shell text, as words; what only the shell knows is 1."""
    text = re.sub(r"\$\([^)]*\)|\$\{\w+[^}]*\}|\$\w+", "1", text.replace("\\\n", " "))
    return [
        shlex.split(re.split(r" >>| [;&|]", found)[0])
        for found in re.findall(r"python -m vit_jax (.*--config=.+)", text)
    ]


def check(words):
    """Parses a command, reads its config and returns both."""
    args, rest = make_parser(COMMANDS).parse_known_args(words)
    assert all(flag.startswith("--config.") for flag in rest), rest
    config = load_config(f"{ROOT}/{args.config}", rest)
    config.check_trains()
    return args, config


@pytest.mark.parametrize("name", SKYPILOT)
def test_skypilot_tasks(name):
    task = read(name)
    assert list(wrong(task, TASK)) == []
    (words,) = commands(task["run"])
    args, config = check(words)
    assert '--workdir="$RUNS"/' in task["run"] and task["envs"]["RUNS"].startswith("gs://")
    assert "gcs" in re.search(r"'\.\[(.*)\]'", task["setup"])[1].split(",")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 143]
    assert config.checkpoint.every > 0 and task["resources"]["use_spot"]
    # A TPU slice is one node of several hosts, which find each other; GPU nodes are told.
    several = task.get("num_nodes", 1) > 1
    assert (args.coordinator is not None) == (args.processes is not None) == several


def test_the_jobset():
    jobset = read("gke_jobset.yaml")
    assert list(wrong(jobset, JOBSET)) == []
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
    assert container["command"][:3] == ["python", "-m", "vit_jax"]
    args, config = check(container["command"][3:])
    assert config.mesh.fsdp == int(rows) * int(columns)
    assert args.workdir.startswith("gs://")
    assert config.data.train.source.startswith("records:gs://")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize(
    "change, found",
    [
        ({"resource": {}}, [".resource is no field"]),
        ({"resources": {"use_spot": "yes"}}, [".resources.use_spot is 'yes'"]),
        ({"resources": {"infra": "gpc"}}, [".resources.infra is 'gpc'"]),
        (
            {"resources": {"job_recovery": {"recover_on_exit_codes": [143, "75"]}}},
            [".resources.job_recovery.recover_on_exit_codes[] is '75'"],
        ),
        ({"num_nodes": True}, [".num_nodes is True"]),
        ({"resources": "H100"}, [".resources is no mapping"]),
    ],
)
def test_mistakes_in_a_task_are_seen(change, found):
    assert list(wrong(change, TASK)) == found


@pytest.mark.parametrize("name", ["slurm.sh", "tpu_vm.sh"])
def test_shell_scripts(name):
    path = FOLDER / name
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
    text = re.sub(r"^ *#.*$", "", path.read_text(), flags=re.M)
    (words,) = commands(text)
    assert words[0] == "train"
    check(words)


def test_tpu_vm_without_an_argument_tells_how_it_is_used():
    done = subprocess.run([FOLDER / "tpu_vm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "create | setup | run" in done.stderr


def test_the_readme_names_every_file():
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.iterdir():
        assert path.name == "README.md" or f"| `{path.name}` |" in text, path
    for words in re.findall(r"`python -m vit_jax (.+?)`", text):
        make_parser(COMMANDS).parse_known_args(shlex.split(words))
