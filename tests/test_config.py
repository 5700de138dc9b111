"""Short names of attention, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karat import KArAtConfig
from karat.basis import BASES
from karat.config_checks import BASES_OF_SCORES, EDGE_SCALES, INITS, RESIDUALS, SHARINGS


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("g3b", {}),
        ("g1u", {"basis": "fourier(grid=1)", "sharing": "universal"}),
        ("dog-b", {"basis": "dog"}),
        ("bspline(grid=10,order=3)-u", {"basis": "bspline(grid=10,order=3)", "sharing": "universal"}),
        ("g3b,rank=4,order=PhiW,residual=softmax", {"rank": 4, "order": "PhiW", "residual": "softmax"}),
        ("g3b,rank=None", {"rank": None}),
        ("g3b,softmax_heads=(0,2),blocks=(1,)", {"softmax_heads": (0, 2), "blocks": (1,)}),
        ("g3b,edge_scales=published", {"edge_scales": "published"}),
        ("g3b, edge_scales = True", {"edge_scales": True}),
        ("softmax", {"basis": "softmax"}),
    ],
)
def test_names_mean_settings(name: str, settings: dict) -> None:
    config = KArAtConfig.parse(name)
    assert config == KArAtConfig(**settings)
    assert KArAtConfig.parse(str(config)) == config
    assert KArAtConfig.parse(config) is config


def test_short_names_stay_short() -> None:
    assert [str(KArAtConfig.parse(name)) for name in ("g3b", "g1u", "dog-b", "softmax")] == [
        "g3b",
        "g1u",
        "dog-b",
        "softmax",
    ]


@given(
    basis=st.sampled_from([*BASES, "fourier(grid=7)", "morlet(omega=2.5)"]),
    rank=st.integers(1, 99),
    order=st.sampled_from(["WPhi", "PhiW", "PhiPhi"]),
    sharing=st.sampled_from(SHARINGS),
    base=st.sampled_from(BASES_OF_SCORES),
    edge_scales=st.sampled_from(EDGE_SCALES),
    softmax_heads=st.one_of(st.integers(0, 5), st.lists(st.integers(0, 9), unique=True).map(tuple)),
    blocks=st.one_of(st.none(), st.lists(st.integers(0, 9), unique=True).map(tuple)),
    residual=st.sampled_from(RESIDUALS),
    init=st.sampled_from(INITS),
)
def test_every_configuration_parses_back(**settings: object) -> None:
    config = KArAtConfig(**settings)
    assert KArAtConfig.parse(str(config)) == config


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("g3", "can't read the attention 'g3'"),
        ("g0b", "grid must be a whole number >= 1, got 0"),
        ("sofmax", "can't read the attention"),
        ("nope-b", "unknown basis 'nope'"),
        ("g3b,rank=0", "rank must be a whole number >= 1"),
        ("g3b,rank=2.5", "rank must be"),
        ("g3b,ranks=2", "can't read the option 'ranks=2'"),
        ("g3b,order=WW", "unknown order 'WW'; choose one of WPhi, PhiW, PhiPhi"),
        ("g3b,sharing=both", "can't read the option"),
        ("g3b,base=tanh", "unknown base 'tanh'"),
        ("g3b,simplex=col", "unknown simplex 'col'"),
        ("g3b,rank=None,order=PhiW", "the full operator, has no W"),
        ("g3b,rank=None,simplex=rank", "use 'row'"),
        ("g3b,softmax_heads=-1", "none of them negative"),
        ("g3b,softmax_heads=(1,1)", "names an index twice"),
        ("g3b,blocks=(-1,)", "none of them negative"),
        ("g3b,blocks=3", "blocks must be indices"),
        ("g3b,impl=fast", "unknown impl 'fast'"),
        ("silu+fourier(grid=3)-b,base=gelu", "base='gelu' is another: write it once"),
    ],
)
def test_bad_names_say_what_to_do(name: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        KArAtConfig.parse(name)
    assert says in str(error.value)


def test_bad_sharing() -> None:
    with pytest.raises(ValueError, match="unknown sharing 'each'; choose one of blockwise, universal"):
        KArAtConfig(sharing="each")
