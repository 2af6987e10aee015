"""What the library keeps between calls: ordinary tensors, on their device, made once, whatever the caller is in."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, Case

import fpsattention as fps
from fpsattention.layout import tiles
from fpsattention.layout.masks import BlockMask
from fpsattention.layout.plain import Cache, plain_tensors
from fpsattention.ops import core

CASE = CASES[4]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def transform():
    """Inside of torch.func: factory functions give wrappers there."""
    with torch._functorch.eager_transforms.grad_increment_nesting():
        yield


CONTEXTS = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "f64": lambda: default_dtype(torch.float64),
    "bf16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "fake": torch._subclasses.FakeTensorMode,
    "transform": transform,
}


def tensors_of(layout, *masks):
    found = [getattr(layout, name) for name in tiles.TABLES]
    for mask in masks:
        found += [mask.kv_num_blocks, mask.kv_indices, *mask.transpose()]
    return found


def everything():
    """All that a process keeps of a grid: layout, masks of every origin, copies on another device."""
    layout = CASE.layout()
    permuted = layout.permuted(torch.arange(layout.num_tokens, device="cpu").flip(0))
    near, dense = fps.sliding_tile_mask(layout, CASE.window), fps.dense_mask(layout)
    matrix = torch.ones(layout.num_tiles, layout.num_tiles, dtype=torch.bool, device="cpu")
    made = BlockMask.from_tiles(layout, matrix)
    stacked = BlockMask.stack([near, dense])
    return layout, permuted, (near, dense, made, stacked)


@pytest.mark.parametrize("name", CONTEXTS)
def test_kept_tensors_are_ordinary(name):
    fps.clear_plan_cache()
    layout, permuted, masks = everything()
    want = [*tensors_of(layout, *masks), *tensors_of(permuted)]
    fps.clear_plan_cache()
    with CONTEXTS[name]():
        if name in ("fake", "transform"):  # what the caller makes are wrappers there, what is planned must not be
            layout = CASE.layout()
            masks = (fps.sliding_tile_mask(layout, CASE.window), fps.dense_mask(layout))
        else:
            layout, permuted, masks = everything()
        moved = layout.to("meta"), masks[0].to("meta")
    got = tensors_of(layout, *masks)
    if name not in ("fake", "transform"):
        got += tensors_of(permuted)
    for tensor in got:
        assert type(tensor) is torch.Tensor and not tensor.is_inference() and tensor.device.type == "cpu"
        assert tensor.dtype == torch.int32 and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if len(got) == len(want):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for tensor in tensors_of(moved[0], moved[1]):
        assert type(tensor) is torch.Tensor and not tensor.is_inference() and tensor.device.type == "meta"


@pytest.mark.parametrize("name", ["inference", "no_grad", "f64", "bf16", "meta"])
@pytest.mark.parametrize("given_mask", [False, True], ids=["planned", "given"])
def test_training_after_a_call_in_another_context(name, given_mask):
    """The first call on a grid is made in the context, training follows: same bits as without."""

    def gradients(first):
        fps.clear_plan_cache()
        q, k, v = (x.requires_grad_() for x in CASE.inputs())
        kwargs = CASE.kwargs()
        with first():
            if given_mask:
                layout = CASE.layout()
                near = fps.sliding_tile_mask(layout, kwargs.pop("window"))
                indices = near.kv_indices.clone()  # an inference tensor in inference mode
                kwargs["block_mask"] = BlockMask(layout, near.kv_num_blocks.clone(), indices)
            fps.attention(*(x.detach() for x in (q, k, v)), **kwargs)
        out = fps.attention(q, k, v, **kwargs)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))

    want = gradients(nullcontext)
    assert all(torch.equal(a, b) for a, b in zip(gradients(CONTEXTS[name]), want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.skipif(core.sm90_on_host(), reason="CPU tensors go to the sm_90a kernels here")
def test_default_dtype_and_device_change_no_bit(dtype, backend):
    q, k, v = (x.bfloat16() for x in CASE.inputs())

    def results():
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = fps.attention(*x, backend=backend, return_lse=True, **CASE.kwargs())
        return out.detach(), lse, *torch.autograd.grad(out, x, v)

    want = results()
    fps.clear_plan_cache()
    with default_dtype(dtype), torch.device("meta"):
        got = results()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
def test_threads_share_what_is_made_once():
    """Sixteen threads meet the same new grids at once: every result is right, and copies are made once per object."""
    grids = [(2, 5, 7), (3, 4, 6), (2, 6, 9), (1, 9, 11)]
    want = {}
    for grid in grids:
        q = torch.randn(1, grid[0] * grid[1] * grid[2], 1, 64, generator=torch.Generator().manual_seed(1))
        want[grid] = (q, fps.attention(q, q, q, grid))
    fps.clear_plan_cache()
    mask = fps.dense_mask(fps.plan((4, 6, 6)))
    barrier, failures, copies = threading.Barrier(16), [], []

    def work(number):
        try:
            barrier.wait()
            copies.append((mask.to("meta"), mask.layout.to("meta")))
            for grid in grids[number % 4 :] + grids[: number % 4]:
                q, out = want[grid]
                if number == 3:
                    fps.clear_plan_cache()
                if not torch.equal(fps.attention(q, q, q, grid), out):
                    failures.append(grid)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({id(m) for m, _ in copies}) == 1 and len({id(layout) for _, layout in copies}) == 1


def test_cache_makes_a_value_once():
    cache, made, barrier = Cache(), [], threading.Barrier(8)

    def work():
        barrier.wait()
        cache.get("key", lambda: made.append(1))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_autocast_in_two_threads_does_not_leak():
    """The CPU kernels turn autocast off inside; that state must not be shared between threads."""
    q, k, v = CASE.inputs()
    want = fps.attention(q, k, v, **CASE.kwargs())
    seen = []

    def work(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(5):
                out = fps.attention(q, k, v, **CASE.kwargs())
                seen.append((out.dtype == torch.bfloat16) == enabled and torch.is_autocast_enabled("cpu") == enabled)
                if not enabled:
                    seen.append(torch.equal(out, want))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen) and not torch.is_autocast_enabled("cpu")


def test_copies_and_pickles_are_whole_and_leave_copies_behind():
    mask = fps.sliding_tile_mask(CASE.layout(), CASE.window)
    mask.to("meta")
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert all(
            torch.equal(a, b)
            for a, b in zip(tensors_of(mask.layout, mask), tensors_of(other.layout, other), strict=True)
        )
        assert other.to("meta") is other.to("meta") and other.to("meta") is not mask.to("meta")


@pytest.mark.slow
def test_masks_and_layouts_cannot_be_changed_and_are_collected():
    layout = fps.plan((3, 5, 8))
    mask = fps.BlockMask.from_tiles(layout, torch.ones(layout.num_tiles, layout.num_tiles, dtype=torch.bool))
    for thing, name in ((mask, "kv_indices"), (layout, "token_of_slot")):
        with pytest.raises(AttributeError):
            setattr(thing, name, None)
    mask.to("meta")
    gone = weakref.ref(mask)
    del mask, thing
    gc.collect()
    assert gone() is None


def test_repr_is_one_short_line():
    for thing in (fps.plan((21, 45, 80)), fps.dense_mask(fps.plan((3, 8, 12), text_len=7))):
        assert "\n" not in repr(thing) and len(repr(thing)) < 220 and "tensor(" not in repr(thing)


def test_a_mask_from_elsewhere_gets_its_transpose_without_keeping_it():
    """On a device nothing is kept that one stream writes and another might read."""
    mask = fps.sliding_tile_mask(CASE.layout(), CASE.window)
    bare = BlockMask(mask.layout.to("meta"), mask.kv_num_blocks.to("meta"), mask.kv_indices.to("meta"))
    assert bare.with_transpose() is not bare and bare.transpose()[0].shape == mask.q_num_blocks.shape
    held = bare.with_transpose()
    assert held.transpose()[0] is held.transpose()[0] and held.with_transpose() is held
    assert bare.lists(False).q_indices is None and mask.lists(False).q_indices is mask.q_indices


def test_tables_are_kept_for_another_stream(monkeypatch):
    recorded = []

    def table(name):
        return SimpleNamespace(record_stream=lambda stream: recorded.append((name, stream)))

    q = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "default")
    core._keep_for_stream(q, table("a"), None)
    assert recorded == []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "side")
    core._keep_for_stream(q, table("a"), None, table("b"))
    assert recorded == [("a", "side"), ("b", "side")]


def test_plain_tensors_restores_the_callers_state():
    with torch.inference_mode(), torch.device("meta"):
        with plain_tensors():
            x = torch.zeros(2)
            assert not torch.is_inference_mode_enabled() and x.device.type == "cpu" and not x.is_inference()
        assert torch.is_inference_mode_enabled() and torch.zeros(1).device.type == "meta"


def test_first_call_inside_of_a_transform():
    case = Case("fresh", (2, 7, 9), (2, 4, 4), (1, 1, 2))
    fps.clear_plan_cache()
    q, k, v = case.inputs()
    tangent = torch.func.jvp(lambda x: fps.attention(q, k, x, **case.kwargs()), (v,), (v,))[1]
    out = fps.attention(q, k, v, **case.kwargs())
    assert (tangent - out).norm() < 0.05 * out.norm()
