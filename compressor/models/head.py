"""The last layer of a classifier: which it is, and one of another size in its place."""

from __future__ import annotations

from torch import nn


def head_of(model: nn.Module) -> str | None:
    """The name of the last linear layer, or of the last 1x1 convolution where there is none (SqueezeNet)."""
    linear: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        return linear[-1]
    convs: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    return convs[-1] if convs else None


def replace_head(model: nn.Module, num_classes: int) -> int | None:
    """Put a fresh layer of `num_classes` outputs in the head's place, in situ.

    Returns:
        The outputs of the old head, or None where it fitted or none was found (nothing is changed then).
    """
    name = head_of(model)
    if not name:
        return None
    old = model.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Linear) and old.out_features != num_classes:
        outputs = old.out_features
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d) and old.out_channels != num_classes:
        outputs = old.out_channels
        new = nn.Conv2d(old.in_channels, num_classes, 1, stride=old.stride, bias=old.bias is not None)  # type: ignore[arg-type]
    else:
        return None
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.to(next(old.parameters()).dtype))
    return outputs
