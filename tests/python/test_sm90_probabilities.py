"""P has one definition, to the bit, in the forward and in the backward (docs/numerics.md, step 3 and "Codes by arithmetic").

64 planted scores: the e4m3 code of each depends on which of the three factors is multiplied first, with one K scale per token. And scores next
to each border of two FP16 values: codes do not depend on the running maximum. P is read off: of the forward from O with one-hot
values, of the backward from dV with one-hot dO. The ops are the CPU's here; where tensors go to the sm_90a kernels
(a Hopper GPU, or FPSATTN_SM90_ON_HOST=1 under the emulator), theirs.
"""

import math

import pytest
import torch

from fpsattention.ops import core, reference

DIM, BLOCK, SCALE = 64, 128, 0.125
SHIFT = 8.0
TIES = [(step + 0.5 - 264.125) / 32 for step in range(520)]  # up to 8: halfway between two FP16 values of h
DEVICE = "cuda" if torch.cuda.is_available() and not core.sm90_missing() else "cpu"


def code_slot_probabilities(y):
    return reference.exponent_codes(y).view(torch.float8_e4m3fn).float()


def plant(count):
    """``(product, s_q, s_k, P)``: P of ``(product * s_k) * (s_q * c)`` is another with ``(s_q * s_k) * c``, fused additions or not.

    The exponents are next to the border of two codes, halfway between two FP32 values of h, so that the last bit of a score decides.
    """
    generator = torch.Generator().manual_seed(5)
    n = 1 << 16
    ties = torch.tensor(
        [y for y in TIES if y < 0], dtype=torch.double
    )  # a bit of the score y - 8 is a quarter of a step of h
    steps = (ties - 2.0**-7, ties + 2.0**-7)
    borders = ties[code_slot_probabilities(steps[0]) != code_slot_probabilities(steps[1])]
    y = borders[torch.randint(len(borders), (n,), generator=generator)] - 2.0**-19  # half a step: ties go to even steps
    product = -torch.randint(8, 16, (n,), generator=generator).float()
    s_k = torch.rand(n, generator=generator) + 0.5
    scale_log2 = torch.tensor(SCALE * reference.LOG2E)
    s_q = ((y - SHIFT) / (product.double() * s_k.double() * scale_log2.double())).float()
    row, each, scaled = s_q * scale_log2, s_q * s_k * scale_log2, product * s_k  # rounded as everyone does
    new = [scaled * row + SHIFT, scaled.double() * row.double() + SHIFT]
    old = [product * each + SHIFT, product.double() * each.double() + SHIFT]
    p_new, p_old = ([code_slot_probabilities(y) for y in ys] for ys in (new, old))
    good = (p_new[0] == p_new[1]) & (p_old[0] == p_old[1]) & (p_new[0] != p_old[0])
    assert good.sum() >= count
    return [x[good][:count] for x in (product, s_q, s_k, p_new[0])]


def nearest_e4m3(x):
    return x.float().to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("ops", [reference, torch.ops.fpsattn], ids=["reference", "ops"])
