"""Grids and launches: everything between a call and the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from karat.ops.triton import kernels as triton_kernels
from karat.ops.triton import kernels_sums as triton_kernels_sums
from karat.ops.triton.call import Call, Tiles

DU_NUMBERS = 1 << 13  # float32 numbers of dU that one program keeps in registers
PROGRAMS_PER_MULTIPROCESSOR = 4
BIAS_NUMBERS = 1 << 24  # most numbers of partial results for the gradient of a bias that images share


def _launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Launch with the deepest pipeline whose buffers fit into this GPU's shared memory; the result is the same."""
    arguments |= {"BM": tiles.queries, "BN": tiles.keys, "num_warps": tiles.warps}
    with torch.cuda.device_of(arguments["q"]):
        for stages in range(tiles.stages, 0, -1):
            try:
                kernel[(programs,)](**arguments, num_stages=stages)
                return
            except triton.OutOfResources:
                if stages == 1:
                    raise


def _images_per_program(images: int, programs_per_image: int, device: torch.device) -> int:
    """How many images a program sums over: few programs keep partial results small, enough of them fill the chip."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    ranges = max(1, PROGRAMS_PER_MULTIPROCESSOR * processors // programs_per_image)
    return triton.cdiv(images, min(images, ranges))


def forward(call: Call) -> Tensor:
    """out (B,H,M,E) in q's dtype."""
    B, H, M, _ = call.q.shape
    out = call.q.new_empty(B, H, M, call.u.shape[-1])
    if out.numel() == 0 or call.k.shape[2] == 0:
        if call.softmax is not None:
            call.softmax.see_nothing()
        return out.zero_()
    for columns, part in call.slices():
        run_time, compile_time = part.arguments()
        tiles, target = part.tiles("fwd"), out[..., columns]
        programs = B * H * triton.cdiv(M, tiles.queries)
        constants = {**compile_time, "HAS_BIAS": call.bias is not None}
        softmax, kernel = part.softmax, triton_kernels.basis_attention_fwd_kernel
        attended, logsumexp = (target, target) if softmax is None else (softmax.attended, softmax.logsumexp)
        results = {"out": target, "s_out": target.stride(), "attended": attended, "logsumexp": logsumexp}
        _launch(kernel, programs, tiles, **run_time, **constants, **results, s_attended=attended.stride())
    return out


