"""How a detector is trained: optimiser, view of the images, proposals and heads, with the source of each value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from karat.runs.optimisation import Optimisation
from karat.values import Count, Low2High, Natural, OneOf, Positive, Probability

VIEWS = ("stretch", "pad")


@dataclass(frozen=True)
class DetectRecipe(Optimisation):
    """Hyper-parameters of one detector's training. `lr` is the peak rate itself, whatever the batch.

    Views: "stretch" brings an image to S×S pixels whatever its shape; "pad" scales it so that it fits into S×S and pads
    the rest, in training after scaling by a factor from `jitter` and cropping what is too large (large-scale jitter,
    Ghiasi et al., arXiv 2012.07177). Raises ValueError for a value outside its range.
    """

    # images
    img_size: Count = 224
    """Side of the input images in pixels, a multiple of the patch size."""
    view: Annotated[str, OneOf(VIEWS)] = "stretch"
    """stretch: to a square, whatever the shape; pad: the shape is kept, the rest of the square is padding."""
    jitter: Annotated[tuple[Positive, Positive], Low2High] = (1.0, 1.0)
    """Under view pad: range of the random factor by which a training image is scaled beyond fitting."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    repeat: Count = 1
    """How often an epoch sees each training image; more for small data."""
    # proposals
    pre_nms: tuple[Count, Count] = (12000, 6000)
    """Proposals per level before suppression, in training and in evaluation."""
    post_nms: tuple[Count, Count] = (2000, 1000)
    """Proposals per image after suppression, in training and in evaluation."""
    rpn_anchors: Count = 256
    """Anchors per image that the proposals' loss looks at."""
    rois: Count = 512
    """Regions per image that the heads train on."""
    # trunk and heads
    rel_pos: bool = False
    """Relative positions added to the scores."""
    channels: Count = 256
    """Channels of the pyramid and of the heads' convolutions."""
    rpn_convs: Count = 1
    """Convolutions of the proposals' head."""
    box_convs: Natural = 0
    """Convolutions of the box head before its one layer; 0: two layers and no convolution."""
    head_width: Count = 1024
    """Width of the box head's layers."""
    mask_convs: Count = 4
    """Convolutions of the mask head."""
    head_norm: bool = False
    """Layer normalisation after each convolution of the box and the mask head."""


PUBLISHED = DetectRecipe(
    # arXiv 2503.10632, Table 11: 224², batch 32, 184,375 iterations (50 epochs of COCO's 118,287 training images),
    # AdamW 1e-4, ε 1e-6, weight decay 0.1, warm-up, horizontal flip. Betas, the warm-up's 250 iterations (0.07 epochs)
    # and the rate's two tenfold drops (at 8/9 and 26/27) are ViTDet's, which the paper builds on.
    lr=1e-4,
    opt_eps=1e-6,
    weight_decay=0.1,
    clip_grad=None,
    sched="multistep",
    epochs=50,
    warmup_epochs=0.07,
    warmup_lr=1e-7,
    min_lr=0.0,
    batch_size=32,
)

JITTER = PUBLISHED.override(
    # ViTDet's own (arXiv 2203.16527 and detectron2's projects/ViTDet): square images padded, scale jitter 0.1 to 2,
    # layer-wise decay of the rate, drop path 0.1; 100 epochs of batch 64; relative positions, two convolutions for
    # proposals, a box head of four convolutions and one layer, normalised as the mask head's are. At 1024² there;
    # --img-size 512 is the cheaper half.
    img_size=1024,
    view="pad",
    jitter=(0.1, 2.0),
    layer_decay=0.7,
    drop_path=0.1,
    clip_grad=1.0,
    epochs=100,
    batch_size=64,
    rel_pos=True,
    rpn_convs=2,
    box_convs=4,
    head_norm=True,
)

SMALL = PUBLISHED.override(
    # Ours: a few dozen photographs and two cores. Few proposals and regions, narrow heads, a high rate.
    lr=5e-4,
    opt_eps=1e-8,
    weight_decay=0.05,
    clip_grad=1.0,
    sched="cosine",
    epochs=20,
    warmup_epochs=0.5,
    min_lr=1e-5,
    batch_size=2,
    repeat=8,
    pre_nms=(400, 400),
    post_nms=(200, 100),
    rpn_anchors=128,
    rois=48,
    channels=96,
    head_width=256,
    mask_convs=2,
)

RECIPES: dict[str, DetectRecipe] = {"published": PUBLISHED, "jitter": JITTER, "small": SMALL}


def get_recipe(name: str) -> DetectRecipe:
    """The preset of that name. Raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the presets for detection are {', '.join(RECIPES)}")
    return RECIPES[name]
