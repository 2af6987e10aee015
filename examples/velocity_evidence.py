"""How fast does a dense teacher close the gap, without data? On the tiny Wan of finetune_evidence.py, about half an hour on one CPU core.

    python examples/velocity_evidence.py [--out docs/training]

One transformer is trained with dense attention. From these weights:

    dense               goes on with dense attention: what flow matching's gap is measured from
    flow matching       goes on through FPSAttention, on the data (`training-aware` in finetune_evidence.py)
    velocity            through FPSAttention, taught by the weights as they were; inputs are the data plus noise
    velocity without data   the same, but the inputs are the teacher's own trajectories from noise: prompts are all it reads

The gap is the validation loss (flow matching, held-out data, fixed noise) above that of the dense counterpart: of the `dense` run at the same
step for flow matching, of the teacher for velocity, whose target does not move. `reached` says at which step a velocity run's gap, as a mean of
three validations, first was at or below the one at which the flow-matching run ended (mean of its last five).

Writes velocity.csv, velocity.json and velocity.png. Several seeds: --seeds 0,1,2 (order, noise and sigmas of the fine-tuning).
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
from finetune_evidence import END, LATENTS, TILE, sparse_schedule

import fpsattention as fps
from fpsattention.training import LatentFolder, TrainConfig, train, write_synthetic
from fpsattention.training.model import tiny_transformer
from fpsattention.training.trainer import validation_loss

RUNS = {  # settings beside the common ones
    "dense": {"schedule": None},
    "flow matching": {},
    "velocity without data": {"objective": "velocity", "noise_latents": ",".join(map(str, LATENTS))},
    "velocity": {"objective": "velocity"},
}
WINDOW = 3  # validations whose mean is a gap
COLORS = {"flow matching": "#009E73", "velocity": "#0072B2", "velocity without data": "#D55E00"}


def run(args):
    torch.set_num_threads(args.threads)
    folder = Path(args.work or tempfile.mkdtemp())
    data_folder = args.data or write_synthetic(
        folder / "latents", num_samples=args.samples, latent_shape=LATENTS, lighting=args.lighting, seed=1
    )
    data = LatentFolder(data_folder)
    schedule = sparse_schedule()
    schedule.save(folder / "schedule.json")

    def config(name, steps, **changes):
        common = {
            "data": str(data_folder), "output": str(folder / name), "steps": steps, "batch_size": 4, "learning_rate": 1e-3,
            "schedule": None, "seed": 2,
        }  # fmt: skip
        return TrainConfig(**{**common, **changes})

    held_out = config("held-out", 1, validate_every=1, validation_samples=args.validation)
    model = tiny_transformer(data)
    pretrained = folder / "pretrain" / "transformer"
    if pretrained.is_dir():  # of an earlier run in the same --work
        model = type(model).from_pretrained(pretrained)
    else:
        print("pretraining, dense", flush=True)
        # The last samples are for validation: training never reads them.
        train(config("pretrain", args.pretrain_steps, validate_every=10**9, validation_samples=args.validation), transformer=model)  # fmt: skip

    def loss(weights, sparse):
        if not sparse:
            return validation_loss(weights, data, held_out, args.validation)
        with fps.apply(weights, schedule, replace=True):
            return validation_loss(weights, data, held_out, args.validation)

    rows = []
    for seed in args.seeds:
        for name in args.runs:
            changes = RUNS[name]
            rate = args.velocity_learning_rate if "objective" in changes else args.learning_rate
            print(f"seed {seed}: {name}", flush=True)
            weights, sparse = copy.deepcopy(model), name != "dense"
            changes = {"schedule": str(folder / "schedule.json"), **changes}
            # The held-out samples' prompts are not read either; nothing is validated but here.
            settings = config(
                f"{seed}-{name}", args.steps, learning_rate=rate, seed=2 + seed, validation_samples=args.validation,
                validate_every=10**9, **changes,
            )  # fmt: skip

            def row(step, name=name, seed=seed, weights=weights, sparse=sparse):
                value = loss(_without_schedule(weights), sparse)
                rows.append({"seed": seed, "run": name, "step": step, "validation_loss": value})
                write_csv(rows, folder / "velocity.csv")
                print(seed, name, step, f"{value:.5f}", flush=True)

            row(0)

            def on_step(step, _, row=row):
                if (step + 1) % args.every == 0:
                    row(step + 1)

            train(settings, transformer=weights, on_step=on_step)
    return rows


def _without_schedule(weights):
    """A copy: the trainer's own handle stays on the weights that are being trained."""
    twin = copy.deepcopy(weights)
    fps.remove(twin)
    return twin


