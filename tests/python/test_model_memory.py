"""Memory of a whole model's forward at 14B and 720p, from shapes: fake tensors of every size, none of their bytes."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fpsattention as fps

pytest.importorskip("diffusers")
from diffusers import WanTransformer3DModel

from fpsattention.integrations.sigmas import SigmaReader


class LiveBytes(TorchDispatchMode):
    """``most``: the most bytes of tensors made under this mode that lived at once."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in given | self.live.keys():
                self.live[key] = x.untyped_storage().nbytes()
                self.now += self.live[key]
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self.freed, key)
        return results

    def freed(self, key):
        self.now -= self.live.pop(key)


def test_live_bytes():
    with FakeTensorMode(), LiveBytes() as found:
        x = torch.empty(1000)
        y = x.view(10, 100) + 1  # a view is nothing new
        del x
        z = y * 2
    assert (found.most, found.now) == (8000, 8000)
    del y, z
    assert found.now == 0


@pytest.fixture(scope="module")
def peaks():
    """(options of fps.apply, or dense; training) -> peak in bytes of Wan2.1-14B with one layer."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1, rope_max_seq_len=1024).bfloat16()  # 40 heads of 128: 14B's sizes
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SigmaReader, "on_host", lambda *_: [0.5])  # a fake timestep has no value
        model = model.to_empty(device="cpu")
        inputs = (
            torch.empty(1, 16, 21, 90, 160, dtype=torch.bfloat16),
            torch.empty(1),
            torch.empty(1, 512, 4096, dtype=torch.bfloat16),
        )
        for options in (None, {}, {"prepare": "auto"}):
            handle = None if options is None else fps.apply(model, "paper", **options)
            for training in (False, True):
                with torch.set_grad_enabled(training), LiveBytes() as live:
                    out = model(*inputs, return_dict=False)[0]
                    if training:
                        out.backward(out.detach())
                found["dense" if options is None else str(options), training] = live.most
                model.zero_grad()
                del out
            if handle is not None:
                handle.remove()
    return found


@pytest.mark.slow
def test_a_forward_peaks_where_the_dense_one_does(peaks):
    """In the feed-forward and the modulation, not in attention, whose 8-bit copies are gone by then. What is above it stays for all layers and steps:
    block lists, and with prepare RoPE tables in tile order."""
    dense = peaks["dense", False]
    assert dense > 8e9
    assert dense < peaks["{}", False] < dense + 2e6
    assert dense < peaks["{'prepare': 'auto'}", False] < dense + 22e6


@pytest.mark.slow
def test_training_peaks_lower_than_dense(peaks):
    """The backward reads the 8-bit copies: q, k and v are not kept; with prepare the normalized and rotated ones are never made."""
    assert (
        peaks["{'prepare': 'auto'}", True]
        < 0.86 * peaks["dense", True]
        < 0.89 * peaks["{}", True]
        < 0.89 * peaks["dense", True]
    )
