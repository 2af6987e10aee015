"""torch.compile, torch.export, fake and meta tensors: one graph for many grids, and the bits of an eager call."""

import subprocess
import sys

import pytest
import torch
from cases import CASES
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fpsattention as fps
from fpsattention.errors import ConfigError
from fpsattention.layout.plain import constant
from fpsattention.patterns.static import part_layout

pytestmark = pytest.mark.slow

CASE = CASES[4]
GRIDS = [
    (3, 8, 12),
    (3, 8, 8),
    (5, 6, 7),
    (2, 10, 9),
    (4, 4, 4),
    (3, 9, 9),
    (2, 7, 11),
    (3, 5, 7),
    (7, 3, 5),
    (2, 3, 4),
]


def inputs(grid, requires_grad=False, dim=64):
    shape = (1, grid[0] * grid[1] * grid[2], 2, dim)
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).requires_grad_(requires_grad) for i in range(3)
    ]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("window", [None, (1, 1, 1)], ids=["dense", "window"])
def test_one_dynamic_graph_serves_every_grid(requires_grad, window):
    compilations = 0

    def backend(graph, _):
        nonlocal compilations
        compilations += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fps.attention, dynamic=True, fullgraph=True, backend=backend)
    for grid in GRIDS:
        x = inputs(grid, requires_grad)
        out, want = compiled(*x, grid, window=window), fps.attention(*x, grid, window=window)
        assert torch.equal(out, want)
        if requires_grad:
            gradients = (torch.autograd.grad(y.square().sum(), x) for y in (out, want))
            assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert compilations == 1


def test_a_dynamic_graph_through_aot_autograd():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: fps.attention(*x) * 2, dynamic=True, fullgraph=True, backend="aot_eager")
    for number, grid in enumerate(GRIDS[:4]):
        x = inputs(grid, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            out = compiled(*x, grid)
        want = fps.attention(*x, grid) * 2
        gradients = (torch.autograd.grad(y.square().sum(), x) for y in (out, want))
        assert torch.equal(out, want) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_memory_of_planned_tables_is_not_given_away():
    """A compiler may reuse what an op returned: the caches must not be what it returned."""
    lists = torch.ops.fpsattn.lists(
        CASE.grid, CASE.tile, CASE.window, CASE.text_len, CASE.text_position, torch.device("cpu")
    )
    kept = CASE.mask().lists(True)
    for ours, theirs in zip(lists, kept, strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    arguments = (CASE.grid, CASE.tile, CASE.window, CASE.text_len, CASE.text_position, torch.device("cpu"))
    torch.library.opcheck(torch.ops.fpsattn.lists.default, arguments)


def test_plans_and_masks_inside_of_a_compiled_region():
    x = [t[:, : CASE.layout().num_tokens] for t in CASE.inputs()]
    near, dense = fps.sliding_tile_mask(CASE.layout(), CASE.window), fps.dense_mask(CASE.layout())
    both = fps.BlockMask.stack([near, dense])
    want = [fps.attention(*x, CASE.grid, block_mask=mask, text_len=CASE.text_len) for mask in (near, dense)]

    def planned(*x):
        layout = fps.plan(CASE.grid, CASE.tile, CASE.text_len)
        masks = fps.sliding_tile_mask(layout, CASE.window), fps.dense_mask(layout)
        outs = [fps.attention(*x, CASE.grid, block_mask=mask, text_len=CASE.text_len) for mask in masks]
        return *outs, torch.tensor(layout.num_tiles)

    def given(*x):
        return fps.attention(*x, CASE.grid, block_mask=near, text_len=CASE.text_len)

    def selected(index, *x):
        return fps.attention(*x, CASE.grid, block_mask=both.select(index), text_len=CASE.text_len)

    def made(counts, indices, *x):
        mask = fps.BlockMask(fps.plan(CASE.grid, CASE.tile, CASE.text_len), counts, indices)
        return fps.attention(*x, CASE.grid, block_mask=mask, text_len=CASE.text_len)

    def run(function, *arguments):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)

    a, b, tiles = run(planned, *x)
    assert torch.equal(a, want[0]) and torch.equal(b, want[1]) and int(tiles) == CASE.layout().num_tiles
    assert torch.equal(run(given, *x), want[0])
    assert torch.equal(run(selected, torch.tensor([1]), *x), want[1])
    x[0].requires_grad_()
    assert torch.equal(run(made, near.kv_num_blocks, near.kv_indices, *x), want[0])


def test_a_mask_traced_over_tiles_that_no_grid_has():
    """A layout of another origin than plan(): its dense mask in a graph is its own, or an error."""
    layout = part_layout(torch.arange(300) % 7, text_len=5)
    want = fps.dense_mask(layout)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        mask = fps.dense_mask(layout)
        return x + mask.kv_indices.sum(), mask.kv_indices

    assert torch.equal(traced(torch.zeros(1))[1], want.kv_indices)


class Attend(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return fps.attention(q, k, v, **self.options)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("given_mask", [False, True], ids=["planned", "given"])
def test_export_is_bit_equal(strict, given_mask):
    options = CASE.kwargs()
    if given_mask:
        options |= {"block_mask": CASE.mask(), "window": None}
    x = CASE.inputs()
    want = fps.attention(*x, **options)
    program = torch.export.export(Attend(**options), x, strict=strict)
    assert torch.equal(program.module()(*x), want)
    assert torch.equal(make_fx(Attend(**options))(*x)(*x), want)


def test_fake_and_meta_tensors_give_shapes():
    x = CASE.inputs()
    with FakeTensorMode() as mode:
        out, lse = fps.attention(*(mode.from_tensor(t) for t in x), return_lse=True, **CASE.kwargs())
    assert out.shape == x[0].shape and lse.shape == (1, CASE.heads, x[0].shape[1]) and out.stride() == x[0].stride()
    for options in (CASE.kwargs(), {**CASE.kwargs(), "window": None, "block_mask": CASE.mask()}):
        out = fps.attention(*(t.to("meta") for t in x), **options)
        assert out.is_meta and out.shape == x[0].shape
    with pytest.raises(ConfigError, match="head dimension 192"):
        fps.attention(*(torch.cat([t, t, t], -1).to("meta") for t in x), **CASE.kwargs())


def test_importing_leaves_the_compiler_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import fpsattention as fps; fps.attention, fps.plan, fps.BlockMask; "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('sympy', 'scipy', 'matplotlib', 'diffusers') "
        "or m.startswith(('torch._dynamo', 'torch._inductor', 'torch.fx.experimental.symbolic'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_constant_is_what_torch_means_by_it():
    def ours():
        return 1

    def theirs():
        return 1

    assert vars(constant(ours)) == vars(torch.compiler.assume_constant_result(theirs))
