"""A model's card: what it segments, what it was trained on, how well it did there, and what it
costs.
"""

from __future__ import annotations

from dints.network.cost import cost
from dints.network.model_file import Model


def card(model: Model) -> dict[str, object]:
    """Describe a model in plain values; what its file does not know is null."""
    task, info, architecture = model.task, model.info, model.architecture
    counted = cost(
        architecture, task.num_channels, task.num_classes, task.patch_size, info["channel_mul"]
    )
    return {
        "task": {**task.to_dict(), "spacing_unit": "mm"},
        "data": {
            **info.get("data", {}),
            "training_cases": info.get("training_cases"),
            "validation_cases": info.get("validation_cases"),
            "fold": info.get("fold"),
            "num_folds": info.get("num_folds"),
        },
        "architecture": {
            "blocks": architecture.num_blocks,
            "depths": architecture.num_depths,
            "active_paths": int(architecture.arch_code_a.sum()),
            "paths": architecture.arch_code_a.size,
            "operations": list(architecture.operations),
            "use_downsample": architecture.use_downsample,
            "channel_mul": info["channel_mul"],
        },
        "cost": {
            "parameters": counted.parameters,
            "gmac": round(counted.gmac, 4),
            "activation_mib": round(counted.activation_mib, 2),
            "input_shape": list(counted.input_shape),
        },
        "training": {
            key: info.get(key)
            for key in ("recipe", "augmentation", "iteration", "flips", "version")
        },
        "validation": {
            "dice": info.get("dice"),
            "dice_of_classes": dict(
                zip(task.class_names[1:], info.get("dice_of_classes") or [], strict=False)
            )
            or None,
            "overlap_ratio": info.get("overlap_ratio"),
        },
        "digest": model.digest,
    }
