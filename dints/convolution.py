"""3D convolutions on a CPU in fp32 at oneDNN's speed, also where PyTorch would not call oneDNN.

PyTorch 2.13 hands a small fp32 input of batch 1 to its own loops (``use_mkldnn`` in ATen's Convolution.cpp: batch 1 and
channels * depth * height up to 20,480), and the gradient of a weight that pads the first spatial axis to oneDNN's
reference product rather than its AVX2 kernel. Both cost up to six times. The results are the same but for rounding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Below these sizes PyTorch's own loops are faster; measured, see tests/benchmarks. Fixed, not timed at run time, so
# that a continued run rounds as the first one did.
MIN_MULTIPLY_ADDS = 12e6
MIN_WEIGHTS = 4e5
MIN_VOXELS_OF_WEIGHT_GRADIENT = 512


class Convolution(nn.Conv3d):
    """`torch.nn.Conv3d` with the same parameters and results."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if bias is None and self.groups == 1 and _pays(input, weight, self.stride):
            return _OneDnnConvolution.apply(input, weight, self.stride, self.padding)
        return super()._conv_forward(input, weight, bias)


def accelerated(network: nn.Module) -> nn.Module:
    """``network``, its plain 3D convolutions made `Convolution`; parameters, state dict and results stay the same."""
    for module in network.modules():
        plain = type(module) is nn.Conv3d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if plain and set(module.dilation) == {1}:
            module.__class__ = Convolution
    return network


def _pays(image: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...]) -> bool:
    """Whether oneDNN is both able to compute this convolution and faster."""
    if torch.compiler.is_compiling() or not torch._C._get_mkldnn_enabled():
        return False
    if image.device.type != "cpu" or image.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if image.ndim != 5 or weight[0, 0].numel() == 1:
        return False
    multiply_adds = weight.numel() * image[:, 0].numel() / math.prod(stride)
    return multiply_adds >= MIN_MULTIPLY_ADDS or weight.numel() >= MIN_WEIGHTS


class _OneDnnConvolution(torch.autograd.Function):
    """Calls oneDNN by name forward; backward, PyTorch takes it when the input has oneDNN's layout."""

    @staticmethod
    def forward(ctx, image, weight, stride, padding):
        ctx.save_for_backward(image, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.mkldnn_convolution(image, weight, None, padding, stride, (1, 1, 1), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        image, weight = ctx.saved_tensors
        needs_image, needs_weight = ctx.needs_input_grad[:2]
        gradient_of_image = gradient_of_weight = None
        if needs_image:
            shape_only = torch.empty(image.shape, layout=torch._mkldnn)
            gradient_of_image = _backward(
                gradient.to_mkldnn(), shape_only, weight, ctx.stride, ctx.padding, (True, False, False)
            )[0].to_dense()
        if needs_weight:
            gradient_of_weight = _gradient_of_weight(gradient, image, weight, ctx.stride, ctx.padding)
        return gradient_of_image, gradient_of_weight, None, None


def _gradient_of_weight(gradient, image, weight, stride, padding):
    mask = (False, True, False)
    if gradient[0, 0].numel() < MIN_VOXELS_OF_WEIGHT_GRADIENT:
        return _backward(gradient, image, weight, stride, padding, mask)[1]
    first = padding[0]
    if first:  # oneDNN's AVX2 kernel of this gradient does not pad the first axis itself
        image = F.pad(image, (0, 0, 0, 0, first, first))
    return _backward(gradient.to_mkldnn(), image.to_mkldnn(), weight, stride, (0, *padding[1:]), mask)[1]


def _backward(gradient, image, weight, stride, padding, mask):
    return torch.ops.aten.convolution_backward(
        gradient, image, weight, None, stride, padding, (1, 1, 1), False, (0, 0, 0), 1, mask
    )
