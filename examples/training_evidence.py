"""What training through FPSAttention brings back, and how fast: a tiny Wan on real clips or synthetic latents, minutes on one CPU core.

    python examples/training_evidence.py                                                # synthetic
    python examples/training_evidence.py --data LATENTS --name real                     # real clips: real_video.py makes LATENTS

One transformer is trained with dense attention until its learning rate has fallen to nothing. From these weights:

    dense                   goes on with dense attention, on the data
    naive                   the weights of `dense`, run with FPSAttention (training-free)
    training-aware          goes on through FPSAttention, on the data (flow matching)
    velocity                through FPSAttention, taught by the weights as they were: inputs are the data plus noise. Half as many steps
    velocity and data       the same, but half of the target is flow matching's: what the teacher does not know, with half of the noise
    velocity without data   the same as velocity, but the inputs are the teacher's own trajectories from noise: prompts are all it reads

Every run ends with its learning rate at nothing; which it begins with is chosen per objective from one list, on the first seed, by the loss at
the end. A seed is one of order, noise and sigmas; runs of a seed on the data see the same. Measured on held-out data, with fixed noise and evenly spread sigmas:

    loss       flow matching. The gap is what it is above that of the dense counterpart: of `dense` at that step for naive and
               training-aware, at its end for velocity and data, which has half as many steps, and of the teacher for the two
               that have no other target
    distance   mean squared difference from the counterpart's velocity, relative to the mean square of that velocity

Writes NAME.csv, NAME.json and NAME.png to --out. Whatever run has ended is in --work and is not run again.
"""

import argparse
import copy
import csv
import json
import platform
from datetime import date
from pathlib import Path

import torch

import fpsattention as fps
from fpsattention.training import LatentFolder, TrainConfig, train, write_synthetic
from fpsattention.training.model import tiny_transformer
from fpsattention.training.objective import noisy, predict

LATENTS = (16, 4, 24, 24)  # token grid 4 x 12 x 12 = 576
TILE = (4, 4, 4)  # 1 x 3 x 3 tiles: small ones, so that a small grid still has something to skip
WINDOWS = {"0": {"0": [1, 1, 3]}, "1": {"0": [1, 3, 1]}}  # layer, head: a row of tiles, then a column; density 1/3
MODEL = {"num_attention_heads": 1, "ffn_dim": 128}  # of tiny_transformer: two layers
BATCH = 8  # of a measurement
SPARSE = ("training-aware", "velocity", "velocity and data", "velocity without data")
TAUGHT = ("velocity", "velocity without data")  # by the teacher alone: they cannot become better than it
COLORS = {
    "naive": "#D55E00",
    "training-aware": "#009E73",
    "velocity": "#0072B2",
    "velocity and data": "#E69F00",
    "velocity without data": "#CC79A7",
}


def sparse_schedule():
    preset = fps.Schedule.preset("paper", flow_shift=3.0).to_dict()
    return fps.Schedule.from_dict({**preset, "tile": list(TILE), "heads": WINDOWS})


