"""torchvision's Mask R-CNN on a pyramid around a plain ViT, with the settings of SPEC §3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from karat.detect.pyramid import LEVELS, SCALES, SimpleFeaturePyramid, as_float
from karat.detect.recipes import DetectRecipe
from karat.detect.settings import DetectSettings
from karat.detect.trunk import Trunk, create_trunk

ANCHORS = (32, 64, 128, 256, 512)  # one size a level, p2 to p6
RATIOS = (0.5, 1.0, 2.0)
Targets = list[dict[str, Tensor]]


class _AsGiven(GeneralizedRCNNTransform):
    """Normalises and pads; images come in the size in which they are to be seen."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def roi_pool(output_size: int, stride: int) -> MultiScaleRoIAlign:
    """Pools regions from p2 to p5 above a trunk of that stride, a power of two of at least 4.

    torchvision takes the scales from the largest image of the first batch that it sees, without its padding, and
    keeps them: wrong where all of them are padded, and another thing in a resumed run. They are constants here.
    """
    pool = MultiScaleRoIAlign(list(LEVELS[:4]), output_size=output_size, sampling_ratio=2)
    pool.scales = [scale / stride for scale in SCALES]
    lowest = stride.bit_length() - 3  # log2(stride / 4)
    pool.map_levels = initLevelMapper(lowest, lowest + 3, pool.canonical_scale, pool.canonical_level)
    return pool


def _norm(recipe: DetectRecipe) -> type[nn.Module] | None:
    return LayerNorm2d if recipe.head_norm else None


def _box_head(recipe: DetectRecipe) -> nn.Module:
    """Regions (n,channels,7,7) -> (n,head_width): two layers, or convolutions and one layer (4conv1fc in ViTDet)."""
    if not recipe.box_convs:
        return TwoMLPHead(recipe.channels * 7**2, recipe.head_width)
    convs = [recipe.channels] * recipe.box_convs
    return FastRCNNConvFCHead((recipe.channels, 7, 7), convs, [recipe.head_width], _norm(recipe))


class Detector(MaskRCNN):
    """Mask R-CNN whose backbone knows where the padding is.

    In training, forward gives torchvision's five losses by name; in evaluation boxes (n,4), labels (n,), scores (n,)
    and masks (n,1,height,width) of each image, in pixels of `sizes`.
    """

    def __init__(self, backbone: SimpleFeaturePyramid, num_classes: int, recipe: DetectRecipe) -> None:
        channels, side = backbone.out_channels, recipe.img_size
        trunk: Any = backbone.trunk
        stride = int(trunk.stride)
        super().__init__(
            backbone,
            None,  # the predictors below say it; the background is class 0
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in ANCHORS), (RATIOS,) * len(ANCHORS)),
            rpn_pre_nms_top_n_train=recipe.pre_nms[0],
            rpn_pre_nms_top_n_test=recipe.pre_nms[1],
            rpn_post_nms_top_n_train=recipe.post_nms[0],
            rpn_post_nms_top_n_test=recipe.post_nms[1],
            rpn_nms_thresh=0.7,
            rpn_batch_size_per_image=recipe.rpn_anchors,
            box_roi_pool=roi_pool(7, stride),
            box_head=_box_head(recipe),
            box_predictor=FastRCNNPredictor(recipe.head_width, num_classes + 1),
            box_score_thresh=0.05,
            box_nms_thresh=0.5,
            box_detections_per_img=100,
            box_fg_iou_thresh=0.5,
            box_bg_iou_thresh=0.5,
            box_batch_size_per_image=recipe.rois,
            mask_roi_pool=roi_pool(14, stride),
            mask_head=MaskRCNNHeads(channels, (channels,) * recipe.mask_convs, 1, norm_layer=_norm(recipe)),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
            rpn_head=RPNHead(channels, len(RATIOS), recipe.rpn_convs),
        )
        self.img_size = side
        self.transform = _AsGiven(side, side, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD), side)

    def forward(
        self, images: list[Tensor], targets: Targets | None = None, sizes: Sequence[tuple[int, int]] | None = None
    ) -> Any:
        """Losses by name in training, detections of each image in evaluation.

        Args:
            images: (3,height,width) each, in [0, 1], no side above img_size; they are padded to a square.
            targets: for training, of each image: boxes (n,4) as x1 y1 x2 y2, labels (n,) from 1, masks (n,h,w) uint8.
            sizes: (height, width) in whose pixels to give detections; None: those of the images.

        Raises ValueError for an image that is too large, or training without targets.
        """
        if self.training and targets is None:
            raise ValueError("training needs targets: give them, or call eval() first")
        for image in images:
            if max(image.shape[-2:]) > self.img_size:
                raise ValueError(f"an image of {tuple(image.shape[-2:])} pixels exceeds img_size={self.img_size}")
        given = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch, targets = self.transform(images, targets)
        maps = as_float(self.backbone(batch.tensors, batch.image_sizes))
        # proposals and heads in full precision: boxes, their overlaps and losses suffer from less
        with torch.autocast(batch.tensors.device.type, enabled=False):
            proposals, proposal_losses = self.rpn(batch, maps, targets)
            found, box_losses = self.roi_heads(maps, proposals, batch.image_sizes, targets)
            if self.training:
                return {**proposal_losses, **box_losses}
            return self.transform.postprocess(found, batch.image_sizes, list(sizes or given))

    @property
    def trunk(self) -> Trunk:
        """The ViT."""
        return self.backbone.trunk

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's activations in the backward pass."""
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """The parameters that aren't decayed: the ViT's position embeddings and operators, and relative positions."""
        listed = {f"backbone.trunk.vit.{name}" for name in self.trunk.vit.no_weight_decay()}
        return listed | {name for name, _ in self.named_parameters() if ".rel_pos_" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: embeddings, blocks; what matches neither lies above them."""
        vit = r"^backbone\.trunk\.vit\."
        stem = vit + r"(?:pos_embed|patch_embed|karat_operator)"
        return {"stem": stem, "blocks": vit + r"blocks\.(\d+)"}


def build_detector(settings: DetectSettings, num_classes: int) -> Detector:
    """The detector that settings describe, initialised from torch's present random state.

    Raises ValueError for a patch size that is no power of two of at least 4, or an image of fewer than 2x2 patches.
    """
    recipe = settings.recipe
    trunk = create_trunk(
        settings.model,
        settings.attention,
        img_size=recipe.img_size,
        window=settings.window,
        whole=settings.global_blocks,
        relative=settings.recipe.rel_pos,
        **settings.model_kwargs(),
    )
    patch, side = trunk.stride, recipe.img_size
    if patch < 4 or patch & (patch - 1):
        raise ValueError(
            f"patch size {patch}: a detector takes 4, 8, 16, 32, ..., so that every level has a whole stride"
        )
    if side < 2 * patch:
        raise ValueError(
            f"img_size={side} is a single patch of {patch} pixels; the pyramid's coarse levels need {2 * patch} or more"
        )
    return Detector(SimpleFeaturePyramid(trunk, recipe.channels), num_classes, recipe)
