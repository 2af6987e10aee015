"""What the library must know of a model that it did not write: :class:`Adapter` and :class:`Geometry`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...errors import ConfigError, UnsupportedError

Grid = tuple[int, int, int]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Which tokens the self-attention of one forward sees.

    Attributes:
        grid: video tokens ``(T, H, W)``, in raster order, T slowest.
        latents: what is denoised: its first size is the number of samples, and its device theirs.
        timestep: the noise level as the model receives it: one number per sample, one for all, or several per sample (tokens,
            frames: the noisiest counts).
        text_len: other tokens of the same sequence (text, history, images), dense in both directions. None: whatever
            the sequence has beyond the grid, read at the attention itself.
        text_position: where these tokens are: "suffix" or "prefix".
        exact: frames of the grid that are dense in both directions, too (reference images).
        alone: of the other tokens, those that are keys only (``Adapter.causal_text``): ``text_position`` is "suffix" for those that follow the
            video, though the keys of these come first.
    """

    grid: Grid
    latents: Tensor
    timestep: Tensor
    text_len: int | None = 0
    text_position: str = "suffix"
    exact: tuple[int, ...] = ()
    alone: int = 0


def flow_sigma(timestep: Any, num_train_timesteps: int) -> Any:
    """Sigma of flow matching models: 1 is noise, 0 is clean."""
    return timestep / num_train_timesteps


def own_sigma(timestep: Any, num_train_timesteps: int) -> Any:
    """Sigma of models that are told it as it is."""
    return timestep


def thousandths(timesteps: Sequence[float]) -> list[float]:
    """Sigmas of a flow matching scheduler."""
    return [timestep / 1000 for timestep in timesteps]


def inverted_sigma(timestep: Any, num_train_timesteps: int) -> Any:
    """Sigma of models whose time runs from noise (0) to clean (``num_train_timesteps``)."""
    return 1.0 - timestep / num_train_timesteps


#: ``move(x, dim)``: x with its video tokens, which are along ``dim``, in the other order.
Move = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Place:
    """Where tokens change their order in a forward: at the output of a module, or, on their way back, at its input.

    Attributes:
        path: of the module. It is outside of the repeated blocks, so that compiled blocks stay as they are.
        change: ``(output, move)`` to the changed output; with ``back``: the positional arguments, changed.
        back: from tile order to raster order.
    """

    path: str
    change: Callable[[Any, Move], Any]
    back: bool = False


def first_argument(arguments: tuple[Any, ...], move: Move) -> tuple[Any, ...]:
    """Tokens ``(B, S, C)`` are the first argument."""
    return (move(arguments[0], 1), *arguments[1:])


def raster_only(model: Any) -> tuple[Place, ...]:
    """``token_order`` of models whose tokens stay as they are."""
    return ()


@dataclass(frozen=True)
class Preparation:
    """What the code of an attention does to q and k between their projections and its core: norms ``norm_q`` and ``norm_k`` (of text
    with projections of its own: ``norm_added_q``, ``norm_added_k``), then rotation of the video tokens, or of all. The first argument of the
    code brings the video, ``(B, tokens, C)``; in models of one stream, all tokens.

    Attributes:
        kind: of the norms: "rms", "rms_across_heads" or "layer" (:class:`fpsattention.Norm`).
        argument: of the code, that brings the rotary tables; None there means no rotation.
        tables: what it brings, and the number of heads, to ``(cos, sin)``, each ``(1 or B, 1 or H, n, D/2)``, n the video tokens or all.
        style: which channels are a pair (:class:`fpsattention.Rope`).
        twice: it brings every angle twice, side by side.
        text_rotated: the tables are of all tokens, of the text, too.
    """

    kind: str
    argument: str
    tables: Callable[[Any, int], tuple[Tensor, Tensor]]
    style: str = "pairs"
    twice: bool = False
    text_rotated: bool = False


