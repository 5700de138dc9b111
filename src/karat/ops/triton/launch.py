"""Grids and launches: everything between arguments and the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from karat.ops.call import Gradients, Needs, no_gradients
from karat.ops.triton import kernels, kernels_sums
from karat.ops.triton.arguments import Arguments, Tiles

DU_NUMBERS = 1 << 13  # float32 numbers of dU that one program keeps in registers
SUMS = 64  # numbers of dK, dV and dU in a thread, beyond which a tile has few queries, or registers are spilled,
MOST_SUMS = 96  # and beyond which dV is summed in a launch of its own
PROGRAMS_PER_MULTIPROCESSOR = 4
BIAS_NUMBERS = 1 << 24  # most numbers of partial results for the gradient of a bias that images share


# What launched once: kernel, GPU, tiles and all that it was compiled for -> the pipeline's depth that fitted.
_FITTING: dict[tuple[Any, ...], int] = {}
_RUN_TIME = {"B", "H", "M", "N", "IMAGES"}  # the other names in capitals are what a kernel is compiled for


def _launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Launch with the deepest pipeline whose buffers fit into this GPU's shared memory; the result is the same."""
    arguments |= {"BM": tiles.queries, "BN": tiles.keys, "num_warps": tiles.warps}
    q, fixed = arguments["q"], sorted(name for name in arguments if name.isupper() and name not in _RUN_TIME)
    variant = (kernel, q.device, q.dtype, tiles, *((name, arguments[name]) for name in fixed))
    with torch.cuda.device_of(q):
        for stages in range(_FITTING.get(variant, tiles.stages), 0, -1):
            try:
                kernel[(programs,)](**arguments, num_stages=stages)
            except triton.OutOfResources:
                if stages == 1:
                    raise
            else:
                _FITTING[variant] = stages
                return


def _images_per_program(images: int, programs_per_image: int, device: torch.device) -> int:
    """How many images a program sums over: few programs keep partial results small, enough of them fill the chip."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    ranges = max(1, PROGRAMS_PER_MULTIPROCESSOR * processors // programs_per_image)
    return triton.cdiv(images, min(images, ranges))


def forward(arguments: Arguments) -> Tensor:
    """out (B,H,M,E) in q's dtype."""
    call, softmax = arguments.call, arguments.softmax
    B, H, M, _ = call.q.shape
    out = call.q.new_empty(B, H, M, arguments.u.shape[-1])
    if out.numel() == 0 or call.k.shape[2] == 0:
        if softmax is not None:
            softmax.see_nothing()
        return out.zero_()
    for columns, part in arguments.slices():
        tiles, target = part.tiles("fwd"), out[..., columns]
        beside = part.softmax
        attended, logsumexp = (target, target) if beside is None else (beside.attended, beside.logsumexp)
        results = {"out": target, "s_out": target.stride(), "attended": attended, "s_attended": attended.stride()}
        programs = B * H * triton.cdiv(M, tiles.queries)
        kernel = kernels.basis_attention_fwd_kernel
        _launch(kernel, programs, tiles, **part.values, **results, logsumexp=logsumexp)
    return out


def backward(arguments: Arguments, needs: Needs) -> Gradients:
    """Gradients for q, k, u and bias, in their dtypes; None where not needed."""
    call, softmax, grad = arguments.call, arguments.softmax, arguments.grad
    assert grad is not None
    if 0 in (grad.numel(), call.k.shape[2], call.q.shape[3]):
        if softmax is not None:
            softmax.see_nothing()
        return no_gradients(call, arguments.u, needs)
    parts = [_backward(part, needs) for _, part in arguments.slices()]
    dq, dk, dbias = (_sum([part[i] for part in parts]) for i in (0, 1, 3))
    du = torch.cat([part.u for part in parts if part.u is not None], -1) if needs[2] else None
    inputs = (call.q, call.k, arguments.u, call.bias)
    return Gradients(
        *(
            None if gradient is None or x is None else gradient.to(x.dtype)
            for x, gradient in zip(inputs, (dq, dk, du, dbias), strict=True)
        )
    )


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    total = parts[0]
    for part in parts[1:]:
        if total is not None and part is not None:
            total = total.to(torch.float32).add(part)
    return total


def _backward(arguments: Arguments, needs: Needs) -> Gradients:
    with_dv = arguments.softmax is not None and arguments.softmax.dv is not None
    dk, du = _dk_and_du(arguments, needs[1], needs[2]) if needs[1] or needs[2] or with_dv else (None, None)
    bias = arguments.call.bias
    return Gradients(
        _dq(arguments) if needs[0] else None,
        dk,
        du,
        _dbias(arguments, bias) if bias is not None and needs[3] else None,
    )


