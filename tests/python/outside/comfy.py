"""Call shapes of ComfyUI (comfy/ldm/modules/attention.py, comfy/patcher_extension.py, comfy/model_patcher.py, comfy/ldm/wan and
hunyuan_video): overrides of its attention, wrappers of its diffusion models, clones of its models."""
# ruff: noqa: B006 (its signatures)

import copy

import torch

from . import HEADS, Projections, sdpa

CALLS: list[str] = []  # what ComfyUI's own attention was called for


def optimized_attention(*args, **kwargs):
    """Calls an override once, and never from inside of one."""
    if "_inside_attn_wrapper" not in kwargs:
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if override is not None:
            return override(attention_pytorch, *args, _inside_attn_wrapper=True, **kwargs)
    return attention_pytorch(*args, **kwargs)


def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    CALLS.append("own")
    assert set(kwargs) <= {"_inside_attn_wrapper", "transformer_options", "scale"}
    q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v))
    out = sdpa(q, k, v, mask)
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


class Executor:
    def __init__(self, function, class_obj, wrappers):
        self.function, self.class_obj, self.wrappers = function, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.function(*args, **kwargs)
        return self.wrappers[0](Executor(self.function, self.class_obj, self.wrappers[1:]), *args, **kwargs)


def wrappers_of(kind, options):
    return [w for group in options.get("wrappers", {}).get(kind, {}).values() for w in group]


class WanAttention(Projections):
    def forward(self, x, transformer_options, context=None):
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)
        return self.o(optimized_attention(q, k, v, heads=self.num_heads, transformer_options=transformer_options))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = WanAttention(), WanAttention()

    def forward(self, x, context, transformer_options):
        x = x + self.self_attn(x, transformer_options)
        return x + self.cross_attn(x, transformer_options, context)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch_size, self.num_heads = (1, 2, 2), HEADS
        self.patch_embedding = torch.nn.Conv3d(4, HEADS * 64, self.patch_size, self.patch_size)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))


class WanModel(Model):
    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):
        wrappers = wrappers_of("diffusion_model", transformer_options)
        run = Executor(self._forward, self, wrappers)
        return run(x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        if kwargs.get("reference_latent") is not None:
            x = torch.cat([self.patch_embedding(kwargs["reference_latent"]).flatten(2).transpose(1, 2), x], 1)
        for block in self.blocks:
            x = block(x, context=context, transformer_options=transformer_options)
        return x


class LTXVModel(Model):
    """Blocks of another name, which some nodes hand options of their own; unlike WanModel it never tells which block runs."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks, self.num_attention_heads = self.blocks, HEADS
        del self.blocks, self.num_heads

    def forward(
        self,
        x,
        timestep,
        context,
        attention_mask=None,
        frame_rate=25,
        transformer_options={},
        keyframe_idxs=None,
        **kwargs,
    ):
        run = Executor(self._forward, self, wrappers_of("diffusion_model", transformer_options))
        return run(x, timestep, context, attention_mask, frame_rate, transformer_options, keyframe_idxs, **kwargs)

    def _forward(self, x, timestep, context, attention_mask, frame_rate, transformer_options, keyframe_idxs, **kwargs):
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.transformer_blocks):
            options = transformer_options if i else {**transformer_options, "stg_skip_self_attn": False}
            x = block(x, context=context, transformer_options=options)
        return x


class JointBlock(Block):
    def forward(self, x, attn_mask, transformer_options):
        a = self.self_attn
        q, k, v = (f(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (a.q, a.k, a.v))
        out = optimized_attention(
            q, k, v, HEADS, mask=attn_mask, skip_reshape=True, transformer_options=transformer_options
        )
        return x + a.o(out)


class HunyuanVideo(Model):
    """Video, then text, already in heads; a refiner of the text before the blocks."""

    def __init__(self):
        super().__init__()
        self.double_blocks, self.single_blocks = (torch.nn.ModuleList([JointBlock()]) for _ in range(2))
        self.txt_in = WanAttention()

    def forward(
        self, x, timestep, context, y=None, guidance=None, attention_mask=None, transformer_options={}, **kwargs
    ):
        run = Executor(self._forward, self, wrappers_of("diffusion_model", transformer_options))
        return run(x, timestep, context, y, guidance, attention_mask, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, y, guidance, attention_mask, transformer_options):
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        context = self.txt_in(context, transformer_options)
        video, x = x.shape[1], torch.cat([x, context], 1)
        for block in (*self.double_blocks, *self.single_blocks):
            x = block(x, attn_mask=attention_mask, transformer_options=transformer_options)
        return x[:, :video]


class ModelPatcher:
    """A model with options, which clones share by copies of nested dictionaries."""

    def __init__(self, diffusion_model):
        self.diffusion_model, self.model_options, self.wrappers = diffusion_model, {"transformer_options": {}}, {}

    def clone(self):
        other = ModelPatcher(self.diffusion_model)
        other.model_options = {
            **self.model_options,
            "transformer_options": dict(self.model_options["transformer_options"]),
        }
        other.wrappers = {kind: {key: list(ws) for key, ws in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def get_model_object(self, name):
        return getattr(self, name)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def sample(self, x, context, sigmas, **kwargs):
        """Runs the model at every sigma but the last, with prompt and negative prompt in one batch; returns all outputs."""

        def run():
            outs = []
            for sigma in sigmas[:-1]:
                options = copy.copy(self.model_options["transformer_options"])
                options["wrappers"] = self.wrappers
                options |= {"sample_sigmas": sigmas, "sigmas": sigma.repeat(x.shape[0]), "cond_or_uncond": [1, 0]}
                timestep = 1000 * options["sigmas"]
                outs.append(self.diffusion_model(x, timestep, context, transformer_options=options, **kwargs))
            return outs

        return Executor(run, self, wrappers_of("outer_sample", {"wrappers": self.wrappers}))()