@dataclass(frozen=True)
class Adapter:
    """One model family: a row of the table in ``adapters/``.

    Attributes:
        name: of the family, for people.
        classes: names of the transformer classes; subclasses count.
        attentions: model to ``{name: attention module}``, in the order of the layers: the self-attention over the grid, and nothing else.
            A name is the path of the module in the model.
        geometry: model and the arguments of its forward, by name, to a :class:`Geometry`. It runs in every forward: no reads of
            device values.
        sigma: ``(timestep, num_train_timesteps)`` to sigma (1 noise, 0 clean), for floats and for tensors.
        core: name of the function that the attention modules call with q, k and v; None: whichever of diffusers' two is there.
        scheduled: for models that are told something computed from the timesteps of the scheduler: these timesteps, noisiest first, to
            sigmas.
        kind: "video" or "image".
        per_sample: the model calls its core once per sample, in order, with the tokens of that sample.
        text_mask: the model masks the padding of its text: bool masks ``(B, 1, 1, S)``, or ``(B, 1, S, S)`` where rows of the video are alike, say
            which keys count. Without it, a mask means dense attention.
        causal_text: the code calls its core twice. Text attends itself causally, which stays the model's own call; then all other tokens
            attend the text's keys, which come first and have no queries there, and their own.
        note: what users should know, for the table of models.
        linears: the layers of a block (what holds the attention) that may run in FP8, by their paths in it: projections of the video
            tokens and the feed-forward; those that a block lacks are passed over. Never layers of time, modulation or text.
        token_order: model to the places where its tokens go to tile order and come back, everything that is said per token (rotary
            tables, modulation) with them; empty where nothing is known of such a model, whose tokens then stay in raster order.
        prepare: how norms and RoPE of q and k can move into the quantizer; or why they stay the model's own, as a clause that follows them.
    """

    name: str
    classes: tuple[str, ...]
    attentions: Callable[[Any], dict[str, torch.nn.Module]]
    geometry: Callable[[Any, Arguments], Geometry]
    sigma: Callable[[Any, int], Any] = flow_sigma
    core: str | None = None
    scheduled: Callable[[Sequence[float]], Sequence[float]] | None = None
    kind: str = "video"
    per_sample: bool = False
    text_mask: bool = False
    causal_text: bool = False
    note: str = ""
    linears: tuple[str, ...] = ()
    token_order: Callable[[Any], tuple[Place, ...]] = raster_only
    prepare: Preparation | str = "are not known to be those of the quantizer"

    def __reduce__(self) -> Any:
        """Those of the table travel by name, so that their functions may be lambdas."""
        from . import named

        return (named, (self.name,)) if named(self.name) is self else super().__reduce__()

    def fits(self, model: Any) -> bool:
        """Whether ``model`` is of this family."""
        return any(cls.__name__ in self.classes for cls in type(model).__mro__)

    def class_name(self, model: Any) -> str:
        """The family's own name of the class of ``model``: FSDP2 and users subclass it."""
        return next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in self.classes), type(model).__name__)


def attention_linears(attention: str) -> tuple[str, ...]:
    """Projections of an attention of diffusers, fused or not."""
    return tuple(f"{attention}.{name}" for name in ("to_q", "to_k", "to_v", "to_qkv", "to_out.0"))


def feed_forward_linears(feed_forward: str) -> tuple[str, ...]:
    """Both layers of a feed-forward of diffusers."""
    return (f"{feed_forward}.net.0.proj", f"{feed_forward}.net.2")


def each_twice(tables: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """Tables ``(n, D)`` with every angle twice, side by side."""
    cos, sin = (x[:, 0::2][None, None] for x in tables)
    return cos, sin


def submodules(**attributes: str) -> Callable[[Any], dict[str, torch.nn.Module]]:
    """``attentions`` of models whose blocks all have one attention: ``submodules(blocks="attn1")``, block lists in this order; the
    attention is named by its path in the block."""

    def find(model: Any) -> dict[str, torch.nn.Module]:
        return {
            f"{blocks}.{i}.{attention}": attrgetter(attention)(block)
            for blocks, attention in attributes.items()
            for i, block in enumerate(getattr(model, blocks, ()))
        }

    return find


def patches(model: Any) -> Grid:
    """``(pT, pH, pW)`` of a model that has them apart, as ``patch_size_t`` (none: 1) and ``patch_size``."""
    config = model.config
    return (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size)


class _ReadOnce:
    """What is read from tensors that stay the same from step to step (masks, ids): once per tensor, not once per forward."""

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def __call__(self, tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
        """``read(tensor)``, which is kept as long as the tensor is neither freed nor written to."""
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "fpsattention.apply: the whole model is compiled, and its grid or text is in the values of a tensor, expected its blocks "
                "compiled (compile_repeated_blocks)"
            )
        version = 0 if tensor.is_inference() else tensor._version
        with self._lock:
            known = self._known.get(tensor)
            if known is None or known[0] != version:
                known = self._known[tensor] = (version, {})
            if read not in known[1]:
                known[1][read] = read(tensor)
        return known[1][read]


read_once = _ReadOnce()


def latents_grid(latents: Tensor, patch_size: Any) -> Grid:
    """Tokens of latents ``(B, C, T, H, W)`` under patches ``(pT, pH, pW)``."""
    if latents.ndim != 5:
        raise ConfigError(
            f"fpsattention.apply: hidden_states has shape {tuple(latents.shape)}, expected latents (B, C, T, H, W)"
        )
    t, h, w = (size // patch for size, patch in zip(latents.shape[2:], patch_size, strict=True))
    return (t, h, w)
