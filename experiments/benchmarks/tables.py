"""What the records of a run come to: rows, sentences and a picture."""

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vit_jax.analysis.chips import CHIPS

# By `device_kind`, dense bfloat16 products in FLOP/s, accumulated in float32: those of `CHIPS`, and
# of others by NVIDIA's data sheets (where these tell numbers with sparsity, halved).
PEAKS = {kind: chip.peak for kind, chip in CHIPS.items()} | {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
COLUMNS = (
    "variant | image | batch | contestant | images/s | ours / this | TFLOP/s | of ceiling | "
    "of peak | peak GiB | cold s | warm s"
)
LARGEST_COLUMNS = "variant | image | contestant | largest batch | GiB | of GiB | run"


def peak_flops(record: dict[str, Any]) -> float | None:
    """FLOP/s by the data sheet; None for other devices, and for other dtypes than bfloat16."""
    return PEAKS.get(record["device_kind"]) if record["dtype"] == "bfloat16" else None


def spread(values: list[float], show: Callable[[float], str]) -> str:
    """The median, with the lowest and the highest."""
    low, high = show(min(values)), show(max(values))
    return f"{show(statistics.median(values))} ({low}-{high})"


def rate(value: float) -> str:
    """Four digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def header(columns: str) -> str:
    return f"| {columns} |\n{'|---' * len(columns.split('|'))}|"


def images_per_second(case: dict[str, Any], name: str) -> float | None:
    """The median of a contestant's rounds; None where there are none."""
    result = case["results"].get(name, {"error": "not asked for"})
    if "error" in result or not result["seconds_per_step"]:
        return None
    return statistics.median(case["batch_size"] / s for s in result["seconds_per_step"])


def shares(record: dict[str, Any], case: dict[str, Any], name: str) -> dict[str, float]:
    """FLOP/s of the model's own products, and their share of the ceiling and of the data sheet."""
    flops = images_per_second(case, name) * record["passes"] * case["flops_per_image"]
    told = {"flops": flops}
    if case["ceiling_flops"]:
        told["ceiling"] = flops / statistics.median(case["ceiling_flops"])
    if peak := peak_flops(record):
        told["peak"] = flops / peak
    return told


def rows(record: dict[str, Any], case: dict[str, Any]) -> list[str]:
    """The table's rows of one model at one batch size."""
    lines = []
    ours = case["results"].get("ours", {}).get("seconds_per_step", [])
    for name, result in case["results"].items():
        shown = f"{name} (alone)" if result.get("alone") else name
        cells = [case["variant"], size_name(case), str(case["batch_size"]), shown]
        if images_per_second(case, name) is None:
            cells += [result.get("error", "not run").replace("|", "/"), *[""] * 7]
        else:
            seconds, told = result["seconds_per_step"], shares(record, case, name)
            ratios = [theirs / us for us, theirs in zip(ours, seconds, strict=False)]
            peak = result.get("peak_bytes")
            cells += [
                spread([case["batch_size"] / s for s in seconds], rate),
                spread(ratios, "{:.2f}".format) if ratios and name != "ours" else "",
                f"{told['flops'] / 1e12:.3g}",
                f"{told['ceiling']:.0%}" if "ceiling" in told else "",
                f"{told['peak']:.0%}" if "peak" in told else "",
                f"{peak / 2**30:.2f}" if peak else "",
                *(
                    f"{result[f'{kind}_seconds']:.1f}" if f"{kind}_seconds" in result else ""
                    for kind in ("cold", "warm")
                ),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def largest_row(found: dict[str, Any]) -> str:
    """The table's row of one search for the largest batch."""
    cells = [found["variant"], size_name(found), found["contestant"]]
    if "error" in found:
        cells += [found["error"].replace("|", "/"), "", "", ""]
    else:
        ran = {True: "yes", False: "out of memory", None: ""}[found.get("ran")]
        cells += [str(found["batch_size"])]
        sizes = [found["bytes"], found["limit_bytes"]]
        cells += [f"{size / 2**30:.2f}" if size else "" for size in sizes] + [ran]
    return f"| {' | '.join(cells)} |"


def size_name(case: dict[str, Any]) -> str:
    return "x".join(str(side) for side in case["image"])


def models(cases: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cases of each model and image size, whatever their batch sizes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        found.setdefault(f"{case['variant']} at {size_name(case)}", []).append(case)
    return found


def best(cases: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Each contestant's images a second at its own fastest batch size, and that size."""
    tops: dict[str, tuple[float, int]] = {}
    for case in cases:
        for name in case["results"]:
            if speed := images_per_second(case, name):
                tops[name] = max(tops.get(name, (0.0, 0)), (speed, case["batch_size"]))
    return tops


def best_timm(tops: dict[str, tuple[float, int]]) -> str | None:
    """The fastest of all that is timm's, in whatever mode."""
    theirs = [name for name in tops if name.startswith("timm")]
    return max(theirs, key=lambda name: tops[name][0], default=None)


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Who is how fast at best, ours by the best of timm's, and the geometric mean of that."""
    told: dict[str, Any] = {"models": {}, "geometric_mean": None}
    ratios = []
    for model, cases in models(record["cases"]).items():
        tops = best(cases)
        theirs, ratio = best_timm(tops), None
        if theirs and "ours" in tops:
            ratio = tops["ours"][0] / tops[theirs][0]
            ratios.append(ratio)
        told["models"][model] = {
            "best": {
                name: {"images_per_second": speed, "batch_size": size}
                for name, (speed, size) in tops.items()
            },
            "best_timm": theirs,
            "ours_by_best_timm": ratio,
        }
    if ratios:
        told["geometric_mean"] = math.exp(statistics.fmean(map(math.log, ratios)))
    return told


def sentences(record: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    lines, told = [], summary(record)
    measured = [case for case in record["cases"] if case["ceiling_flops"]]
    if measured:
        flops = [value / 1e12 for case in measured for value in case["ceiling_flops"]]
        size, peak = measured[0]["ceiling_size"], peak_flops(record)
        of = f", {statistics.median(flops) * 1e12 / peak:.0%} of the data sheet's" if peak else ""
        told_flops = spread(flops, "{:.3g}".format)
        lines += [f"Ceiling: {told_flops} TFLOP/s{of}, {size}^3 product in {record['dtype']}."]
    for case in record["cases"] if record.get("backend") == "cpu" else ():
        ours = case["results"].get("ours", {}).get("cpu_seconds_per_step", [])
        for name, result in case["results"].items():
            theirs = result.get("cpu_seconds_per_step", []) if name != "ours" else []
            ratios = [them / us for us, them in zip(ours, theirs, strict=False)]
            if ratios:
                what = f"{case['variant']} at {size_name(case)}, batch {case['batch_size']}"
                told_ratios = spread(ratios, "{:.2f}".format)
                lines += [f"{what}: ours / {name} by processor time {told_ratios}."]
    for model, each in told["models"].items():
        parts = [
            f"{name} {rate(top['images_per_second'])} images/s at batch {top['batch_size']}"
            for name, top in each["best"].items()
        ]
        lines += [f"{model}, each at its best batch size: {', '.join(parts) or 'nothing ran'}."]
        if each["ours_by_best_timm"]:
            ratio, theirs = each["ours_by_best_timm"], each["best_timm"]
            lines += [f"{model}: ours / best timm ({theirs}) {ratio:.2f}."]
    if mean := told["geometric_mean"]:
        of = len([1 for each in told["models"].values() if each["ours_by_best_timm"]])
        lines += [f"ours / best timm, geometric mean over {of}: {mean:.2f}."]
    return lines


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws bars of each model's contestants, or with several image sizes, lines over these."""
    from matplotlib.figure import Figure

    sizes = {tuple(case["image"]) for case in record["cases"]}
    if len(sizes) > 1 or record["largest"]:
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        _lines(figure.subplots(1, 2), record)
    else:
        groups = models(record["cases"])
        bars = sum(len(best(cases)) for cases in groups.values())
        figure = Figure(figsize=(7.5, 1.6 + 0.36 * bars + 0.3 * len(groups)), layout="constrained")
        _bars(figure.subplots(), record, groups)
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
    figure.suptitle(
        f"{record['task']}, {record['device']}, {record['dtype']}, {record['date']}\n{versions}",
        fontsize=8,
    )
    figure.savefig(path, dpi=120)


def _bars(axes: Any, record: dict[str, Any], groups: dict[str, list[dict[str, Any]]]) -> None:
    """Images a second by those of the best of timm's (of ours, where timm's did not run)."""
    place, ticks, furthest, by = 0.0, [], 1.0, "ours"
    for model, cases in groups.items():
        tops = best(cases)
        theirs = best_timm(tops)
        unit = theirs or ("ours" if "ours" in tops else next(iter(tops), None))
        by = "the best timm" if theirs else by
        axes.text(0.01, place, model, va="center", fontsize=9, weight="bold")
        place += 0.8
        for name, (speed, size) in tops.items():
            share = speed / tops[unit][0]
            case = next(case for case in cases if case["batch_size"] == size)
            told = shares(record, case, name)
            text = f"{rate(speed)}/s, batch {size}"
            text += f", {told['ceiling']:.0%} of ceiling" if "ceiling" in told else ""
            colour = "tab:blue" if name.startswith("ours") else "tab:orange"
            faded = 1.0 if name in ("ours", theirs) else 0.55
            axes.barh(place, share, height=0.8, color=colour, alpha=faded)
            box = dict(facecolor="white", edgecolor="none", pad=0)  # or the line runs through it
            beside = dict(xytext=(3, 0), textcoords="offset points", va="center")
            axes.annotate(text, (share, place), **beside, fontsize=8, bbox=box)
            ticks.append((place, name))
            furthest = max(furthest, share)
            place += 1
        place += 0.5
    axes.axvline(1, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set(xlim=(0, 1.6 * furthest), xlabel=f"images/s, those of {by} = 1")
    axes.set_ylim(max(place, 1) - 0.5, -0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(both: Any, record: dict[str, Any]) -> None:
    """Speed and the largest batch over the side of the image, as in the paper's Figure 12."""
    speeds: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for cases in models(record["cases"]).values():
        for name, (speed, _) in best(cases).items():
            speeds.setdefault((cases[0]["variant"], name), []).append((cases[0]["image"][0], speed))
    batches: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for found in record["largest"]:
        if found.get("batch_size"):
            point = (found["image"][0], found["batch_size"])
            batches.setdefault((found["variant"], found["contestant"]), []).append(point)
    variants = list(dict.fromkeys(variant for variant, _ in [*speeds, *batches]))
    names = list(dict.fromkeys(name for _, name in [*speeds, *batches]))
    marks, dashes = "osD^vP*X", ("-", "--", ":", "-.")
    sides = sorted({x for points in [*speeds.values(), *batches.values()] for x, _ in points})
    for axes, series, title in zip(
        both,
        (speeds, batches),
        (f"{record['task']}: images/s, at the best batch", "largest batch that fits"),
        strict=True,
    ):
        for (variant, name), points in series.items():
            axes.plot(
                *zip(*sorted(points), strict=True),
                color=f"C{variants.index(variant)}",
                linestyle=dashes[names.index(name) % len(dashes)],
                marker=marks[variants.index(variant) % len(marks)],
                markersize=4,
                label=f"{variant} {name}" if len(names) > 1 else variant,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10 if series is speeds else 2)
        axes.set_xticks(sides, [str(side) for side in sides], fontsize=8)
        axes.minorticks_off()
        axes.set(xlabel="image side, pixels", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
