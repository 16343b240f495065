"""A model's card: its task, its architecture and cost, and what its file says of its training."""

from __future__ import annotations

from dints.network.cost import cost
from dints.network.model_file import Model


def card(model: Model) -> dict[str, object]:
    """Describe a model in plain values."""
    task, architecture, width = model.task, model.architecture, model.info["channel_mul"]
    counted = cost(architecture, task.num_channels, task.num_classes, task.patch_size, width)
    return {
        "task": task.to_dict(),  # spacing in mm
        "architecture": {
            "blocks": architecture.num_blocks,
            "depths": architecture.num_depths,
            "active_paths": int(architecture.arch_code_a.sum()),
            "operations": list(architecture.operations),
            "use_downsample": architecture.use_downsample,
        },
        "cost": {
            "parameters": counted.parameters,
            "gmac": round(counted.gmac, 4),
            "activation_mib": round(counted.activation_mib, 2),
            "input_shape": list(counted.input_shape),
        },
        **model.info,
        "digest": model.digest,
    }
