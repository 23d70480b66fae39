"""The network, its slots and its weights."""

from glmix.models.description import Description
from glmix.models.glnet import MODEL_NAMES, GLNet
from glmix.models.load import (
    SHIPPED,
    backbone_of,
    build,
    check_name,
    config_of,
    create_model,
    load,
    load_body,
    names_model,
    network_of,
    parts_beside_body,
)

__all__ = [
    "MODEL_NAMES",
    "SHIPPED",
    "Description",
    "GLNet",
    "backbone_of",
    "build",
    "check_name",
    "config_of",
    "create_model",
    "load",
    "load_body",
    "names_model",
    "network_of",
    "parts_beside_body",
]
