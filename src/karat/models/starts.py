"""How softmax attention's own weights start: `attn_init`, a rival explanation of what learnable attention gains.

A start sets queries, keys, values and projections of a ViT or DeiT and nothing else. Learnable attention in softmax's
place meets the scores that the start makes: what softmax turns into a map is then what the operator is given. Static
mixing, blind to scores, is started in its values and projections alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from karat.models.backbones import BACKBONES, AttentionSite, attention_sites, backbone_of

# Trockman & Kolter (arXiv 2305.09828): share of noise and of the identity, of W_q W_kᵀ and of W_v W_o.
QUERY_KEY, VALUE_OUT = (0.7, 0.7), (0.4, -0.4)
KERNEL = 3  # impulses lie in a neighbourhood of 3×3 (Zheng et al., arXiv 2404.01139)
# Positions' shares of a token's power that a shift is made to bear, in this order, until its map is within GOAL.
SHARES, GOAL, LEAST = (0.6, 0.8, 0.95, 0.99), 0.97, 0.9
BORDER = 8.0  # weight of queries whose key lies beyond the border: they should look nowhere in particular
SHARPNESS = torch.logspace(0, 4, 121, dtype=torch.float64)


def check_start(name: str) -> None:
    """Raise ValueError for a name that isn't in STARTS."""
    if name not in list(STARTS):  # a list of a configuration has no hash
        raise ValueError(f"unknown attn_init {name!r}; choose one of {', '.join(STARTS)}")


@torch.no_grad()
def start_attention(model: nn.Module, name: str) -> None:
    """Start the attention of a ViT or DeiT, before an operator is put into it, in one of these ways (STARTS).

    mimetic: W_q W_kᵀ ≈ 0.7 Z + 0.7 I for each head and W_v W_o ≈ 0.4 Z' − 0.4 I, Z of variance 1/C, by singular value
    decomposition (Trockman & Kolter 2023, arXiv 2305.09828).
    matched: the singular values of mimetic, each with directions at random: a control of its norms.
    impulse: each head is a shift of the image by a step drawn from the nine of a 3×3 neighbourhood, as softmax of the
    position embeddings' scores (Zheng et al., arXiv 2401.12511, 2404.01139, 2505.19985); values and projections stay.
    Images show it as far as position embeddings stand out of the patches' own: see `karat.models.positions`.

    Biases of what is set become zero. Does nothing on the meta device.

    Raises ValueError for another name or model, and for shifts that the embeddings or the heads' width don't allow.

    >>> import karat
    >>> model = karat.create_model("vit_tiny_patch16_224", img_size=32, depth=1, attn_init="mimetic")
    >>> q, k, _ = model.blocks[0].attn.qkv.weight.detach().unflatten(0, (3, 3, 64))[:, 0]
    >>> product = q.T @ k
    >>> bool(product.diagonal().mean() > 3 * product.std())
    True
    """
    check_start(name)
    sites = attention_sites(model)
    known = backbone_of(model) is BACKBONES[VisionTransformer]
    if not known or not sites or any(type(site.module) is not Attention for site in sites):
        raise ValueError(f"attn_init={name} starts the attention of a ViT or DeiT, and this is {type(model).__name__}")
    if not sites[0].module.qkv.weight.is_meta:
        STARTS[name](model, sites)


def position_maps(model: Any, site: AttentionSite) -> Tensor:
    """Softmax of the scores (H,N,N) that a block's attention gives position embeddings alone, N patches."""
    attn, tokens = site.module, _positions(model, site)
    qkv = attn.qkv(tokens.to(attn.qkv.weight.dtype)).unflatten(-1, (3, attn.num_heads, -1))
    q, k, _ = qkv.permute(1, 2, 0, 3).unbind(0)
    return (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale).softmax(-1)


def shifted(grid: tuple[int, int], dy: int, dx: int) -> Tensor:
    """The map (N,N) of a shift: query (y, x) looks at key (y + dy, x + dx), and at none where that isn't in the grid.

    >>> shifted((1, 3), 0, 1)
    tensor([[0., 1., 0.],
            [0., 0., 1.],
            [0., 0., 0.]], dtype=torch.float64)
    """
    rows, columns = (torch.eye(n + 2, dtype=torch.float64) for n in grid)
    moved = [
        eye.roll(step, 1)[1:-1, 1:-1] for eye, step in ((rows, dy), (columns, dx))
    ]  # the frame of one keeps what leaves from coming back
    return torch.kron(*moved)