class Evidence:
    def __init__(self, args):
        self.args, self.work = args, Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "work", "name", "rates", "seeds")}
        kept = self.work / "settings.json"
        if kept.exists() and json.loads(kept.read_text()) != settings:
            raise SystemExit(f"{self.work} holds runs of other settings: {kept.read_text()}")
        kept.write_text(json.dumps(settings))
        folder = args.data or str(self.work / "latents")
        if not args.data and not Path(folder).is_dir():
            write_synthetic(folder, num_samples=args.samples, latent_shape=LATENTS, lighting=args.lighting, seed=1)
        self.folder, self.data = folder, LatentFolder(folder)
        self.schedule = sparse_schedule()
        self.schedule.save(self.work / "schedule.json")
        batch = self.data.batch([len(self.data) - 1 - i for i in range(args.validation)])
        generator = torch.Generator().manual_seed(1_234_567)
        self.latents, self.prompts = batch["latents"], batch["prompt_embeds"]
        self.noise = torch.randn(self.latents.shape, generator=generator)
        self.sigma = (torch.arange(args.validation) + 0.5) / args.validation
        self.start = self._pretrained()
        self.teacher = self.velocities(self.start)
        self.teacher_loss = self.loss(self.teacher)

    def config(self, output, steps, rate, **changes):
        settings = {
            "data": self.folder, "output": str(self.work / output), "steps": steps, "learning_rate": rate, "learning_rate_decay": "linear",
            "warmup_steps": 10, "batch_size": self.args.batch_size, "schedule": None, "seed": 2,
            "validate_every": 10**9, "validation_samples": len(self.data) // 5,  # held out; measured here, not there
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    def _pretrained(self):
        model = tiny_transformer(self.data, **MODEL)
        weights = self.work / "pretrain" / "transformer"
        if not weights.is_dir():
            print("pretraining, dense", flush=True)
            batch = 2 * self.args.batch_size
            resume = any(weights.parent.glob("checkpoint-*"))
            settings = self.config(
                "pretrain", self.args.pretrain_steps, 2e-3, batch_size=batch, checkpoint_every=100, keep_checkpoints=1, resume=resume
            )  # fmt: skip
            train(settings, transformer=model)
        return type(model).from_pretrained(weights)

    def velocities(self, model, sparse=False):
        """Of the held-out inputs, ``[n, C, T, H, W]``; ``sparse``: run a model that has no schedule with it."""
        if sparse:
            twin = copy.deepcopy(model)
            fps.apply(twin, self.schedule)
            return self.velocities(twin)
        x = noisy(self.latents, self.noise, self.sigma)
        with torch.no_grad():
            parts = zip(x.split(BATCH), self.sigma.split(BATCH), self.prompts.split(BATCH), strict=True)
            return torch.cat([predict(model, *part) for part in parts])

    def loss(self, velocities):
        return float((velocities - (self.noise - self.latents)).square().mean())

    @staticmethod
    def distance(velocities, other):
        return float((velocities - other).square().mean() / other.square().mean())

    def run(self, name, seed, rate):
        """Step -> velocities of one run, its attention as it is; of ``dense`` also ("naive", step). From the disk where it has ended."""
        path = self.work / f"{name.replace(' ', '-')}-{seed}-{rate:g}"
        if (path / "velocities.pt").exists():
            return torch.load(path / "velocities.pt")
        print(f"{name}, seed {seed}, learning rate {rate:g}", flush=True)
        sparse, steps, changes = name != "dense", self.args.steps, {}
        if sparse:
            changes["schedule"] = str(self.work / "schedule.json")
        if "velocity" in name:
            steps, changes["objective"] = steps // 2, "velocity"
        if "and data" in name:
            changes["data_share"] = 0.5
        if "without" in name:
            changes["noise_latents"] = ",".join(map(str, self.data.latent_shape))
        model, found = copy.deepcopy(self.start), {}

        def on_step(step, _):
            if step % self.args.every and step != steps:
                return
            found[step] = self.velocities(model, sparse and step == 0)  # later through the trainer's own schedule
            if not sparse:
                found["naive", step] = self.velocities(model, sparse=True)
            print(step, f"{self.loss(found[step]):.5f}", f"{self.distance(found[step], self.teacher):.5f}", flush=True)

        on_step(0, None)
        settings = self.config(path.name, steps, rate, seed=2 + seed, **changes)
        train(settings, transformer=model, on_step=lambda step, loss: on_step(step + 1, loss))
        torch.save(found, path / "unfinished.pt")
        (path / "unfinished.pt").rename(path / "velocities.pt")
        return found

    def chosen(self, name):
        """The learning rate whose loss at the end is the lowest, on the first seed; and all of them."""
        ends = {}
        for rate in self.args.rates:
            found = self.run(name, self.args.seeds[0], rate)
            ends[rate] = self.loss(found[max(step for step in found if isinstance(step, int))])
        return min(ends, key=ends.get), ends

    def rows(self):
        """What the CSV holds, and the chosen learning rates."""
        tried = {name: self.chosen(name) for name in SPARSE}
        rate_of = {name: rate for name, (rate, _) in tried.items()}
        rows = []
        for seed in self.args.seeds:
            dense = self.run("dense", seed, rate_of["training-aware"])
            runs = {"dense": dense, "naive": {step[1]: v for step, v in dense.items() if isinstance(step, tuple)}}
            runs |= {name: self.run(name, seed, rate) for name, rate in rate_of.items()}
            for name, found in runs.items():
                for step, velocities in found.items():
                    if isinstance(step, tuple):
                        continue
                    if name in TAUGHT:
                        other = self.teacher
                    else:
                        other = dense[self.args.steps if name == "velocity and data" else step]
                    loss, of_other = self.loss(velocities), self.loss(other)
                    rows.append({
                        "seed": seed, "run": name, "step": step, "loss": round(loss, 6), "gap_percent": round(100 * (loss / of_other - 1), 4),
                        "distance_percent": round(100 * self.distance(velocities, other), 4),
                    })  # fmt: skip
        return rows, tried


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def ends(rows, key):
    """Run -> what it ended with, seed by seed."""
    found = {}
    for row in rows:
        found.setdefault(row["run"], {}).setdefault(row["seed"], {})[row["step"]] = row[key]
    return {name: [steps[max(steps)] for steps in of.values()] for name, of in found.items()}


def write(rows, tried, evidence, args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{args.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    gaps = ends(rows, "gap_percent")
    result = {
        "date": str(date.today()), "machine": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}", "torch": torch.__version__,
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "work", "data")}, "data": "given" if args.data else "synthetic",
        "tile": TILE, "windows": WINDOWS, "model": MODEL, "teacher_loss": evidence.teacher_loss,
        "gap_at_the_start_percent": 100 * (evidence.loss(evidence.velocities(evidence.start, sparse=True)) / evidence.teacher_loss - 1),
        "gap_at_the_end_percent": gaps,
        "at_training_aware's_gap_in_half_the_steps": {
            name: [a <= b for a, b in zip(gaps[name], gaps["training-aware"], strict=True)] for name in SPARSE[1:]
        },
        "distance_at_the_end_percent": ends(rows, "distance_percent"),
        "loss_at_the_end_by_learning_rate": {name: {f"{r:g}": v for r, v in losses.items()} for name, (_, losses) in tried.items()},
        "learning_rates": {name: rate for name, (rate, _) in tried.items()},
    }  # fmt: skip
    (out / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(rows, f"{args.name} latents", out / f"{args.name}.png")
    print(json.dumps(result, indent=2))


def plot(rows, what, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    labels = {
        "gap_percent": "validation loss above the dense counterpart, %",
        "distance_percent": "distance from its velocity, %",
    }
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, color in COLORS.items():
            of_step = {}
            for row in rows:
                if row["run"] == name:
                    of_step.setdefault(row["step"], []).append(row[key])
            steps, values = zip(*sorted(of_step.items()), strict=True)
            axis.plot(
                steps,
                [mean(v) for v in values],
                color=color,
                marker="o",
                markersize=3,
                label=f"{name}{', to dense at its end' if name == 'velocity and data' else ''}: {mean(values[-1]):.2f}",
            )
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, lw=0)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xlabel("step of fine-tuning")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="at the end", title_fontsize=8)
    figure.suptitle(f"Tiny Wan, {what}: mean and range of the seeds", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def main():
    def numbers(kind):
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/training")
    parser.add_argument("--name", default="synthetic", help="of the files in --out")
    parser.add_argument("--data", help="folder of latents (real_video.py makes one); default: synthetic ones")
    parser.add_argument("--work", required=True, help="folder of data and runs")
    parser.add_argument("--samples", type=int, default=400, help="of the synthetic data")
    parser.add_argument(
        "--lighting", type=float, default=0.35, help="of the synthetic data: what only far-away tokens tell"
    )
    parser.add_argument(
        "--validation", type=int, default=16, help="samples measured, of the last fifth, which is held out"
    )
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument(
        "--steps", type=int, default=100, help="of dense and training-aware; velocity takes half as many"
    )
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument(
        "--rates", type=numbers(float), default=[1e-4, 3e-4, 1e-3], help="learning rates to choose from"
    )
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    args = parser.parse_args()
    evidence = Evidence(args)
    rows, tried = evidence.rows()
    write(rows, tried, evidence, args)


if __name__ == "__main__":
    main()
