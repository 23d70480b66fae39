"""Pytest plugin that makes timm's own tests see our models, where timm's lists are made at import.

Some of timm's tests list the timm modules whose models have `forward_intermediates`; ours is such a module too.
"""

from typing import Any

import timm

import glmix  # noqa: F401  (registers the variants)

_list_models = timm.list_models


def list_models(*filters: Any, module: Any = "", **options: Any) -> list[str]:
    return _list_models(*filters, module=[*module, "glnet"] if isinstance(module, list) else module, **options)


timm.list_models = list_models
