"""Fine-tunes a model on VTAB-1k's 19 tasks; then prints their accuracies and means.

    vit-jax sweep experiments/recipes/vtab_sweep.py:B/16,B_16.npz --workdir=runs/vtab
    python experiments/recipes/vtab_sweep.py runs/vtab

What follows the colon is VARIANT,WEIGHTS, the latter whatever `vit_jax.load` reads.
"""

import statistics
import sys

from vit_jax.data.forms.vtab import TASKS


def sweep(arg="B/16,B_16.npz"):
    """Yields a run of configs/vtab.py for each task."""
    variant, _, weights = arg.partition(",")
    if not weights:
        raise ValueError(f"{arg!r}: expected VARIANT,WEIGHTS, such as B/16,B_16.npz")
    for task in TASKS:
        yield {"name": task, "config": f"configs/vtab.py:{variant},{task}", "init_from": weights}


def table(scores: dict[str, float]) -> str:
    """A line a task, then the means of the groups and of all that were run."""
    lines = [f"{TASKS[task].group:12}  {task:22} {score:7.2%}" for task, score in scores.items()]
    groups = list(dict.fromkeys(TASKS[task].group for task in scores))
    for group in groups:
        mean = statistics.mean(scores[task] for task in scores if TASKS[task].group == group)
        lines.append(f"{group:12}  {'mean':22} {mean:7.2%}")
    return "\n".join([*lines, f"{'all':12}  {'mean':22} {statistics.mean(scores.values()):7.2%}"])


def main(workdir: str) -> str:
    """The table of a sweep's folder; tasks that are not finished are named, and left out."""
    from vit_jax.launch.run import read_results

    results = read_results(workdir)
    done = [each for each in results if each.state == "finished"]
    missing = [each.name for each in results if each.state != "finished"]
    lines = [f"not finished: {', '.join(missing)}"] if missing else []
    scores = {each.name: each.metrics["test/accuracy"] for each in done}
    return "\n".join([*lines, *([table(scores)] if scores else [])])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(sys.argv[1]))
