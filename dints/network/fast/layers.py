"""The layers of MONAI's networks at a CPU's speed: same parameters and state dicts, same results
but for rounding.

- PyTorch 2.13 (``use_mkldnn`` in ATen's Convolution.cpp) hands a small fp32 input of batch 1
  (channels * depth * height up to 20,480) to its own loops instead of oneDNN, at up to six times
  the time.
- oneDNN brings a weight into a layout of its own at each call. For few voxels that takes longer
  than the convolution; as a matrix product, which reads a weight as it lies, the whole is two to
  three times faster.
- Without AVX-512, oneDNN has no fast kernel for the gradient of a weight that pads the first
  spatial axis.
- An InstanceNorm is two to four times faster as the group norm that it is.
- Trilinear upsampling is two to six times faster as a product with a small matrix along each axis.
  In bfloat16, where a 1x1x1 convolution comes after it, both together are faster still with the
  channels last, in which oneDNN need not bring the volume into another layout.
- A 1x1x1 convolution with a stride is two to four times faster when the voxels that it looks at are
  copied first.
- MONAI's stems also "upsample" by a factor of 1.

Three are not about speed but about faults of PyTorch 2.13, with oneDNN 3.12, in bfloat16:

- Where the first spatial axis is shorter than the kernel (2 planes for one of 3), the gradient of a
  weight is what lay in memory before, NaN at times. We pad that axis ourselves.
- Where a stride leaves one voxel of the last axis, processors with AMX give errors larger than the
  result (pytorch issues 169688 and 193951, pull request 188426). We compute these few voxels in
  fp32.
- A stride greater than the kernel can be wrong there too (oneDNN pull request 5494). We copy its
  voxels as above, for a compiler too.

On processors other than x86 PyTorch's own calls stay. So they do on a GPU but for two things that
are less work on any of them: an InstanceNorm of one image needs no copies of its weights, and
trilinear upsampling is a product along each axis there too. It needs no fp32 for bf16 or fp16, and
its backward pass no atomics, which PyTorch's own adds with: in bf16 a loop of compare-and-swap on
GPUs before Hopper, sums that are rounded 64 times, in an order that no one fixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from monai.networks.blocks.dints_block import FactorizedIncreaseBlock
from torch import nn
from torch.autograd.function import once_differentiable

# Measured on AMD EPYC with AVX2 and with AVX-512. Fixed, not timed at run time, so that a continued
# run rounds as the first one did. Below the first two, PyTorch's own loops are faster than oneDNN's
# convolution.
MIN_MULTIPLY_ADDS = 6e6
MIN_WEIGHTS = 4e5
# A convolution is a matrix product where it has as many weights as this, and no more output voxels
# (of all the batch).
MIN_WEIGHTS_OF_PRODUCT = 5e4
MAX_VOXELS_OF_PRODUCT = 64
# Where there are fewer voxels, to join the weights of several convolutions costs more than the
# calls that it saves.
MIN_VOXELS_OF_GROUP = 64

_HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)


def accelerate_layer(module: nn.Module) -> None:
    """Make a layer of the kinds above ours, by its class; its parameters stay the same."""
    if type(module) is nn.Conv3d and _is_plain(module):
        module.__class__ = Convolution
    elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
        module.__class__ = InstanceNorm
    elif type(module) is nn.Upsample and _is_doubling(module):
        module.__class__ = Upsample
    elif type(module) is nn.Upsample and module.scale_factor == 1:
        module.__class__ = nn.Identity
    elif isinstance(module, FactorizedIncreaseBlock):
        module.__class__ = Increase


def _is_plain(convolution: nn.Conv3d) -> bool:
    padding = convolution.padding
    return (
        convolution.padding_mode == "zeros"
        and not isinstance(padding, str)
        and set(convolution.dilation) == {1}
    )


def _is_doubling(upsample: nn.Upsample) -> bool:
    return (
        upsample.mode == "trilinear" and bool(upsample.align_corners) and upsample.scale_factor == 2
    )


class Convolution(nn.Conv3d):
    """`torch.nn.Conv3d` without dilation, in the fastest of the ways above."""

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        stride = self.stride
        copied = _sees_single_voxels(weight, stride) and not any(self.padding)
        if copied and (_can_take(input) or _is_computed_in_bfloat16(input)):
            input = input[(..., *(slice(None, None, step) for step in stride))].contiguous()
            stride = (1, 1, 1)
        if bias is None and self.groups == 1 and _can_take(input):
            if _is_product(input, weight, stride):
                # Under autocast too in fp32: to read the weights once takes less time than to cast
                # them.
                result = _Product.apply(input.float(), weight, stride, self.padding)
                return (
                    result.to(torch.get_autocast_dtype("cpu"))
                    if torch.is_autocast_enabled("cpu")
                    else result
                )
            if _in_fp32(input, weight) and _pays(input, weight, stride):
                return _OneDnnConvolution.apply(input, weight, stride, self.padding, 1)
        return _by_pytorch(input, weight, bias, stride, self.padding, self.groups)


def _sees_single_voxels(weight: torch.Tensor, stride: tuple[int, ...]) -> bool:
    """Tell whether the convolution looks at single voxels, and leaves some out."""
    return math.prod(weight.shape[2:]) == 1 and math.prod(stride) > 1


def _by_pytorch(image, weight, bias, stride, padding, groups) -> torch.Tensor:
    """Call PyTorch's convolution, around its faults in bfloat16."""
    if _is_computed_in_bfloat16(image):
        if _is_strided_to_one(image, weight, stride, padding):
            return _convolved_in_fp32(image, weight, bias, stride, padding, groups)
        if padding[0] and image.shape[-3] < weight.shape[-3]:
            image, padding = _padded_first(image, padding)
    return F.conv3d(image, weight, bias, stride, padding, groups=groups)


