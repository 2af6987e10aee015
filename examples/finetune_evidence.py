"""Does training through FPSAttention close the loss gap? On a tiny Wan and synthetic data, in a quarter of an hour on one CPU core.

    python examples/finetune_evidence.py [--out docs/training]

One transformer is trained with dense attention. From these weights, with the same data, noise and sigmas:

    dense            goes on with dense attention
    naive            the weights of `dense`, run with FPSAttention at validation (training-free)
    training-aware   goes on through FPSAttention (straight-through gradients)

The schedule is the `paper` preset's phases and granularities; its windows are a row of tiles for one head and a column for the other, a
quarter of the tiles each, because a window of the preset's density (0.12 to 0.24) would hold one or two of the 12 tiles.

Writes losses.csv (validation loss against fine-tuning step), losses.png and result.json. Validation: held-out samples, fixed noise, evenly
spread sigmas. A loss at one step is noisy, so `end` is the mean of the last validations. A tiny model on synthetic latents shows the
mechanism; it says nothing about the quality of videos of a trained Wan.
"""

import argparse
import copy
import csv
import json
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

import fpsattention as fps
from fpsattention.training import LatentFolder, TrainConfig, train, write_synthetic
from fpsattention.training.model import tiny_transformer
from fpsattention.training.trainer import validation_loss

TILE = (5, 4, 4)  # 80 tokens: small tiles, so that a small grid still has something to skip
LATENTS = (16, 5, 24, 32)  # token grid 5 x 12 x 16 = 960, 12 tiles


WINDOWS = {"*": {"0": [1, 1, 3], "1": [1, 3, 1]}}  # per head, of the 1 x 3 x 4 tiles: density 0.25
END = 5  # validations whose mean is the loss at the end


def sparse_schedule():
    preset = fps.Schedule.preset("paper", flow_shift=3.0).to_dict()
    return fps.Schedule.from_dict({**preset, "tile": list(TILE), "heads": WINDOWS})


def run(args):
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp())
    data_folder = write_synthetic(
        folder / "latents", num_samples=args.samples, latent_shape=LATENTS, lighting=args.lighting, seed=1
    )
    data = LatentFolder(data_folder)
    schedule = sparse_schedule()
    schedule.save(folder / "schedule.json")

    def config(name, steps, **changes):
        common = {
            "data": str(data_folder), "output": str(folder / name), "steps": steps, "batch_size": 4, "learning_rate": 1e-3,
            "validate_every": args.every, "validation_samples": args.validation, "schedule": None, "seed": 2,
        }  # fmt: skip
        return TrainConfig(**{**common, **changes})

    print("pretraining, dense", flush=True)
    model = tiny_transformer(data)
    train(config("pretrain", args.pretrain_steps), transformer=model)

    def loss(weights, settings, sparse):
        if not sparse:
            return validation_loss(weights, data, settings, args.validation)
        with fps.apply(weights, schedule):
            return validation_loss(weights, data, settings, args.validation)

    rows = []

    def fine_tune(name, schedule_file):
        print(f"fine-tuning, {name}", flush=True)
        weights = copy.deepcopy(model)
        settings = config(
            name, args.steps, schedule=schedule_file, learning_rate=args.learning_rate, plateau_patience=args.patience
        )

        def row(step, run_name, value):
            rows.append({"step": step, "run": run_name, "validation_loss": value})
            print(step, run_name, f"{value:.4f}", flush=True)

        row(0, name, loss(weights, settings, sparse=schedule_file is not None))
        if schedule_file is None:
            row(0, "naive", loss(weights, settings, sparse=True))

        def on_step(step, _):  # the dense run's weights, run with FPSAttention
            if schedule_file is None and (step + 1) % args.every == 0:
                row(step + 1, "naive", loss(weights, settings, sparse=True))

        result = train(settings, transformer=weights, on_step=on_step)
        for step, value in result.validation.items():
            row(step, name, value)

    started = time.perf_counter()
    fine_tune("dense", None)
    fine_tune("training-aware", str(folder / "schedule.json"))
    return rows, time.perf_counter() - started


def write(rows, seconds, args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "losses.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "run", "validation_loss"])
        writer.writeheader()
        writer.writerows({**row, "validation_loss": f"{row['validation_loss']:.6f}"} for row in rows)
    curves = {}
    for row in rows:
        curves.setdefault(row["run"], []).append((row["step"], row["validation_loss"]))
    end = {name: sum(loss for _, loss in points[-END:]) / END for name, points in curves.items()}
    layout = fps.plan((5, 12, 16), TILE)
    result = {
        "date": str(date.today()), "machine": f"CPU, {args.threads} threads, {platform.machine()}", "torch": torch.__version__,
        "seconds": round(seconds), "arguments": {name: value for name, value in vars(args).items() if name != "out"}, "tile": TILE, "tokens": layout.num_tokens,
        "start": {name: points[0][1] for name, points in curves.items()}, "end": end,
        "gap_start_percent": 100 * (curves["naive"][0][1] / curves["dense"][0][1] - 1),
        "gap_end_naive_percent": 100 * (end["naive"] / end["dense"] - 1),
        "gap_end_training_aware_percent": 100 * (end["training-aware"] / end["dense"] - 1),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")

    plot(curves, end, out / "losses.png")
    print(json.dumps(result, indent=2))


def plot(curves, end, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6), dpi=110, layout="constrained")
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    styles = {"dense": ("#0072B2", "-"), "naive": ("#D55E00", ":"), "training-aware": ("#009E73", "-")}
    dense = dict(curves["dense"])
    for name, points in curves.items():
        color, line = styles[name]
        steps, values = zip(*points, strict=True)
        label = f"{name} (mean of the last {END}: {end[name]:.4f})"
        losses.plot(steps, values, line, color=color, marker="o", markersize=3, label=label)
        percent = [100 * (value / dense[step] - 1) for step, value in points]
        gaps.plot(steps, percent, line, color=color, marker="o", markersize=3)
    losses.set_ylabel("validation loss (flow matching)")
    losses.set_title("Tiny Wan, synthetic latents: training through FPSAttention narrows the loss gap", fontsize=10)
    losses.legend()
    gaps.set_ylabel("above dense, %")
    gaps.set_xlabel("fine-tuning step")
    for axis in (losses, gaps):
        axis.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/training")
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument(
        "--patience", type=int, default=200, help="steps without progress until the learning rate halves"
    )
    parser.add_argument("--lighting", type=float, default=0.15, help="strength of what only far-away tokens tell")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    write(*run(args), args)


if __name__ == "__main__":
    main()
