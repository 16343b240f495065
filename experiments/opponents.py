r"""Run a stage with one of MONAI's networks in the discrete network's place: the opponents of the
experiments.

    python experiments/opponents.py dynunet train_dints.py --arch_ckpt ANY --root ... \
        --output_root ...
    python experiments/opponents.py dynunet infer_dints.py --checkpoint ... --root ...

Data, loss, schedule, validation and files are the stage's own. ARCH_CKPT is read and not built;
--channel_mul scales the opponent's channels. Its layers stay MONAI's: on a CPU in bf16 a patch
should have 12 voxels an axis or more, lest PyTorch's gradients be what lay in memory before
(dints/network/fast/layers.py).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from monai.networks.nets import DynUNet, SegResNet
from torch import nn

from dints.errors import exit_on_user_error
from dints.network import model_file


def dynunet(in_channels: int, num_classes: int, channel_mul: float) -> nn.Module:
    """Make nnU-Net's U in MONAI's words: three resolutions, 32 to 128 channels, one output."""
    return DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=num_classes,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[int(channel_mul * channels) for channels in (32, 64, 128)],
    )


def segresnet(in_channels: int, num_classes: int, channel_mul: float) -> nn.Module:
    """Make MONAI's SegResNet with three resolutions, 16 to 64 channels."""
    return SegResNet(
        spatial_dims=3,
        init_filters=int(16 * channel_mul),
        in_channels=in_channels,
        out_channels=num_classes,
        blocks_down=(1, 2, 4),
        blocks_up=(1, 1),
        norm=("INSTANCE", {"affine": True}),
    )


OPPONENTS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "dynunet": dynunet,
    "segresnet": segresnet,
}


def take_place(name: str, stage: ModuleType) -> None:
    """Have a stage build the opponent where it would build the discrete network."""

    def build(
        _architecture: object, in_channels: int, num_classes: int, channel_mul: float = 1.0
    ) -> nn.Module:
        opponent = OPPONENTS[name](in_channels, num_classes, channel_mul)
        opponent.unused_stems = ()
        return opponent

    for module in (stage, model_file):
        if hasattr(module, "DiscreteNetwork"):
            module.DiscreteNetwork = build


if __name__ == "__main__":
    opponent, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    stage = importlib.import_module(script.removesuffix(".py"))
    take_place(opponent, stage)
    exit_on_user_error(stage.main, stage.parse_args(arguments))
