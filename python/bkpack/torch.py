"""Packed models in PyTorch.

    model = transformers.AutoModelForCausalLM.from_config(config)
    with bkpack.open("model.bkpack") as packed:
        bkpack.torch.load_state_dict(model, packed)     # dequantized weights, copied into the model
        bkpack.torch.replace_linears(model, packed)     # or: linear layers that keep their weights packed

Weights are dequantized in float32 exactly as the native kernels do, bit for bit, and then converted to the type in use.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import nn

from ._errors import BkpackError
from ._model import Model, Tensor

__all__ = ["LoadResult", "PackedLinear", "load_state_dict", "replace_linears"]


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed and is dequantized for each call, on any device.

    Its buffers share the memory of the packed file's map, until the module is moved to another device; like the map they
    are read-only, and must not be written to. They hold bit patterns as integers, so that `half()` and the like leave
    them alone; the result has the type of the input.

    Buffers: `weight_packed` uint8 `[out_features, bytes]`, `weight_scale` int16 or int32 `[out_features, groups]`, the
    bits of F16 or F32, and for zero points `weight_zero_point` uint8 `[out_features, bytes]`. The parameter `bias` is
    float, and a copy.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: Optional[torch.Tensor]

    def __init__(self, weight: Tensor, bias: Optional[torch.Tensor] = None):
        super().__init__()
        kind = weight.encoding_dict["kind"]
        if kind == "float" or len(weight.shape) != 2:
            raise BkpackError(f"{weight.name}: {weight.encoding} of shape {list(weight.shape)} is no quantized matrix")
        self.encoding = weight.encoding
        self.out_features, self.in_features = weight.shape
        self._kind = kind
        self._group_size: int = min(weight.encoding_dict["group_size"], self.in_features)
        self._bits: int = weight.encoding_dict.get("bits", 1)
        self._scale_type = torch.float16 if weight.encoding_dict["scale"] == "F16" else torch.float32
        self.register_buffer("weight_packed", _shared(weight.codes.view(np.uint8)))
        scale = weight.scale
        self.register_buffer("weight_scale", _shared(scale.view(np.int16 if scale.itemsize == 2 else np.int32)))
        zero_point = weight.zero_point
        self.register_buffer("weight_zero_point", None if zero_point is None else _shared(zero_point.view(np.uint8)))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight, `[out_features, in_features]`."""
        if self._kind == "ternary":
            level = _ternary(self.weight_packed, self.in_features)
        elif self._kind == "binary":
            level = 2 * _unpack(self.weight_packed, 1, self.in_features) - 1
        else:
            level = _unpack(self.weight_packed, self._bits, self.in_features)
            if self.weight_zero_point is None:
                level -= 2 ** (self._bits - 1)
            else:
                level -= self._by_column(_unpack(self.weight_zero_point, self._bits, self.weight_scale.shape[1]))
        scale = self.weight_scale.view(self._scale_type).float()
        return level.float().mul_(self._by_column(scale)).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.dequantize(input.dtype), bias)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, encoding={self.encoding!r}"

    def _by_column(self, groups: torch.Tensor) -> torch.Tensor:
        """[rows, groups] -> [rows, columns]"""
        return groups.repeat_interleave(self._group_size, dim=1)[:, : self.in_features]


class LoadResult(NamedTuple):
    """What `load_state_dict` could not match."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_state_dict(module: nn.Module, packed: Model, strict: bool = True) -> LoadResult:
    """Copies the dequantized weights of a packed model into a module, tensor by tensor, in the module's own types.

    A weight that the module ties to another (a head to the embedding) is loaded with it. Weights that are `PackedLinear`
    already are left alone.

    Raises `BkpackError` for a shape that differs and, if `strict`, for tensors that only one of the two has; nothing is
    changed then.
    """
    state = module.state_dict(keep_vars=True)
    prefixes = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, PackedLinear))
    targets = {name: value for name, value in state.items() if not _is_packed(name, prefixes)}
    held = {id(targets[name]) for name in packed if name in targets}
    missing = [name for name, value in targets.items() if id(value) not in held]
    unexpected = [name for name in packed if name not in targets and not _is_packed(name, prefixes)]
    for name in packed:
        if name in targets:
            _check_shape(packed, packed[name], targets[name])
    if strict and (missing or unexpected):
        told = [f"it lacks {', '.join(missing)}"] if missing else []
        told += [f"the module lacks {', '.join(unexpected)}"] if unexpected else []
        raise BkpackError(f"{packed.path}: does not fit the module: {'; '.join(told)}")
    with torch.no_grad():
        for name in packed:
            if name in targets:
                targets[name].copy_(torch.from_numpy(packed[name].dequantize()))
    return LoadResult(missing, unexpected)


def replace_linears(module: nn.Module, packed: Model) -> list[str]:
    """Replaces each `nn.Linear` whose weight is quantized in the packed model by a `PackedLinear`; returns their names.

    Everything else keeps its weights: load them with `load_state_dict`, before or after.
    """
    linears = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    weights = {name: packed.get(f"{name}.weight") for name, _ in linears}
    linears = [(name, child) for name, child in linears if weights[name] and weights[name].codes is not None]
    for name, child in linears:
        _check_shape(packed, weights[name], child.weight)
    for name, child in linears:
        bias: Any = child.bias
        if bias is not None and f"{name}.bias" in packed:
            bias = torch.from_numpy(packed[f"{name}.bias"].dequantize()).to(bias)
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, PackedLinear(weights[name], bias))
    return [name for name, _ in linears]


def _check_shape(packed: Model, weight: Tensor, target: torch.Tensor) -> None:
    if weight.shape != tuple(target.shape):
        shapes = f"{list(weight.shape)} where the module has {list(target.shape)}"
        raise BkpackError(f"{packed.path}: tensor {weight.name} has shape {shapes}")


def _is_packed(name: str, prefixes: tuple[str, ...]) -> bool:
    return name.startswith(prefixes)


def _shared(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory, which PyTorch warns is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _unpack(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Dense little-endian streams, uint8 `[rows, bytes]` -> codes, int16 `[rows, count]`."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        codes = (stream.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(1)[:, :count].to(torch.int16)
    position = torch.arange(count, device=stream.device) * bits
    byte = position // 8
    following = (byte + 1).clamp_(max=stream.shape[1] - 1)  # only looked at where a code straddles two bytes
    pair = stream[:, byte].to(torch.int32) | stream[:, following].to(torch.int32) << 8
    return (pair >> (position % 8).to(torch.int32) & (2**bits - 1)).to(torch.int16)


def _ternary(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Five base-3 digits a byte, uint8 `[rows, bytes]` -> -1, 0 and +1, int16 `[rows, count]`."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int16, device=packed.device)
    digits = packed.to(torch.int16).unsqueeze(-1).div(powers, rounding_mode="floor") % 3
    return digits.flatten(1)[:, :count] - 1