def _is_computed_in_bfloat16(image: torch.Tensor) -> bool:
    """Tell so before any size is looked at, which an exported network would be bound to."""
    if image.device.type != "cpu" or image.dtype == torch.float64:
        return False
    return image.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")


def _is_strided_to_one(image: torch.Tensor, weight: torch.Tensor, stride, padding) -> bool:
    """Tell whether a stride leaves one voxel of the last axis."""
    return stride[-1] > 1 and image.shape[-1] + 2 * padding[-1] - weight.shape[-1] < stride[-1]


def _convolved_in_fp32(image, weight, bias, stride, padding, groups) -> torch.Tensor:
    """Compute in fp32, forward and backward; only the result has the type that was asked for."""
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else image.dtype
    bias = None if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):
        return F.conv3d(image.float(), weight.float(), bias, stride, padding, groups=groups).to(
            kind
        )


def _padded_first(
    image: torch.Tensor, padding: tuple[int, ...]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Pad the first spatial axis; return the image and the padding that is left to do."""
    return F.pad(image, (0, 0, 0, 0, padding[0], padding[0])), (0, *padding[1:])


class InstanceNorm(nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` without running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.ndim != 5:  # without a batch
            return super().forward(input)
        self._check_input_dim(input)
        return instance_norm(input, self.weight, self.bias, self.eps)


def instance_norm(
    image: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Compute PyTorch's instance_norm: on a CPU as a group norm with one channel in a group."""
    if image.is_cuda and len(image) == 1:  # what it comes to, without copies of the weights
        flat = image.reshape(1, -1, *image.shape[2:])
        return F.batch_norm(flat, None, None, weight, bias, training=True, eps=eps).view(
            image.shape
        )
    # one voxel has no deviation: PyTorch's error says so
    if image.device.type != "cpu" or image[0, 0].numel() == 1:
        return F.instance_norm(image, weight=weight, bias=bias, eps=eps)
    return F.group_norm(image, image.shape[1], weight, bias, eps)


class Increase(FactorizedIncreaseBlock):
    """MONAI's block that doubles a volume, then ReLU, a 1x1x1 convolution and the norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not (_can_take(input) and input.dtype == torch.bfloat16):
            return super().forward(input)
        doubled = F.interpolate(
            input.contiguous(memory_format=torch.channels_last_3d),
            scale_factor=2,
            mode="trilinear",
            align_corners=True,
        )
        return self.norm(self.conv(self.acti(doubled)).contiguous())


class Upsample(nn.Upsample):
    """`torch.nn.Upsample` that doubles a volume trilinearly, corners aligned."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _is_on_gpu(input):
            return _doubled(input)
        if _can_take(input) and input.dtype in (torch.float32, torch.bfloat16):
            return _Doubling.apply(input.float()).to(input.dtype)
        return super().forward(input)


def convolve_side_by_side(convolutions: Sequence[nn.Module], image: torch.Tensor) -> torch.Tensor:
    """Compute bias-free convolutions that keep the size, each on its share of the channels.

    A call costs more than what the deeper levels of a small patch compute in it.
    """
    groups = len(convolutions)
    if groups == 1:
        return convolutions[0](image)
    if image[0, 0].numel() < MIN_VOXELS_OF_GROUP:
        shares = zip(convolutions, image.chunk(groups, 1), strict=True)
        return torch.cat([convolution(share) for convolution, share in shares], 1)
    weight = torch.cat([convolution.weight for convolution in convolutions])
    return convolve(weight, image, groups)


def convolve(weight: torch.Tensor, image: torch.Tensor, groups: int) -> torch.Tensor:
    """Convolve each group of channels by its share of the kernels, without bias, at equal size."""
    stride, padding = (1, 1, 1), tuple(size // 2 for size in weight.shape[2:])
    if _can_take(image) and _in_fp32(image, weight):
        return _OneDnnConvolution.apply(image, weight, stride, padding, groups)
    return _by_pytorch(image, weight, None, stride, padding, groups)


def _is_on_gpu(image: torch.Tensor) -> bool:
    return image.is_cuda and image.ndim == 5


def _can_take(image: torch.Tensor) -> bool:
    """Tell whether our calls of oneDNN can take the batch; a compiler does not know them."""
    return (
        not torch.compiler.is_compiling()
        and _HAS_ONEDNN
        and torch._C._get_mkldnn_enabled()
        and image.device.type == "cpu"
        and image.ndim == 5
    )


def _in_fp32(image: torch.Tensor, weight: torch.Tensor) -> bool:
    return image.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _is_product(image: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...]) -> bool:
    """Tell whether a convolution is faster as a matrix product."""
    return (
        weight.dtype == torch.float32
        and image.dtype in (torch.float32, torch.bfloat16)
        and weight.numel() >= MIN_WEIGHTS_OF_PRODUCT
        and weight[0, 0].numel() > 1
        and image[:, 0].numel() <= MAX_VOXELS_OF_PRODUCT * math.prod(stride)
    )


def _pays(image: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...]) -> bool:
    """Tell whether oneDNN's convolution is faster than PyTorch's own loops."""
    if weight[0, 0].numel() == 1 or (len(image) > 1 and _HAS_AVX512):  # PyTorch takes oneDNN itself
        return False
    multiply_adds = weight.numel() * image[:, 0].numel() / math.prod(stride)
    return multiply_adds >= MIN_MULTIPLY_ADDS or weight.numel() >= MIN_WEIGHTS