def gaps(rows):
    """Seed, run -> [(step, percent above the dense counterpart)]."""
    losses = {}
    for row in rows:
        losses.setdefault((row["seed"], row["run"]), {})[row["step"]] = row["validation_loss"]
    found = {}
    for (seed, run_name), values in losses.items():
        if run_name != "dense":
            dense = losses[seed, "dense"]
            found[seed, run_name] = [
                (step, 100 * (value / dense[step if run_name == "flow matching" else 0] - 1))
                for step, value in sorted(values.items())
            ]
    return found


def reached(points, goal):
    """The first step at which the mean of WINDOW validations (this one and those before it) is at most ``goal``."""
    values = [value for _, value in points]
    for i in range(WINDOW - 1, len(points)):
        if sum(values[i - WINDOW + 1 : i + 1]) / WINDOW <= goal:
            return points[i][0]
    return None


def write_csv(rows, path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["seed", "run", "step", "validation_loss"])
        writer.writeheader()
        writer.writerows({**row, "validation_loss": f"{row['validation_loss']:.6f}"} for row in rows)


def write(rows, seconds, args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / "velocity.csv")
    curves = gaps(rows)
    seeds = sorted({seed for seed, _ in curves})
    result = {
        "date": str(date.today()), "machine": f"CPU, {args.threads} threads, {platform.machine()}", "torch": torch.__version__,
        "seconds": round(seconds), "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "work", "data")}, "data": "given" if args.data else "synthetic", "tile": TILE,
        "seeds": {},
    }  # fmt: skip
    for seed in seeds:
        end = {name: sum(g for _, g in curves[seed, name][-END:]) / END for name in args.runs if name != "dense"}
        goal = end["flow matching"]
        result["seeds"][seed] = {
            "gap_start_percent": curves[seed, "flow matching"][0][1],
            "gap_end_percent": end,
            "steps_to_flow_matchings_end": {
                name: reached(curves[seed, name], goal) for name in end if name != "flow matching"
            },
        }
    (out / "velocity.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(curves, out / "velocity.png")
    print(json.dumps(result, indent=2))


def plot(curves, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=110, layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(run_name for _, run_name in curves):
        color = COLORS[name]
        runs = [points for (_, run_name), points in sorted(curves.items()) if run_name == name]
        steps = [step for step, _ in runs[0]]
        values = [[points[i][1] for points in runs] for i in range(len(steps))]
        axis.plot(steps, [sum(v) / len(v) for v in values], color=color, marker="o", markersize=3, label=name)
        if len(runs) > 1:
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, lw=0)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xlabel("fine-tuning step")
    axis.set_ylabel("validation loss above the dense counterpart, %")
    axis.set_title("Tiny Wan: how fast the gap of FPSAttention closes", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/training")
    parser.add_argument(
        "--data", help="folder of latents 16x5x24x32 (real_video.py makes one); default: synthetic ones"
    )
    parser.add_argument("--work", help="folder for data and runs; default: a temporary one")
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument(
        "--velocity-learning-rate",
        type=float,
        default=5e-5,
        help="its loss begins so small that larger steps only shake the weights",
    )
    parser.add_argument("--lighting", type=float, default=0.15)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument(
        "--runs",
        type=lambda text: text.split(","),
        default=list(RUNS),
        help="dense and flow matching, and which of the others",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    started = time.perf_counter()
    write(run(args), time.perf_counter() - started, args)


if __name__ == "__main__":
    main()
