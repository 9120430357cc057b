"""What the rows of one_gpu.py come to: tables, and a picture."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import budget
import engine
import tables

from vit_jax.errors import UserError

Row = dict[str, Any]
PARITY = "variant | image | dtype | attention | largest difference | spread | difference / spread"
MEMORY = "variant | image | batch | attention | first step s | loss | GiB by XLA | GiB at most"
ROOFLINE = "variant | image | batch | launches | predicted ms | measured ms | predicted / measured"
PARTS = "part | launches | predicted ms | measured ms | predicted / measured"
KERNELS = "kernels | arrays | launches | predicted us | measured us | predicted / measured"
GRADIENTS = "variant | image | tokens | largest difference / spread | of | all finite"
TESTS = "passed | failed | errors | skipped | exit code"


def read(folder: Path) -> list[Row]:
    """The rows of a day.

    Raises:
      UserError: there are none.
    """
    try:
        rows = budget.read(folder / "rows.jsonl")
        record(rows, "train")
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"--read={folder}: no rows of a day are in it; name a folder that --out wrote to"
        ) from None
    return rows


def record(rows: list[Row], task: str) -> Row:
    """A task's rows as a record of the other benchmarks, with one case for a model and a batch."""
    (first, *_) = [row["record"] for row in rows if "record" in row]
    cases: dict[tuple, Row] = {}
    for case in [row["case"] for row in rows if row.get("table") == task]:
        key = (case["variant"], *case["image"], case["batch_size"])
        one = cases.setdefault(key, case | {"results": {}, "ceiling_flops": []})
        # Who was measured twice, ours, counts as at first.
        one["results"] = {**one["results"], **case["results"], **one["results"]}
        one["ceiling_flops"] = one["ceiling_flops"] + case["ceiling_flops"]
    passes = {"task": task, "passes": engine.PASSES[task]}
    return first | passes | {"cases": list(cases.values()), "largest": []}


def draw(rows: list[Row], path: Path) -> None:
    """Draws training at the first image size: several would be drawn as lines over sizes."""
    training = record(rows, "train")
    cases = training["cases"]
    same = [case for case in cases if case["image"] == cases[0]["image"]]
    tables.draw(training | {"cases": same}, path)


def lines(rows: list[Row]) -> Iterator[str]:
    """All that a day found out, as Markdown, and what it did not."""
    yield record(rows, "train")["header"]
    for task, title in (("train", "Training"), ("infer", "Inference")):
        found = record(rows, task)
        if found["cases"]:
            yield f"\n## {title}\n\n{tables.header(tables.COLUMNS)}"
            for row in rows:  # ratios are of rounds, so of those that took turns
                yield from tables.rows(found, row["case"]) if row.get("table") == task else ()
            yield "\n" + "\n".join(tables.sentences(found))
    for kind, title, columns, cells in (
        ("roofline", "The roofline beside the clock", ROOFLINE, _roofline),
        ("memory", "Memory", MEMORY, _memory),
        ("parity", "Parity with float64", PARITY, _parity),
        ("gradients", "Gradients: cuDNN's attention beside XLA's", GRADIENTS, _gradients),
        ("tests", "Tests", TESTS, _tests),
    ):
        yield from _table(title, columns, cells, [row for row in rows if row.get("table") == kind])
    for row in [row for row in rows if row.get("table") == "kernels"]:
        title = f"Kernels of {row['variant']} at {tables.size_name(row)}"
        yield from _table(title, PARTS, _part, row["parts"])
        yield from _table(f"{title}, the dearest", KERNELS, _kernel, row["dearest"])
        yield from [f"\n{row['note']}."] if row["note"] else []
    missed = [row for row in rows if "table" not in row]
    for name, why in rows[0].get("left_out", {}).items():
        missed += [{"job": name, "skipped": why}] if why else []
    if missed:
        yield "\n## Not measured\n"
    for row in missed:
        yield f"- {row['job']}: {row.get('error') or row['skipped']}"


def _table(
    title: str, columns: str, cells: Callable[[Row], list[str]], rows: list[Row]
) -> Iterator[str]:
    if rows:
        yield f"\n## {title}\n\n{tables.header(columns)}"
    for row in rows:
        yield f"| {' | '.join(cells(row))} |"


def _model(row: Row) -> list[str]:
    return [row["variant"], tables.size_name(row), str(row["batch_size"])]


def _number(value: float | None, unit: float, show: str) -> str:
    return "" if value is None else format(value / unit, show)


def _both(row: Row, unit: float, show: str) -> list[str]:
    """Launches, what was predicted, what was measured, and one by the other."""
    predicted, measured = row.get("predicted"), row.get("measured")
    ratio = predicted / measured if predicted is not None and measured else None
    seconds = [_number(predicted, unit, show), _number(measured, unit, show)]
    return [str(row.get("launches", "")), *seconds, _number(ratio, 1, ".0%")]


def _roofline(row: Row) -> list[str]:
    return [*_model(row), *_both(row, 1e-3, ".2f")]


def _part(row: Row) -> list[str]:
    return [row["part"], *_both(row, 1e-3, ".2f")]


def _kernel(row: Row) -> list[str]:
    return [f"{row['part']}, {row['direction']}", row["arrays"], *_both(row, 1e-6, ".0f")]


def _memory(row: Row) -> list[str]:
    sizes = [_number(row[key], 2**30, ".2f") for key in ("peak_bytes", "process_peak_bytes")]
    seconds = [f"{row['first_step_seconds']:.1f}", f"{row['loss']:.3f}"]
    return [*_model(row), row["attention"], *seconds, *sizes]


def _parity(row: Row) -> list[str]:
    named = [row["variant"], tables.size_name(row), row["dtype"], row["attention"]]
    by = row["difference"] / row["spread"]
    return [*named, *(f"{value:.2g}" for value in (row["difference"], row["spread"], by))]


def _gradients(row: Row) -> list[str]:
    found = [str(row["tokens"]), f"{row['worst']:.2g}", row["where"], str(row["finite"])]
    return [row["variant"], tables.size_name(row), *found]


def _tests(row: Row) -> list[str]:
    code = row["exit_code"]
    return [*map(str, row["ends"].values()), "the time was over" if code is None else str(code)]