class _Product(torch.autograd.Function):
    """A convolution as the product of its weights and the voxels under them."""

    @staticmethod
    def forward(ctx, image, weight, stride, padding):
        ctx.save_for_backward(image, weight)
        ctx.geometry = tuple(stride), tuple(padding)
        result = _linear(_seen(image, weight, *ctx.geometry), weight.flatten(1))
        out_size = _taps(image.shape[2:], weight.shape[2:], *ctx.geometry)[1]
        return (
            result.view(len(image), -1, len(weight))
            .transpose(1, 2)
            .reshape(len(image), len(weight), *out_size)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        image, weight = ctx.saved_tensors
        rows = gradient.flatten(2).transpose(1, 2).reshape(-1, len(weight))
        of_image = of_weight = None
        if ctx.needs_input_grad[0]:
            of_seen = _linear(rows, weight.flatten(1).T).view(len(image), -1, weight[0].numel())
            of_seen = of_seen.transpose(1, 2).reshape(image.shape[0] * image.shape[1], -1)
            of_image = _linear(
                of_seen, _taps(image.shape[2:], weight.shape[2:], *ctx.geometry)[0].T
            ).view(image.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _linear(rows.T, _seen(image, weight, *ctx.geometry).T).view(weight.shape)
        return of_image, of_weight, None, None


def _seen(image, weight, stride, padding) -> torch.Tensor:
    """Gather what each output voxel sees: a row for it, a column for each weight of a kernel."""
    taps = _taps(image.shape[2:], weight.shape[2:], stride, padding)[0]
    seen = _linear(image.reshape(image.shape[0] * image.shape[1], -1), taps)
    return (
        seen.view(len(image), weight[0].numel(), -1).transpose(1, 2).reshape(-1, weight[0].numel())
    )


def _linear(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute ``left @ right.T`` by oneDNN: on these shapes two to three times as fast as ``@``."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


@lru_cache(maxsize=256)
def _taps(size, kernel, stride, padding) -> tuple[torch.Tensor, torch.Size]:
    """Return (kernel * outputs, inputs): 1 where an input is under a tap; and the output size."""
    voxels = math.prod(size)
    seen = torch.eye(voxels, dtype=torch.float32, device="cpu").view(voxels, *size)
    seen = F.pad(seen, [amount for pad in reversed(padding) for amount in (pad, pad)])
    for axis, (width, step) in enumerate(zip(kernel, stride, strict=True), start=1):
        seen = seen.unfold(axis, width, step)  # the kernel's axes come last
    return seen.permute(4, 5, 6, 1, 2, 3, 0).reshape(-1, voxels).contiguous(), seen.shape[1:4]


class _Doubling(torch.autograd.Function):
    """Interpolates trilinearly by products with a matrix of linear interpolation for each axis."""

    @staticmethod
    def forward(ctx, image):
        ctx.image_shape = image.shape
        batch, channels, depth, height, width = image.shape
        if depth * height * width <= MAX_VOXELS_OF_PRODUCT:
            along_all = _linear(
                image.reshape(batch * channels, -1), _doubling_of_volume(depth, height, width)
            )
            return along_all.reshape(batch, channels, 2 * depth, 2 * height, 2 * width)
        with torch.autocast("cpu", enabled=False):
            along_width = _linear(image.reshape(-1, width), _doubling(width)).reshape(
                -1, height, 2 * width
            )
            along_height = torch.matmul(_doubling(height), along_width).reshape(
                batch * channels, depth, -1
            )
            return torch.matmul(_doubling(depth), along_height).reshape(
                batch, channels, 2 * depth, 2 * height, 2 * width
            )

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        batch, channels, depth, height, width = ctx.image_shape
        if depth * height * width <= MAX_VOXELS_OF_PRODUCT:
            of_all = _linear(
                gradient.reshape(batch * channels, -1), _doubling_of_volume(depth, height, width).T
            )
            return of_all.reshape(ctx.image_shape)
        of_depth = torch.matmul(
            _doubling(depth).T, gradient.reshape(batch * channels, 2 * depth, -1)
        )
        of_height = torch.matmul(_doubling(height).T, of_depth.reshape(-1, 2 * height, 2 * width))
        return _linear(of_height.reshape(-1, 2 * width), _doubling(width).T).reshape(
            ctx.image_shape
        )


def _doubled(image: torch.Tensor) -> torch.Tensor:
    """Compute what `_Doubling` does in products that compile, in the type of the image."""
    batch, channels, depth, height, width = image.shape
    # What a compiler traces is not there to be kept.
    matrix = _doubling.__wrapped__ if torch.compiler.is_compiling() else _doubling
    of_depth, of_height, of_width = (
        matrix(size, image.dtype, image.device) for size in (depth, height, width)
    )
    with torch.autocast(image.device.type, enabled=False):
        along_width = (image.reshape(-1, width) @ of_width.T).view(-1, height, 2 * width)
        along_height = (of_height @ along_width).view(batch * channels, depth, -1)
        return (of_depth @ along_height).view(batch, channels, 2 * depth, 2 * height, 2 * width)


@cache  # without a limit: a recorded CUDA graph reads it where it lies
def _doubling(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return (2 * size, size): linear interpolation of one axis."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.inference_mode(False):  # a training may be the next that needs it
        axis = torch.eye(size, dtype=exact, device=device)[None]
        doubled = F.interpolate(axis, scale_factor=2, mode="linear", align_corners=True)[0]
        return doubled.T.clone(memory_format=torch.contiguous_format).to(dtype)


@lru_cache(maxsize=256)
def _doubling_of_volume(depth: int, height: int, width: int) -> torch.Tensor:
    """Return (8 * voxels, voxels): trilinear interpolation of a small volume at once."""
    return torch.kron(torch.kron(_doubling(depth), _doubling(height)), _doubling(width))


class _OneDnnConvolution(torch.autograd.Function):
    """Calls oneDNN by name forward, and by its layout of the input backward."""

    @staticmethod
    def forward(ctx, image, weight, stride, padding, groups):
        ctx.save_for_backward(image, weight)
        ctx.geometry = stride, padding, groups
        return torch.mkldnn_convolution(image, weight, None, padding, stride, (1, 1, 1), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        image, weight = ctx.saved_tensors
        needs_image, needs_weight = ctx.needs_input_grad[:2]
        of_image = (
            _gradient_of_image(gradient, image, weight, *ctx.geometry) if needs_image else None
        )
        of_weight = (
            _gradient_of_weight(gradient, image, weight, *ctx.geometry) if needs_weight else None
        )
        return of_image, of_weight, None, None, None


def _gradient_of_image(gradient, image, weight, stride, padding, groups):
    mask = (True, False, False)
    if groups > 1:
        return _backward(gradient, image, weight, stride, padding, groups, mask)[0]
    shape_only = torch.empty(image.shape, layout=torch._mkldnn)
    return _backward(gradient.to_mkldnn(), shape_only, weight, stride, padding, groups, mask)[
        0
    ].to_dense()


def _gradient_of_weight(gradient, image, weight, stride, padding, groups):
    mask = (False, True, False)
    # oneDNN's AVX2 kernel of this gradient does not pad the first axis itself
    if padding[0] and not _HAS_AVX512:
        image, padding = _padded_first(image, padding)
    if groups == 1:
        gradient, image = gradient.to_mkldnn(), image.to_mkldnn()
    return _backward(gradient, image, weight, stride, padding, groups, mask)[1]


def _backward(gradient, image, weight, stride, padding, groups, mask):
    return torch.ops.aten.convolution_backward(
        gradient, image, weight, None, stride, padding, (1, 1, 1), False, (0, 0, 0), groups, mask
    )
