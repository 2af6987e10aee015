"""Does training through FPSAttention close the loss gap? On a tiny Wan and synthetic data, in minutes on a CPU.

    python examples/finetune_evidence.py [--out docs/training]

One transformer is trained with dense attention. From these weights, with the same data, noise and sigmas:

    dense            goes on with dense attention
    naive            the weights of `dense`, run with FPSAttention at validation (training-free)
    training-aware   goes on through FPSAttention (the `paper` schedule, straight-through gradients)

Writes losses.csv (validation loss against fine-tuning step), losses.png and result.json. Validation: held-out samples, fixed noise, evenly
spread sigmas. A tiny model on synthetic latents shows the mechanism; it says nothing about the quality of videos of a trained Wan.
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


def paper_schedule():
    return fps.Schedule.from_dict({**fps.Schedule.preset("paper", flow_shift=3.0).to_dict(), "tile": list(TILE)})


def run(args):
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp())
    data_folder = write_synthetic(folder / "latents", num_samples=args.samples, latent_shape=LATENTS, seed=1)
    data = LatentFolder(data_folder)
    schedule = paper_schedule()
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
        settings = config(name, args.steps, schedule=schedule_file, learning_rate=args.learning_rate)

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
    final = {name: points[-1][1] for name, points in curves.items()}
    layout = fps.plan((5, 12, 16), TILE)
    result = {
        "date": str(date.today()), "machine": f"CPU, {args.threads} threads, {platform.machine()}", "torch": torch.__version__,
        "seconds": round(seconds), "arguments": {name: value for name, value in vars(args).items() if name != "out"}, "tile": TILE, "tokens": layout.num_tokens,
        "first": {name: points[0][1] for name, points in curves.items()}, "final": final,
        "gap_naive_percent": 100 * (final["naive"] / final["dense"] - 1),
        "gap_training_aware_percent": 100 * (final["training-aware"] / final["dense"] - 1),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    styles = {"dense": ("#0072B2", "-"), "naive": ("#D55E00", ":"), "training-aware": ("#009E73", "-")}
    for name, points in curves.items():
        color, line = styles[name]
        axis.plot(
            *zip(*points, strict=True),
            line,
            color=color,
            marker="o",
            markersize=3,
            label=f"{name} (ends at {final[name]:.4f})",
        )
    axis.set_xlabel("fine-tuning step")
    axis.set_ylabel("validation loss (flow matching)")
    axis.set_title("Tiny Wan, synthetic latents: training through FPSAttention narrows the loss gap", fontsize=10)
    axis.legend()
    axis.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(out / "losses.png"), metadata={"Software": None})
    print(json.dumps(result, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/training")
    parser.add_argument("--samples", type=int, default=144)
    parser.add_argument("--validation", type=int, default=16)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    write(*run(args), args)


if __name__ == "__main__":
    main()
