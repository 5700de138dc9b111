"""Short names of attention, both ways."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from karat import KArAtConfig
from karat.basis import BASES
from karat.operator.config import ALIASES
from karat.operator.rules import CHOICES
from karat.runs.classification import Settings


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
        (
            "softmax,position_bias=relative,blocks=first",
            {"basis": "softmax", "position_bias": "relative", "blocks": "first"},
        ),
        ("static-u", {"basis": "static", "sharing": "universal"}),
        ("static-b,rank=None,residual=softmax", {"basis": "static", "rank": None, "residual": "softmax"}),
        ("g3b,residual=softmax,gate=1,init_scale=0", {"residual": "softmax", "gate": 1.0, "init_scale": 0.0}),
        ("g6b,rank=None,order=Pointwise", {"basis": "fourier(grid=6)", "rank": None, "order": "Pointwise"}),
        ("g3b,position=query", {"position": "query"}),
        ("g3b,rank=2,rank=4", {"rank": 4}),
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
    sharing=st.sampled_from(CHOICES["sharing"]),
    base=st.sampled_from(CHOICES["base"]),
    edge_scales=st.sampled_from(CHOICES["edge_scales"]),
    softmax_heads=st.one_of(st.integers(0, 5), st.lists(st.integers(0, 9), unique=True).map(tuple)),
    blocks=st.one_of(st.none(), st.lists(st.integers(0, 9), unique=True).map(tuple)),
    residual=st.sampled_from(CHOICES["residual"]),
    init=st.sampled_from(CHOICES["init"]),
)
def test_every_configuration_parses_back(**settings: object) -> None:
    config = KArAtConfig(**settings)
    assert KArAtConfig.parse(str(config)) == config


numbers = st.floats(0, 4, allow_nan=False).filter(lambda x: x == 0 or x > 1e-300)
anywhere = {
    "blocks": st.one_of(st.none(), st.just("first"), st.lists(st.integers(0, 9), unique=True).map(tuple)),
    "position_bias": st.sampled_from(CHOICES["position_bias"]),
}
operators = {
    **anywhere,
    "softmax_heads": st.one_of(st.integers(0, 5), st.lists(st.integers(0, 9), unique=True).map(tuple)),
    "sharing": st.sampled_from(CHOICES["sharing"]),
    "gate": st.one_of(st.just("head"), numbers.filter(lambda x: x != 0)),
    "init": st.sampled_from(CHOICES["init"]),
    "init_scale": numbers,
}
edges = {
    **operators,
    "basis": st.sampled_from([*BASES, "morlet(omega=2.5)"]),
}
FAMILIES = {
    "softmax": anywhere | {"basis": st.just("softmax")},
    "static": operators | {"basis": st.just("static"), "rank": st.one_of(st.none(), st.integers(1, 99))},
    "low rank": edges
    | {"rank": st.integers(1, 99), "position": st.sampled_from(CHOICES["position"])}
    | {"simplex": st.sampled_from([choice for choice in CHOICES["simplex"] if choice != "row"])},
    "other orders": edges | {"order": st.sampled_from(["PhiW", "PhiPhi"])},
    "pointwise": edges | {"order": st.just("Pointwise"), "rank": st.none()},
    "pointwise with places": edges
    | {"order": st.just("Pointwise"), "rank": st.integers(1, 99), "position": st.just("query")},
}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_every_variant_parses_back(family: str, data: st.DataObject) -> None:
    settings = data.draw(st.fixed_dictionaries(FAMILIES[family]))
    if family == "softmax":
        assume(settings["blocks"] is None or settings["position_bias"] is not None)
    else:
        assume(settings["init_scale"] > 0 or settings["gate"] != "head")
    config = KArAtConfig(**settings, residual="softmax" if "gate" in settings else None)
    assert KArAtConfig.parse(str(config)) == config


@pytest.mark.parametrize("name", ALIASES)
def test_a_recommendation_is_written_out(name: str) -> None:
    config = KArAtConfig.parse(name)
    assert str(config) == str(KArAtConfig.parse(ALIASES[name]))
    assert KArAtConfig.explicit(name) == str(config)
    assert KArAtConfig.explicit("g3b, rank = 4") == "g3b, rank = 4"
    assert KArAtConfig.parse(f"{name},rank=5") == KArAtConfig.parse(f"{ALIASES[name]},rank=5")
    assert Settings.make(attention=name).attention == str(config)


@pytest.mark.parametrize("setting", CHOICES)
def test_unknown_values_are_named(setting: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {setting} 'nothing'; choose one of .*{CHOICES[setting][-1]}"):
        KArAtConfig(**{setting: "nothing"})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("g3", "or recommended; then options"),
        ("g3b,gate=0.5", "gate=0.5 belongs beside softmax: add residual='softmax'"),
        ("g3b,residual=softmax,gate=row", "unknown gate 'row'; choose head, or a number"),
        ("g3b,residual=softmax,gate=nan", "unknown gate 'nan'"),
        ("g3b,residual=softmax,gate=True", "unknown gate True"),
        ("g3b,blocks=middle", "unknown blocks 'middle'; choose first, or indices"),
        ("g3b,init_scale=-1", "init_scale must be a number >= 0, got -1.0"),
        ("g3b,init_scale=big", "init_scale must be a number >= 0, got 'big'"),
        ("g3b,init_scale=2,simplex=row", "gives rows of sum one whatever their size"),
        ("g3b,init_scale=0,rank=None,base=silu", "edge_scales=True makes its size learnable"),
        ("silu+dog-b,init_scale=2,order=PhiW", "edge_scales=True makes its size learnable"),
        ("g3b,order=Pointwise", "no rank: write rank=None, not 12"),
        ("g3b,order=Pointwise,rank=None,position=query", "is static mixing: give its rank"),
        ("g3b,order=PhiW,position=query", "position=query acts on the R sums before W"),
        ("g3b,rank=None,position=query", "it needs order='WPhi' and a rank"),
        ("static", "can't read the attention 'static'"),
        ("static-b,rank=0", "rank must be a whole number >= 1"),
        ("static-b,base=silu", "base=silu is about edge functions of the scores; static mixing has none"),
        ("static-b,order=Pointwise,rank=None", "order=Pointwise is about edge functions"),
        ("static-b,position=query", "position=query is about edge functions"),
        ("row-b", "a row that all queries share has no rank: write rank=None"),
        ("static-b,simplex=rank", "static mixing is blind to them: use 'row'"),
        ("softmax,position=query", "position=query shapes an operator, and softmax has none"),
        ("softmax,residual=softmax", "residual=softmax shapes an operator"),
        ("softmax,rank=4", "rank=4 shapes an operator"),
        ("softmax,order=PhiW", "order=PhiW shapes an operator"),
        ("softmax,simplex=row", "simplex=row shapes an operator"),
        ("softmax,softmax_heads=1", "softmax_heads=1 shapes an operator"),
        ("softmax,position_bias=relative,softmax_heads=1", "softmax_heads=1 shapes an operator"),
        ("softmax-u", "sharing=universal shapes an operator"),
        ("softmax,init=paper", "init=paper shapes an operator"),
        ("softmax,impl=tiled", "impl=tiled shapes an operator"),
        ("softmax,blocks=first", "softmax learns nothing: name a basis, e.g. g3b, or add position_bias='relative'"),
        ("static-b,position_bias=relative", "can't learn: static mixing is blind to the scores; add residual="),
        ("g3b,residual=softmax,gate=0", "gate=0 silences the operator for good: gate='head' starts at zero and"),
        ("g3b,residual=softmax,init_scale=0", "neither gets a gradient from the other; fix the gate (gate=1)"),
        ("g3", "can't read the attention 'g3'"),
        ("g0b", "grid must be a whole number >= 1, got 0"),
        ("sofmax", "can't read the attention"),
        (None, "None is no name; write text"),
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


@pytest.mark.parametrize(
    "name",
    [
        "static-b,position_bias=relative,residual=softmax",
        "static-b,position_bias=relative,softmax_heads=1",
        "g3b,position_bias=relative",
        "g3b,init_scale=0",
        "g3b,residual=softmax,gate=-1,init_scale=0",
    ],
)
def test_what_can_learn_is_taken(name: str) -> None:
    config = KArAtConfig.parse(name)
    assert KArAtConfig.parse(str(config)) == config


@pytest.mark.parametrize("name", ["softmax", "static-b"])
def test_no_edges_no_basis(name: str) -> None:
    with pytest.raises(ValueError, match="has no basis; name one"):
        _ = KArAtConfig.parse(name).edge_basis


def test_bad_sharing() -> None:
    with pytest.raises(ValueError, match="unknown sharing 'each'; choose one of blockwise, universal"):
        KArAtConfig(sharing="each")


GONE = {
    "score_gradient": 0.0,
    "input": "probabilities",
    "normalise": "rms",
    "position": "gain",
    "gate": "block",
    "blocks": "last",
}


@pytest.mark.parametrize("name", GONE)
def test_what_is_gone_is_refused(name: str) -> None:
    says = rf"{name}.* is gone since version 0.2: no published result uses it; leave it out"
    with pytest.raises(ValueError, match=says):
        KArAtConfig.parse(f"g3b,residual=softmax,{name}={GONE[name]}")
    with pytest.raises(ValueError, match=says):
        KArAtConfig(residual="softmax", **{name: GONE[name]})


def test_what_is_gone_loads_where_it_said_nothing() -> None:
    config = KArAtConfig.parse("g3b,rank=4")
    assert KArAtConfig.parse("g3b,rank=4,score_gradient=1,input=scores,normalise=None") == config
    assert KArAtConfig(**asdict(config), score_gradient=1.0, input="scores", normalise=None) == config