def backward(
    call: Call, grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for q, k, u and bias, in their dtypes; None where not needed."""
    inputs = (call.q, call.k, call.u, call.bias)
    if 0 in (grad.numel(), call.k.shape[2], call.q.shape[3]):
        if call.softmax is not None:
            call.softmax.see_nothing()
        dq, dk, du, dbias = (
            torch.zeros_like(x) if x is not None and need else None for x, need in zip(inputs, needs, strict=True)
        )
        return dq, dk, du, dbias
    grad = grad.to(call.q.dtype)
    parts = [_backward(part, grad[..., columns], needs) for columns, part in call.slices()]
    factor = 1.0 if call.softmax is None else call.softmax.score_gradient  # which the first part has taken in itself
    dq, dk, dbias = (_sum([part[i] for part in parts], factor) for i in (0, 1, 3))
    du = torch.cat([part[2] for part in parts if part[2] is not None], -1) if needs[2] else None
    gradients = (dq, dk, du, dbias)
    dq, dk, du, dbias = (
        None if gradient is None or x is None else gradient.to(x.dtype)
        for x, gradient in zip(inputs, gradients, strict=True)
    )
    return dq, dk, du, dbias


def _sum(parts: list[Tensor | None], factor: float) -> Tensor | None:
    """The first part and `factor` times the others."""
    total = parts[0]
    for part in parts[1:]:
        if total is not None and part is not None:
            total = total.to(torch.float32).add(part, alpha=factor)
    return total


def _backward(
    call: Call, grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    run_time, compile_time = call.arguments()
    run_time |= {"do": grad, "s_do": grad.stride(), **_softmax_arguments(call, grad)}
    dq = _dq(call, run_time, compile_time) if needs[0] else None
    with_dv = call.softmax is not None and call.softmax.dv is not None
    dk, du = None, None
    if needs[1] or needs[2] or with_dv:
        dk, du = _dk_and_du(call, run_time, compile_time, needs[1], needs[2])
    dbias = _dbias(call, call.bias, run_time, compile_time) if call.bias is not None and needs[3] else None
    return dq, dk, du, dbias


def _softmax_arguments(call: Call, grad: Tensor) -> dict[str, Any]:
    """What the backward kernels take of softmax: its rows and their gradient, or anything where there is none."""
    softmax = call.softmax
    if softmax is None:
        return {"da": grad, "s_da": grad.stride(), "logsumexp": grad, "delta": grad, "score_gradient": 1.0}
    assert softmax.grad is not None
    da = softmax.grad.to(call.q.dtype)
    rows = {"logsumexp": softmax.logsumexp, "delta": softmax.delta().contiguous()}
    return {"da": da, "s_da": da.stride(), **rows, "score_gradient": softmax.score_gradient}


def _dq(call: Call, run_time: dict[str, Any], compile_time: dict[str, Any]) -> Tensor:
    B, H, M, _ = call.q.shape
    dq, tiles = torch.empty_like(call.q, memory_format=torch.contiguous_format), call.tiles("dq")
    constants = {**compile_time, "HAS_BIAS": call.bias is not None}
    kernel = triton_kernels.basis_attention_bwd_dq_kernel
    programs = B * H * triton.cdiv(M, tiles.queries)
    _launch(kernel, programs, tiles, **run_time, **constants, dq=dq, s_dq=dq.stride())
    return dq


def _groups(call: Call, tiles: Tiles, width: int) -> Iterator[tuple[int, int, int]]:
    """Features whose dU fit into a program's registers together: first unit, units, accumulators.

    A unit is a harmonic with its cos and sin, or one function of a spline; the first group holds the base as well.
    """
    if not call.linear:
        yield 0, 0, call.num_parameters
        return
    each = 2 if call.family.name == "fourier" else 1
    units = call.family.num_parameters // each
    at_once = max(1, DU_NUMBERS * tiles.warps // 4 // (tiles.keys * width * each))
    for first in range(0, units, at_once):
        count = min(at_once, units - first)
        yield first, count, each * count + (call.leading if first == 0 else 0)


def _dk_and_du(
    call: Call, run_time: dict[str, Any], compile_time: dict[str, Any], with_dk: bool, with_du: bool
) -> tuple[Tensor | None, Tensor | None]:
    B, H, N = call.q.shape[0], call.q.shape[1], call.k.shape[2]
    E, tiles = call.u.shape[-1], call.tiles("dkdu")
    blocks = H * triton.cdiv(N, tiles.keys)
    images = 1 if call.u.dim() == 5 else _images_per_program(B, blocks, call.q.device)
    ranges = triton.cdiv(B, images)
    dk = torch.empty_like(call.k, memory_format=torch.contiguous_format) if with_dk else call.k
    shape = (ranges, H, call.num_parameters, N, E)
    du = torch.empty(shape, dtype=torch.float32, device=call.q.device) if with_du else call.u
    wanted = None if call.softmax is None else call.softmax.dv
    dv = dk if wanted is None else wanted
    results = {"dk": dk, "s_dk": dk.stride(), "du": du, "dv": dv, "s_dv": dv.stride()}
    arguments = {**run_time, **results, "B": B, "IMAGES": images}
    constants = {**compile_time, "HAS_BIAS": call.bias is not None, "WITH_DU": with_du}
    groups = list(_groups(call, tiles, compile_time["BE"])) if with_du else [(0, 0, 0)]
    for first, count, slots in groups:
        group = {"FIRST": first, "COUNT": count, "SLOTS": slots, "WITH_DK": with_dk and first == 0}
        group |= {"SOFTMAX": call.softmax is not None and first == 0, "WITH_DV": wanted is not None}
        kernel = triton_kernels_sums.basis_attention_bwd_dkdu_kernel
        _launch(kernel, ranges * blocks, tiles, **arguments, **{**constants, **group})
    if with_du and call.u.dim() == 4:
        du = du.sum(0)  # a fixed order, so two runs agree to the bit
    return dk if with_dk else None, du if with_du else None


def _dbias(call: Call, bias: Tensor, run_time: dict[str, Any], compile_time: dict[str, Any]) -> Tensor:
    (B, H, M, _), N, tiles = call.q.shape, call.k.shape[2], call.tiles("dbias")
    blocks_m, blocks_n = triton.cdiv(M, tiles.queries), triton.cdiv(N, tiles.keys)
    over_m, over_n = bias.shape[2] == 1, bias.shape[3] == 1
    kept = (H, blocks_m if over_m else M, blocks_n if over_n else N)
    images = 1
    if bias.shape[0] == 1:
        images = _images_per_program(B, H * blocks_m * blocks_n, call.q.device)
        images = max(images, triton.cdiv(B, max(1, BIAS_NUMBERS // (kept[0] * kept[1] * kept[2]))))
    ranges = triton.cdiv(B, images)
    dbias = torch.empty(ranges, *kept, dtype=torch.float32, device=bias.device)
    arguments = {**run_time, "dbias": dbias, "s_dbias": dbias.stride(), "B": B, "IMAGES": images}
    constants = {**compile_time, "SUM_M": over_m, "SUM_N": over_n}
    kernel = triton_kernels_sums.basis_attention_bwd_dbias_kernel
    _launch(kernel, ranges * H * blocks_m * blocks_n, tiles, **arguments, **constants)
    return dbias.sum_to_size(bias.shape)