def _mimetic(model: Any, sites: list[AttentionSite], directions: Callable[[Tensor], Tensor] = lambda u: u) -> None:
    """directions: what becomes of singular vectors, in columns."""

    def factors(shares: tuple[float, float], rank: int) -> tuple[Tensor, Tensor]:
        """L (C,rank) and R (C,rank) with L Rᵀ ≈ noise Z + identity I."""
        noise, identity = shares
        product = noise * torch.randn(width, width) / math.sqrt(width) + identity * torch.eye(width)
        left, sizes, right = torch.linalg.svd(product.to(device))
        root = sizes[:rank].sqrt()
        return directions(left[:, :rank]) * root, directions(right[:rank].T) * root

    for site in sites:
        attn = site.module
        device, width, heads = attn.qkv.weight.device, attn.qkv.in_features, attn.num_heads
        pairs = [factors(QUERY_KEY, attn.qkv.out_features // 3 // heads) for _ in range(heads)]
        _write(attn.qkv, 0, [left for left, _ in pairs])
        _write(attn.qkv, 1, [right for _, right in pairs])
        values, out = factors(VALUE_OUT, attn.proj.in_features)
        _write(attn.qkv, 2, [values])
        attn.proj.weight.copy_(out)
        if attn.proj.bias is not None:
            nn.init.zeros_(attn.proj.bias)


def _matched(model: Any, sites: list[AttentionSite]) -> None:
    _mimetic(model, sites, lambda vectors: nn.init.orthogonal_(torch.empty(vectors.shape)).to(vectors.device))


def _impulse(model: Any, sites: list[AttentionSite]) -> None:
    grid, reach = tuple(model.patch_embed.grid_size), KERNEL // 2
    found: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for site in sites:
        attn = site.module
        if not isinstance(attn.q_norm, nn.Identity):
            raise ValueError("attn_init=impulse sets the scores, which this model's norms of queries and keys undo")
        width = attn.qkv.out_features // 3 // attn.num_heads
        steps = [tuple(pair) for pair in torch.randint(-reach, reach + 1, (attn.num_heads, 2)).tolist()]
        for dy, dx in steps:
            if (dy, dx, width) not in found:  # blocks start alike, and so do their norms
                found[dy, dx, width] = _shift(_positions(model, site), shifted(grid, dy, dx), width, attn.scale)
        for part in (0, 1):
            _write(attn.qkv, part, [found[dy, dx, width][part] for dy, dx in steps])


def _shift(tokens: Tensor, target: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """W_q, W_k (C,rank) with softmax(scale · X W_q (X W_k)ᵀ) ≈ target, for tokens X (N,C) of positions alone.

    Of a token √share is position, the rest, the patch's content, is taken as noise n. The least squares
    Σ (x W_q W_kᵀ x' − T)² over positions and noise have a closed form: with G the second moment of what queries see
    and G' that of keys, W_q W_kᵀ = G^−½ [G^−½ Xᵀ T X G'^−½]_rank G'^−½. The sharpness is the least that is near
    enough to the target.

    Raises ValueError where no share brings the map within LEAST of the target.
    """
    X, T = tokens.double(), target.to(tokens.device)
    inside = T.sum(1) > 0
    best = (-1.0, X, X)
    for share in SHARES:
        noise = (1 - share) * X.square().sum() / X.shape[1] * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
        weights = torch.where(inside, 1.0, BORDER).to(X.dtype)
        of_queries = _inverse_root(share * (X.T * weights) @ X + noise)
        of_keys = _inverse_root(share * X.T @ X + noise)
        left, sizes, right = torch.linalg.svd(of_queries @ (X.T @ (T - T.mean(1, keepdim=True)) @ X) @ of_keys)
        root = sizes[:rank].sqrt()
        Wq, Wk = of_queries @ left[:, :rank] * root, of_keys @ right[:rank].T * root
        scores = (X @ Wq)[inside] @ (X @ Wk).T
        scores = scores / scores.std()
        near = torch.stack([_correlation((c * scores).softmax(-1), T[inside]) for c in SHARPNESS.tolist()])
        place = int((near >= GOAL).int().argmax()) if bool((near >= GOAL).any()) else int(near.argmax())
        if near[place] > best[0]:
            size = (SHARPNESS[place].item() / float(((X @ Wq)[inside] @ (X @ Wk).T).std()) / scale) ** 0.5
            best = (float(near[place]), Wq * size, Wk * size)
        if best[0] >= GOAL:
            break
    if best[0] < LEAST:
        raise ValueError(
            f"attn_init=impulse: heads of width {rank} over {len(X)} patches can't be shifts of the position "
            f"embeddings (correlation {best[0]:.2f}); take fewer heads or larger patches"
        )
    return best[1], best[2]


def _positions(model: Any, site: AttentionSite) -> Tensor:
    """Position embeddings of the patches (N,C) as a block's queries and keys meet them: after its norm."""
    embedding = getattr(model, "pos_embed", None)
    if not isinstance(embedding, nn.Parameter) or embedding.ndim != 3:
        raise ValueError(
            "attn_init=impulse needs position embeddings that are added to the patches, and there are none"
        )
    block = model.get_submodule(site.name.rpartition(".")[0])
    patches: Tensor = embedding[0, -int(model.patch_embed.num_patches) :]
    return block.norm1(patches) if isinstance(block, Block) else patches


def _write(qkv: nn.Linear, part: int, heads: list[Tensor]) -> None:
    """Maps (C,D) of each head as queries (0), keys (1) or values (2), without bias."""
    rows = torch.cat([head.T for head in heads])
    qkv.weight.unflatten(0, (3, -1))[part].copy_(rows)
    if qkv.bias is not None:
        nn.init.zeros_(qkv.bias.unflatten(0, (3, -1))[part])


def _inverse_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.rsqrt() @ vectors.T


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity((a - a.mean()).flatten(), (b - b.mean()).flatten(), dim=0)


# A new start is one line here.
STARTS: dict[str, Callable[[Any, list[AttentionSite]], None]] = {
    "mimetic": _mimetic,
    "impulse": _impulse,
    "matched": _matched,
}
