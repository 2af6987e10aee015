"""The comparison's report: the paper's columns for our runs, errors by cause, and what none of it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis.markdown import counted, fixed, table

#: TFLOP/s assumed for the prediction, at D = 128 on an H200: BF16 measured by others (cuDNN 9.19, published by NVIDIA), FP8 from this project's static
#: model of its own kernel. Nothing here was timed, and INT8 QK with FP8 PV is given the FP8 rate: the tensor cores' peaks are equal.
RATES = {"bf16": 702.0, "fp8": 1366.0, "int8+fp8": 1366.0}

#: Table 2 of FPSAttention (arXiv 2506.04648) for Wan2.1-1.3B: PSNR, SSIM, LPIPS, PFLOP, seconds, speed-up. Another model, another GPU.
PAPER_TABLE_2 = (
    ("dense", None, None, None, 77.52, 271, 1.00),
    ("SageAttention", 20.19, 0.782, 0.188, 37.61, 141, 1.91),
    ("SpargeAttn", 17.73, 0.726, 0.262, 43.15, 205, 1.32),
    ("SparseVideoGen", 19.51, 0.789, 0.205, 30.67, 152, 1.78),
    ("STA", 18.79, 0.763, 0.232, 31.78, 143, 1.89),
    ("FPSAttention, quantization only", 21.00, 0.798, 0.151, 32.01, 144, 1.88),
    ("FPSAttention", 21.35, 0.808, 0.154, 32.01, 110, 2.45),
)


def predicted_ms(bits: str, tflop: float) -> float:
    """Of the attention of a run: ``tflop / RATES[bits]``. Computed, likewise."""
    return 1e3 * tflop / RATES[bits]


def predicted_speedup(bits: str, density: float) -> float:
    """Of attention alone over dense BF16: ``RATES[bits] / (RATES["bf16"] density)``. Computed; selection and quantization are not in it."""
    return RATES[bits] / RATES["bf16"] / density


def write_report(out: Path, report: dict[str, Any]) -> None:
    """report.json, report.md and the pictures."""
    from ..analysis.captures import save_json

    report["table"] = summary(report)
    save_json(out / "report.json", report)
    pictures = _draw(out, report)
    (out / "report.md").write_text("\n".join(_lines(report, pictures)) + "\n", encoding="utf-8")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method: means over prompts and seeds. PSNR of identical videos is infinite."""
    rows = []
    for name, runs in report["runs"].items():
        method = report["methods"][name]

        def mean(*path: str, runs: list[dict[str, Any]] = runs) -> float | None:
            values = []
            for run in runs:
                value: Any = run
                for part in path:
                    value = value.get(part) if isinstance(value, dict) else None
                values.append(value)
            return _mean(values)

        identical = all(run.get("video", {}).get("identical") for run in runs) and name != "dense"
        density = mean("density") or float("nan")
        flops = mean("attention_flops")
        rows.append(
            {
                "method": name,
                "label": method["label"],
                "psnr_db": float("inf") if identical else mean("video", "psnr_db"),
                "ssim": mean("video", "ssim"),
                "lpips": mean("lpips"),
                "latent_rel_l1": mean("latents", "rel_l1"),
                "flicker": mean("temporal", "flicker"),
                "smoothness": mean("temporal", "smoothness"),
                "subject": mean("temporal", "subject"),
                "density": density,
                "attention_tflop": None if flops is None else flops / 1e12,
                "seconds": mean("seconds"),
                "predicted_attention_speedup": predicted_speedup(method["bits"], density),
                "predicted_attention_ms": None if flops is None else predicted_ms(method["bits"], flops / 1e12),
            }
        )
    return rows


