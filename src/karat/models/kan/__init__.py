"""Kolmogorov-Arnold layers for the MLP, and the peers built from them."""

from karat.models.kan.classifier import KANClassifier
from karat.models.kan.mlp import MLPS, parse_mlp, replace_mlp
from karat.models.kan.peers import PEERS, create_deep_kan
from karat.models.kan.rational import GroupRational, PublishedRational, group_rational
from karat.models.kan.spline import SplineLinear
from karat.models.kan.waves import RBF, FourierLinear, RBFLinear

__all__ = [
    "MLPS",
    "PEERS",
    "RBF",
    "FourierLinear",
    "GroupRational",
    "KANClassifier",
    "PublishedRational",
    "RBFLinear",
    "SplineLinear",
    "create_deep_kan",
    "group_rational",
    "parse_mlp",
    "replace_mlp",
]