def test_forward_and_backward_round_scores_in_the_same_order(ops):
    product, s_q, s_k, want = plant(DIM)
    ones = torch.ones(BLOCK)
    q, k, v = torch.zeros(BLOCK, DIM), torch.zeros(BLOCK, DIM), torch.zeros(BLOCK, DIM)
    i = torch.arange(DIM)
    q[i, i], k[i, i], v[i, i] = product, 1.0, 1.0  # score (i, i) is planted, the others are 0: the maximum is 0
    rows = torch.cat([v, ones[:, None], torch.zeros(BLOCK, reference.V_EXTRA_ROWS - 1)], 1)
    v8t = rows[reference.v_slot_order()].T
    q_scale, k_scale = (torch.cat([s, torch.ones(BLOCK - DIM)]) for s in (s_q, s_k))
    operands = [x.to(torch.float8_e4m3fn)[None, None, None].contiguous() for x in (q, k, v8t)]
    operands += [q_scale[None, None, None].contiguous(), k_scale[None, None, None].contiguous(), torch.ones(1, 1, DIM)]
    tokens, tiles = torch.arange(BLOCK, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    counts, indices = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    arguments = [x.to(DEVICE) for x in (*operands, tokens, tiles, counts, indices)]
    out, _, row_max, row_sum = ops.forward(*arguments, num_tokens=BLOCK, softmax_scale=SCALE, out_dtype=torch.float16)
    grad_out = torch.eye(BLOCK, DIM, dtype=torch.float16)[None, None].to(DEVICE)
    transposed = () if ops is reference else (counts.to(DEVICE), indices.to(DEVICE))
    options = {} if ops is reference else {"deterministic": True}
    _, _, dv = ops.backward(
        grad_out, out, *arguments[:6], row_max, row_sum, *arguments[6:], *transposed, softmax_scale=SCALE, **options
    )
    assert not row_max.any() and not any(math.isnan(x) for x in row_sum.flatten().tolist())
    l = row_sum.view(BLOCK, 1)
    forward = nearest_e4m3(out[0, 0] * l)[:DIM].cpu()  # [query, key]
    backward = nearest_e4m3(dv[0, 0].float() * l[:DIM].T)[:DIM].cpu().T
    assert torch.equal(forward.diagonal(), want)
    assert torch.equal(backward.diagonal(), want)
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("ops", [reference, torch.ops.fpsattn], ids=["reference", "ops"])
def test_codes_do_not_depend_on_the_maximum(ops):
    """The second block of a row raises its maximum by 0 to 8: the backward finds the codes of the first one, 8 lower per octave down to the tail."""
    heads, step = 17, 2.0**-18  # of h in FP32, in octaves
    y = torch.tensor([tie + side * step for tie in TIES for side in (-1, 1)], dtype=torch.double)
    y = torch.cat([y, y.new_zeros(heads * DIM - len(y))]).view(heads, DIM)
    codes = reference.exponent_codes(y)
    assert set(codes.flatten().tolist()) == set(range(121))
    raised = torch.arange(DIM) % 9
    scale_log2 = torch.tensor(reference.LOG2E)
    s_q = next(s for s in (1 / scale_log2 + i * 2.0**-25 for i in range(-2, 3)) if s * scale_log2 == 1)
    q, k, v = (torch.zeros(heads, 2, BLOCK, DIM) for _ in range(3))
    i = torch.arange(DIM)
    q[:, 0, :DIM, 0], q[:, 0, :DIM, 1] = 1.0, raised.float()
    k[:, 0, :DIM, 0], k[:, 1, 0, 1] = -1.0, 1.0
    v[:, 0, i, i] = 1.0
    k_scale = torch.ones(heads, 2, BLOCK)
    k_scale[:, 0, :DIM] = (8 - y).float()  # of key j: score y - 8
    rows = torch.cat([v, torch.ones(heads, 2, BLOCK, 1), torch.zeros(heads, 2, BLOCK, reference.V_EXTRA_ROWS - 1)], -1)
    v8t = rows[:, :, reference.v_slot_order()].transpose(2, 3)
    operands = [x.to(torch.float8_e4m3fn)[None].contiguous() for x in (q, k, v8t)]
    operands += [s_q.expand(1, heads, 2, BLOCK).contiguous(), k_scale[None], torch.ones(1, heads, DIM)]
    tokens, tiles = torch.arange(2 * BLOCK, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    counts = torch.tensor([2, 0], dtype=torch.int32).view(1, 1, 2)
    indices = torch.tensor([[0, 1], [0, 0]], dtype=torch.int32).view(1, 1, 2, 2)
    transposed = (torch.tensor([1, 1], dtype=torch.int32).view(1, 1, 2), torch.zeros(1, 1, 2, 1, dtype=torch.int32))
    arguments = [x.to(DEVICE) for x in (*operands, tokens, tiles, counts, indices)]
    out, _, row_max, row_sum = ops.forward(
        *arguments, num_tokens=2 * BLOCK, softmax_scale=1.0, out_dtype=torch.bfloat16
    )
    grad_out = torch.zeros(1, heads, 2 * BLOCK, DIM, dtype=torch.bfloat16)
    grad_out[:, :, i, i] = 1.0
    extra = () if ops is reference else [x.to(DEVICE) for x in transposed]
    options = {} if ops is reference else {"deterministic": True}
    _, _, dv = ops.backward(
        grad_out.to(DEVICE), out, *arguments[:6], row_max, row_sum, *arguments[6:], *extra, softmax_scale=1.0, **options
    )
    assert torch.equal(row_max[0, :, :DIM].cpu(), raised.float().expand(heads, DIM))
    l = row_sum[0, :, :DIM, None].cpu()
    value = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    forward = nearest_e4m3(out[0, :, :DIM].float().cpu() * l * 2.0 ** raised[:, None])  # [head, query, key]
    assert torch.equal(forward, value[codes.long()][:, None].expand_as(forward))
    backward = nearest_e4m3(dv[0, :, :DIM].float().cpu().transpose(1, 2) * l)
    lower = reference.exponent_codes(y[:, None] - raised[:, None]).long()
    main = lower > 11
    assert (
        torch.equal(lower[main], (codes[:, None].long() - 8 * raised[:, None])[main])
        and int(main.sum()) > heads * DIM**2 / 2
    )
    assert torch.equal(backward, value[lower])
