"""Generate a video with Wan and FPSAttention: python examples/wan_generate.py --prompt "a cat on a surfboard" """

from __future__ import annotations

import argparse

import rich
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import fpsattention as fps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="hub id or local folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--schedule", default="training_free", help="a preset or a schedule file")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--num_frames", type=int, default=81)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", default="video.mp4")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(device)
    with fps.apply(pipe, args.schedule) as handle:
        frames = pipe(
            prompt=args.prompt,
            height=args.height,
            width=args.width,
            num_frames=args.num_frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator(device).manual_seed(args.seed),
        ).frames[0]
        rich.print(handle.report())
    export_to_video(frames, args.output_file, fps=16)


if __name__ == "__main__":
    main()