def _lines(report: dict[str, Any], pictures: Sequence[str]) -> list[str]:
    settings, env = report["settings"], report["environment"]
    items = len(settings["prompts"]) * len(settings["seeds"])
    head = [
        "method",
        "PSNR (dB)",
        "SSIM",
        "LPIPS",
        "latents: relative L1",
        "attention TFLOP",
        "density",
        "predicted attention (ms)",
        "x",
    ]
    quality = [
        [
            row["label"], "" if row["method"] == "dense" else fixed(row["psnr_db"], 2),
            *("" if row["method"] == "dense" else fixed(row[key], 4) for key in ("ssim", "lpips", "latent_rel_l1")),
            fixed(row["attention_tflop"], 4), fixed(row["density"], 3),
            fixed(row["predicted_attention_ms"], 3), fixed(row["predicted_attention_speedup"], 2),
        ]
        for row in report["table"]
    ]  # fmt: skip
    temporal = [
        [row["label"], *(fixed(row[key], 4) for key in ("flicker", "smoothness", "subject")), fixed(row["seconds"], 1)]
        for row in report["table"]
    ]
    reasons = {run.get("lpips_by") for runs in report["runs"].values() for run in runs} - {None}
    lines = [
        "# fpsattn compare",
        "",
        f"Model: {report['model']}. {settings['height']}x{settings['width']}, {counted(settings['num_frames'], 'frame')}, "
        f"{counted(settings['num_inference_steps'], 'step')}, guidance {settings['guidance_scale']}, {counted(len(settings['prompts']), 'prompt')} x "
        f"{counted(len(settings['seeds']), 'seed')} = {counted(items, 'video')} per method, on {env['device']}. No method keeps steps or layers dense, but by its schedule.",
        "",
        "## Against the dense run of the same prompt and seed",
        "",
        table(head, quality),
        "",
        f"LPIPS: {', '.join(sorted(reasons)) or 'not run'}. Imaging quality and subject consistency are VBench's: run it on `vbench/<method>`, which has its layout.",
        "",
        "The last two columns are **computed, not measured**: the attention of a whole run, and its speed-up over dense BF16, from what ran and assumed rates (TFLOP/s at D = 128, H200: "
        + ", ".join(f"{bits} {rate:.0f}" for bits, rate in RATES.items())
        + "); selecting blocks and quantizing are not in it.",
        "",
        "## Over time, without a network",
        "",
        table(["method", "flicker", "motion smoothness", "subject consistency", "seconds here"], temporal),
        "",
        "1 is steadiest; compare with the dense row. These are pixel and gradient statistics, not VBench's networks. Seconds are of this machine; the baselines are "
        "models of accuracy in plain torch, so their seconds say nothing about their kernels.",
        "",
    ]
    if report["errors"]:
        lines += _error_lines(report)
    lines += [f"![{name}]({name})\n" for name in pictures]
    lines += [
        "## Methods",
        "",
        table(
            ["method", "what runs", "by"],
            [[m["label"], m["source"], _ran(report, name)] for name, m in report["methods"].items()],
        ),
        "",
    ]
    lines += _paper_lines()
    lines += ["## What this does not say", ""]
    if settings["model"] is None:
        lines += ["* anything about a trained model: these weights are set by hand and by seed"]
    lines += [
        "* quality as people see it: distance from a dense run of the same seed is not quality",
        "* speed of any kernel: nothing was timed on a GPU"
        if env["gpu"] is None
        else "* speed of the baselines' kernels: most are emulated, and a package's seconds hold this harness's own",
        "* what FPSAttention or VSA are after training: weights here are stock",
        "",
        f"Python {env['python']}, torch {env['versions'].get('torch')}, {env['processor']}, {env['cores']} cores; {report['seconds']:.0f} s for what had to be run.",
    ]
    return lines


def _ran(report: dict[str, Any], name: str) -> str:
    found = {what for run in report["runs"][name] for what in run.get("ran", ())}
    return "; ".join(sorted(found)) or "the model"


def _error_lines(report: dict[str, Any]) -> list[str]:
    rows = []
    for name, entries in report["errors"].items():
        means = [_mean([entry[part] for entry in entries]) for part in ("quantization", "sparsity", "total")]
        densities = [_mean([entry[key] for entry in entries]) for key in ("density", "selected_density")]
        ratio = densities[0] / densities[1] if densities[0] is not None and densities[1] else None
        rows.append(
            [
                report["methods"][name]["label"],
                fixed(densities[0], 3),
                fixed(ratio, 3),
                *(fixed(value, 4) for value in means),
            ]
        )
    return [
        "## Error of one attention call, by cause",
        "",
        "Relative L1 against dense FP32 attention of the q, k, v of the dense run; mean over the first and last layer and all sigmas. *Quantization*: rounded, "
        "every block attended. *Sparsity*: blocks skipped, nothing rounded. *Kernel / selected*: density of the lists over that of what the rule selects; above 1 where a rule leaves out a tile's own blocks, which are visited always.",
        "",
        table(["method", "density", "kernel / selected", "quantization", "sparsity", "total"], rows),
        "",
    ]


def _paper_lines() -> list[str]:
    digits = (2, 3, 3, 2, 0, 2)
    rows = [
        [name, *("" if value is None else fixed(value, n) for value, n in zip(values, digits, strict=True))]
        for name, *values in PAPER_TABLE_2
    ]
    return [
        "## The paper's own figures",
        "",
        "arXiv 2506.04648, Table 2, Wan2.1-1.3B on an H20, its implementation and its videos. Not comparable with the tables above.",
        "",
        table(["method", "PSNR", "SSIM", "LPIPS", "PFLOP", "s", "speed-up"], rows),
        "",
    ]


def _draw(out: Path, report: dict[str, Any]) -> list[str]:
    from ..analysis import plots

    pictures = []
    if report["errors"]:
        figure = plots.new_figure(11.0, 3.8)
        for i, part in enumerate(("quantization", "sparsity", "total")):
            axis = figure.add_subplot(1, 3, i + 1)
            for over, (name, entries) in enumerate(
                reversed(report["errors"].items())
            ):  # wide below narrow: none hides another
                sigmas = sorted({entry["sigma"] for entry in entries}, reverse=True)
                means = [_mean([e[part] for e in entries if e["sigma"] == sigma]) for sigma in sigmas]
                if all(value is not None for value in means):
                    width, color = 1.2 + 1.6 * over, f"C{len(report['errors']) - 1 - over}"
                    axis.plot(
                        sigmas, means, marker="o", markersize=max(width, 3), linewidth=width, color=color, zorder=2 - 0.01 * over,
                        label=report["methods"][name]["label"],
                    )  # fmt: skip
            axis.set_title(part)
            axis.set_xlabel("sigma (noise to the left)")
            axis.invert_xaxis()
            axis.grid(alpha=0.3)
        figure.axes[0].set_ylabel("relative L1 of one attention call")
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, fontsize=7)
        plots.save_figure(figure, out / "error_by_sigma.png")
        pictures.append("error_by_sigma.png")
    return pictures
