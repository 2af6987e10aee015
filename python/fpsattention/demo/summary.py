"""The demo's `report.md`: what was run, on what, what came out, and what it does not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..analysis.markdown import fixed, table


def write_report(path: str | Path, report: dict[str, Any]) -> Path:
    """`report.md`, from what `run_demo` returns."""
    path = Path(path)
    path.write_text("\n".join(_lines(report)) + "\n", encoding="utf-8")
    return path


def _lines(report: dict[str, Any]) -> list[str]:
    settings, env = report["settings"], report["environment"]
    video, latents = report["quality"]["video"], report["quality"]["latents"]
    tiny = settings["model"] is None
    lines = [
        "# fpsattn demo: dense against FPSAttention",
        "",
        f"Model: {report['model']}. {settings['height']}x{settings['width']}, {settings['num_frames']} frames, "
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']}, seed {settings['seed']}, "
        f"schedule `{settings['preset']}`, on {env['device']}.",
        "",
        "![frames](side_by_side.png)",
        "",
        "Videos: [dense.mp4](dense.mp4), [fps.mp4](fps.mp4).",
        "",
        "## Distance between the two videos",
        "",
        table(
            ["compared with the dense run", "PSNR (dB)", "SSIM", "latents: relative L1", "latents: cosine"],
            [_quality_row("FPSAttention", video, latents), *_control_rows(report["control"])],
        ),
        "",
        *_control_text(report["control"]),
        "",
        "## Error of one attention call, by cause",
        "",
        "Against dense full-precision attention of the same recorded q, k, v; mean over recorded layers and sigmas. "
        "*Quantization*: FP8, every block attended. *Sparsity*: full precision, blocks skipped. *Total*: both, what ran.",
        "",
        table(
            ["level", "scales", "density", "quantization L1", "sparsity L1", "total L1", "total cosine", "sigmas"],
            [_level_row(level) for level in report["levels"]],
        ),
        "",
        "![error](error_vs_sigma.png)",
        "",
    ]
    if report["masks_drawn"]:
        lines += ["![block masks](block_mask.png)", ""]
    lines += ["## What ran", "", *(f"* {note}" for note in report["ran"]["notes"]), ""]
    return lines + _time_lines(report) + _honest_lines(report, tiny) + _version_lines(env)


def _quality_row(name: str, video: dict[str, Any], latents: dict[str, Any]) -> list[str]:
    psnr = "identical" if video["identical"] else fixed(video["psnr_db"], 2)
    return [name, psnr, fixed(video["ssim"], 4), fixed(latents["rel_l1"], 4), fixed(latents["cosine"], 5)]


def _control_rows(control: dict[str, Any] | None) -> list[list[str]]:
    return [] if control is None else [_quality_row("dense again (control)", control["video"], control["latents"])]


def _control_text(control: dict[str, Any] | None) -> list[str]:
    if control is None:
        return ["The control (the dense run repeated) was not run."]
    if control["latents"]["identical"] and control["video"]["identical"]:
        return ["The control is identical, so every difference above comes from the attention."]
    return ["**The control is not identical**: part of the difference above is the device's own non-determinism."]


def _level_row(level: dict[str, Any]) -> list[str]:
    def error(part: str, key: str = "rel_l1", digits: int = 4) -> str:
        return fixed(level[part][key], digits) if part in level else "0 (the model's own attention)"

    sigmas = ", ".join(f"{sigma:.3f}" for sigma in level["sigmas"])
    return [
        level["level"], level.get("granularity") or "-", f"{level['density']:.3f}", error("quantization"), error("sparsity"),
        error("total"), error("total", "cosine", 5) if "total" in level else "1", sigmas,
    ]  # fmt: skip


def _time_lines(report: dict[str, Any]) -> list[str]:
    seconds = report["seconds"]
    rows = [
        [
            name,
            *(f"{seconds[name][part]:.2f}" for part in ("quantize", "attention", "rest")),
            f"{sum(seconds[name].values()):.2f}",
        ]
        for name in ("dense", "FPSAttention")
    ]
    return [
        "## Time (seconds)",
        "",
        table(["run", "quantize", "attention", "rest (other layers, VAE, recording)", "sum"], rows),
        "",
        f"Measured once on {report['environment']['device']}, {'under the profiler' if report['environment']['gpu'] else 'op by op'}. The FPSAttention run also "
        f"wrote q, k, v to disk. Everything together took {seconds['everything']:.1f} s.",
        "",
        "![time](time_split.png)",
        "",
    ]


def _honest_lines(report: dict[str, Any], tiny: bool) -> list[str]:
    measured = [
        "the distance between the two runs of this seed, and the control",
        "the error of recorded attention calls, split by cause",
        f"seconds on {report['environment']['device']}",
    ]
    missing = ["quality as people see it: distance from a dense run of the same seed is not quality"]
    if tiny:
        missing.insert(
            0, "anything about a trained model: these weights are set by hand and by seed (demo/tiny_wan.py)"
        )
    if report["environment"]["gpu"] is None:
        missing.insert(0, "GPU speed: no GPU was used, and CPU seconds say nothing about the sm_90a kernels")
    preset = report["schedule"].get("provenance", {}).get("preset")
    if preset == "paper":
        missing.append("weights fine-tuned for this schedule, which the preset `paper` is meant for")
    lines = ["## What was measured, and what was not", "", "Measured:", ""]
    lines += [f"* {item}" for item in measured] + ["", "Not measured:", ""] + [f"* {item}" for item in missing]
    return [*lines, ""]


def _version_lines(env: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version or 'is no installed package'}" for name, version in env["versions"].items())
    return [
        "## Environment",
        "",
        f"Python {env['python']} on {env['platform']}; {env['processor']}, {env['cores']} cores; GPU: {env['gpu'] or 'none'}; {versions}.",
    ]