def _dq(arguments: Arguments) -> Tensor:
    q, tiles = arguments.call.q, arguments.tiles("dq")
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    programs = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], tiles.queries)
    _launch(kernels.basis_attention_bwd_dq_kernel, programs, tiles, **arguments.values, dq=dq, s_dq=dq.stride())
    return dq


def _groups(arguments: Arguments, tiles: Tiles, width: int) -> Iterator[tuple[int, int, int]]:
    """Features whose dU fit into a program's registers together: first unit, units, accumulators.

    A unit is a harmonic with its cos and sin, or one function of a spline; the first group holds the base as well.
    """
    if not arguments.linear:
        yield 0, 0, arguments.basis.num_parameters
        return
    each = 2 if arguments.family.name == "fourier" else 1
    units = arguments.family.num_parameters // each
    at_once = max(1, DU_NUMBERS * tiles.warps // 4 // (tiles.keys * width * each))
    for first in range(0, units, at_once):
        count = min(at_once, units - first)
        yield first, count, each * count + (arguments.leading if first == 0 else 0)


def _sums(tiles: Tiles, given: dict[str, Any]) -> int:
    """How many numbers of dK, dV and dU a thread keeps."""
    widths = given["WITH_DK"] * given["BD"] + (given["SOFTMAX"] and given["WITH_DV"]) * given["BV"]
    return int(tiles.keys * (widths + given["SLOTS"] * given["BE"]) // (32 * tiles.warps))


def _dk_and_du(arguments: Arguments, with_dk: bool, with_du: bool) -> tuple[Tensor | None, Tensor | None]:
    (q, k, *_), u, softmax = arguments.call, arguments.u, arguments.softmax
    (B, H), (N, E), tiles = q.shape[:2], u.shape[-2:], arguments.tiles("dkdu")
    blocks = H * triton.cdiv(N, tiles.keys)
    images = 1 if u.dim() == 5 else _images_per_program(B, blocks, q.device)
    ranges = triton.cdiv(B, images)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format) if with_dk else k
    shape = (ranges, H, arguments.basis.num_parameters, N, E)
    du = torch.empty(shape, dtype=torch.float32, device=q.device) if with_du else u
    wanted = None if softmax is None else softmax.dv
    dv = dk if wanted is None else wanted
    results = {"dk": dk, "s_dk": dk.stride(), "du": du, "dv": dv, "s_dv": dv.stride(), "B": B, "IMAGES": images}
    values = {**arguments.values, **results}
    groups = list(_groups(arguments, tiles, values["BE"])) if with_du else [(0, 0, 0)]
    launches = []
    for first, count, slots in groups:
        group = {"FIRST": first, "COUNT": count, "SLOTS": slots, "WITH_DK": with_dk and first == 0}
        group |= {"SOFTMAX": softmax is not None and first == 0, "WITH_DU": with_du, "WITH_DV": wanted is not None}
        launches.append(values | group)
    if wanted is not None and with_du and _sums(tiles, launches[0]) > MOST_SUMS:
        nothing = {"FIRST": 0, "COUNT": 0, "SLOTS": 0, "WITH_DK": False, "WITH_DU": False}
        launches = [launches[0] | {"WITH_DV": False}, *launches[1:], launches[0] | nothing]
    for launch in launches:
        narrow = tiles._replace(queries=16, stages=1) if _sums(tiles, launch) > SUMS else tiles
        _launch(kernels_sums.basis_attention_bwd_dkdu_kernel, ranges * blocks, narrow, **launch)
    if with_du and u.dim() == 4:
        du = du.sum(0)  # a fixed order, so two runs agree to the bit
    return dk if with_dk else None, du if with_du else None


def _dbias(arguments: Arguments, bias: Tensor) -> Tensor:
    q, tiles = arguments.call.q, arguments.tiles("dbias")
    (B, H, M, _), N = q.shape, arguments.call.k.shape[2]
    blocks_m, blocks_n = triton.cdiv(M, tiles.queries), triton.cdiv(N, tiles.keys)
    over_m, over_n = bias.shape[2] == 1, bias.shape[3] == 1
    kept = (H, blocks_m if over_m else M, blocks_n if over_n else N)
    images = 1
    if bias.shape[0] == 1:
        images = _images_per_program(B, H * blocks_m * blocks_n, q.device)
        images = max(images, triton.cdiv(B, max(1, BIAS_NUMBERS // (kept[0] * kept[1] * kept[2]))))
    ranges = triton.cdiv(B, images)
    dbias = torch.empty(ranges, *kept, dtype=torch.float32, device=bias.device)
    results = {"dbias": dbias, "s_dbias": dbias.stride(), "B": B, "IMAGES": images, "SUM_M": over_m, "SUM_N": over_n}
    kernel, programs = kernels_sums.basis_attention_bwd_dbias_kernel, ranges * H * blocks_m * blocks_n
    _launch(kernel, programs, tiles, **arguments.values, **results)
    return dbias.sum_to_size(bias.shape)
