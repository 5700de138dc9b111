"""`karat.models.kan` under its old path."""

from karat.models.kan import (
    MLPS,
    PEERS,
    RBF,
    FourierLinear,
    GroupRational,
    KANClassifier,
    RBFLinear,
    SplineLinear,
    create_deep_kan,
    group_rational,
    parse_mlp,
    replace_mlp,
)

__all__ = [
    "MLPS",
    "PEERS",
    "RBF",
    "FourierLinear",
    "GroupRational",
    "KANClassifier",
    "RBFLinear",
    "SplineLinear",
    "create_deep_kan",
    "group_rational",
    "parse_mlp",
    "replace_mlp",
]
