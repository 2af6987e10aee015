"""One video on several processes, by every scheme of ``fpsattention.parallel``; then a few training steps.

    torchrun --nproc-per-node 2 examples/parallel_generate.py

A tiny random Wan transformer on the CPU (gloo); with GPUs, one each (NCCL). Every rank first makes the video alone, then together with the
others, and says whether the two are equal. The largest difference is in units of the video's root mean square.
"""

import argparse
import copy
import os

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import fpsattention as fps

TILE = (2, 8, 8)
SCHEMES = {
    "Ulysses, BF16 exchange": {"exchange": "bf16"},
    "Ulysses, FP8 exchange": {},
    "halo": {"scheme": "halo"},
    "ring": {"scheme": "ring"},
}
EXACT = "Ulysses, BF16 exchange", "Ulysses, FP8 exchange", "halo"
LAYERS, RING, BF16 = 2, 3e-5, 2.0**-8


def allowed(name, steps, gpu):
    """Largest difference, in root mean squares of the video: 5 deviations (of 65,536 elements) of what the calls of attention may be off together.

    A call of "ring" is off by 3e-5 at most (docs/scale.md), here taken to add up; the others by nothing. On a GPU outputs are BF16, and FP8 sums drop
    other bits where blocks are added up in another order: two roundings apart, at random.
    """
    calls = steps * LAYERS
    if gpu:
        return 5 * BF16 * calls**0.5
    return 0.0 if name in EXACT else 5 * RING * calls


def tiny_wan():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=64, num_layers=LAYERS, ffn_dim=128, text_dim=32, in_channels=16, out_channels=16,
        freq_dim=64, rope_max_seq_len=64, cross_attn_norm=True,
    )  # fmt: skip


def schedule():
    """Dense FP8 at first, then a sliding tile window."""
    levels = {"dense": fps.Level("dense", "fp8", "block"), "window": fps.Level("window", "fp8", "block", (3, 1, 1))}
    return fps.Schedule(levels, (fps.Phase(1.0, 0.7, "dense"), fps.Phase(0.7, 0.0, "window")), tile=TILE)


@torch.no_grad()
def generate(model, steps):
    """Latents ``(1, 16, 8, 16, 32)``: 1,024 tokens."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 8, 16, 32, generator=generator).to(device)
    prompt = torch.randn(1, 16, 32, generator=generator).to(device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps, device=device)
    for t in scheduler.timesteps:
        velocity = model(latents, t.expand(1), prompt, return_dict=False)[0]
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def train(model, steps, together):
    """Losses; gradients are averaged over the ranks, as DDP and FSDP do."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        clean, noise = torch.randn(2, 1, 16, 8, 16, 32, generator=generator).to(next(model.parameters()).device)
        prompt = torch.randn(1, 16, 32, generator=generator).to(clean.device)
        sigma = torch.rand(1, generator=generator).to(clean.device)
        noisy = (1 - sigma) * clean + sigma * noise
        prediction = model(noisy, 1000 * sigma, prompt, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction, noise - clean)
        loss.backward()
        if together:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    dist.init_process_group()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("sp",))
    say = print if dist.get_rank() == 0 else lambda *_: None

    model = tiny_wan().to(device)
    fps.apply(model, schedule())
    alone = generate(model, args.steps)
    size, wrong = alone.square().mean().sqrt(), []
    for name, how in SCHEMES.items():
        (spread,) = fps.parallel.shard(model, mesh, **how)
        with fps.parallel.count_bytes() as sent:
            video = generate(model, args.steps)
        spread.remove()
        equal, difference = torch.equal(video, alone), ((video - alone).abs().max() / size).item()
        if not (equal or difference <= allowed(name, args.steps, gpu)):
            wrong.append(name)
        verdict = (
            "equals that of one process, bit for bit"
            if equal
            else f"differs from that of one process by {difference:.1e} at most"
        )
        say(f"{name + ':':24s}the video {verdict}; rank 0 sent {sum(sent.values()):,} bytes")

    losses = train(copy.deepcopy(model), args.steps, together=False)
    for name, how in SCHEMES.items():
        one = copy.deepcopy(model)
        fps.parallel.shard(one, mesh, **how)
        many = train(one, args.steps, together=True)
        worst = max(abs(a - b) / b for a, b in zip(many, losses, strict=True))
        say(
            f"{name + ':':24s}training losses {', '.join(f'{x:.5f}' for x in many)}; differ from those of one process by {worst:.1e} at most"
        )
        if worst > 1e-3:
            wrong.append(f"training by {name}")
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(f"error: not as promised: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
