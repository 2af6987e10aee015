"""The node "FPSAttention": a MODEL in, a clone of it with a schedule out."""

from __future__ import annotations

from typing import Any

from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.schedule import Schedule
from fpsattention.schedule.presets import PRESETS

from .override import OVERRIDE, Override, find

KEY = "fpsattention"


class FPSAttention:
    """FP8 and tile-sparse self-attention of a video model. Nothing of the model itself is touched: the clone carries an attention
    override, which keeps one that was there before for everything that stays dense."""

    CATEGORY = "model_patches/attention"
    DESCRIPTION = "FP8 + tile-sparse self-attention for video models (Wan, HunyuanVideo, LTX-Video)."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, as ComfyUI asks for them."""
        return {
            "required": {
                "model": ("MODEL",),
                "schedule": (list(PRESETS), {"default": "training_free"}),
            },
            "optional": {
                "schedule_file": ("STRING", {"default": "", "tooltip": "A schedule file, instead of the preset."}),
                "flow_shift": (
                    "FLOAT",
                    {
                        "default": 5.0,
                        "min": 0.1,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "Places the phases of a preset where a sampler does not run all steps, such as Wan 2.2's two samplers.",
                    },
                ),
                "on_unsupported": (["dense", "raise"], {"default": "dense"}),
            },
        }

    def apply(
        self,
        model: Any,
        schedule: str = "training_free",
        schedule_file: str = "",
        flow_shift: float = 5.0,
        on_unsupported: str = "dense",
    ) -> tuple[Any]:
        """The model under a schedule.

        Raises:
            ConfigError: the schedule is wrong, or not for this model.
            UnsupportedError: a model of another family, or a ComfyUI without wrappers of the diffusion model.
        """
        if on_unsupported not in ("dense", "raise"):
            raise ConfigError(f"fpsattention.comfyui: on_unsupported {on_unsupported!r}, expected 'dense' or 'raise'")
        resolved = Schedule.load(schedule_file) if schedule_file else Schedule.preset(schedule, flow_shift)
        diffusion_model = model.get_model_object("diffusion_model")
        family = find(diffusion_model)
        if not hasattr(model, "add_wrapper_with_key"):
            raise UnsupportedError(
                "fpsattention.comfyui: this ComfyUI cannot wrap diffusion models, expected 0.3.60 or later"
            )
        clone = model.clone()
        options = dict(clone.model_options.get("transformer_options", {}))
        previous = options.get(OVERRIDE)
        if isinstance(previous, Override):
            previous = previous.previous
            for kind in ("diffusion_model", "outer_sample"):
                clone.remove_wrappers_with_key(kind, KEY)
            options = dict(clone.model_options.get("transformer_options", {}))
        override = Override(family, diffusion_model, resolved, previous, on_unsupported)
        options[OVERRIDE] = override
        clone.model_options = {**clone.model_options, "transformer_options": options}
        clone.add_wrapper_with_key("diffusion_model", KEY, override.around_forward)
        clone.add_wrapper_with_key("outer_sample", KEY, override.around_sampling)
        return (clone,)


NODE_CLASS_MAPPINGS = {"FPSAttention": FPSAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"FPSAttention": "FPSAttention (FP8 + tile-sparse)"}
