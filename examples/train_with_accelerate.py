"""A plain diffusers + accelerate fine-tune of Wan. fpsattention adds exactly one line to it (marked below).

    python examples/train_with_accelerate.py LATENTS_DIR OUTPUT_DIR [--model PATH_OR_ID] [--steps 100]

LATENTS_DIR holds safetensors files with ``latents`` [C, T, H, W] and ``prompt_embeds`` [N, text_dim]. Without ``--model`` a tiny random
transformer is trained, so that the script runs anywhere.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import fpsattention as fps


class Latents(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise SystemExit(f"error: no *.safetensors files in '{folder}'")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        sample = load_file(self.files[index])
        return sample["latents"], sample["prompt_embeds"]


def tiny_model(latents, prompt_embeds):
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=latents.shape[0], out_channels=latents.shape[0],
        text_dim=prompt_embeds.shape[1], freq_dim=64, ffn_dim=256, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("latents")
    parser.add_argument("output")
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = Latents(args.latents)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = (
        WanTransformer3DModel.from_pretrained(args.model, subfolder="transformer")
        if args.model
        else tiny_model(*data[0])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = torch.utils.data.DataLoader(data, batch_size=args.batch_size, shuffle=True, drop_last=True)

    fps.apply(model, "paper")  # <- the one line

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = 0
    while step < args.steps:
        for latents, prompt_embeds in loader:
            with accelerator.accumulate(model):
                noise = torch.randn_like(latents)
                sigma = torch.rand(len(latents), device=latents.device)
                s = sigma.view(-1, 1, 1, 1, 1)
                prediction = model((1 - s) * latents + s * noise, sigma * 1000, prompt_embeds, return_dict=False)[0]
                loss = torch.nn.functional.mse_loss(prediction, noise - latents)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
            step += 1
            if step == args.steps:
                break
    accelerator.unwrap_model(model).save_pretrained(args.output)


if __name__ == "__main__":
    main()
