"""The network as a MONAI bundle: JSON and weights that ``python -m monai.bundle run`` executes.

MONAI's own `DiNTS` computes, from a state dict. MONAI reads, prepares, segments and writes images.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import monai
import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.networks.nets.dints import Cell

from dints import __version__, files, torch_files
from dints.data.tasks import Task
from dints.errors import UserError
from dints.network.model_file import Model

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
OPERATIONS = list(Cell.OPS3D)  # of MONAI, in the order of its codes
FOR_THE_COMMAND = {"fire": "0.7.1"}  # a version that the command was tried with


def check_operations(model: Model) -> None:
    """Raise `UserError` unless MONAI's network has all operations that the architecture uses."""
    architecture = model.architecture
    used = architecture.arch_code_c[architecture.arch_code_a == 1]
    lacking = {architecture.operations[code] for code in used} - {*OPERATIONS}
    if lacking:
        raise UserError(
            f"--export bundle: MONAI lacks the operation {min(lacking)}: use exported_program"
        )


def write(folder: Path, model: Model, overlap: float) -> None:
    """Write the bundle's files; `check_operations` lets the model pass."""
    task, definition = model.task, _monais_network(model)
    torch_files.save_atomically(_monais_weights(definition, model), folder / "models/model.pt")
    inference = {**_places(task), **definition, **_transforms(task), **_run(task, overlap)}
    for name, content in (("inference", inference), ("metadata", _metadata(task))):
        files.write_atomically(
            folder / f"configs/{name}.json", json.dumps(content, indent=2) + "\n"
        )
    files.write_atomically(folder / "docs/README.md", _readme(task))


def _monais_network(model: Model) -> dict:
    """Describe MONAI's network: a path's operation by MONAI's number, 0 where there is no path."""
    architecture, task = model.architecture, model.task
    codes = np.zeros_like(architecture.arch_code_c)
    for place in zip(*architecture.arch_code_a.nonzero(), strict=True):
        codes[place] = OPERATIONS.index(architecture.operations[architecture.arch_code_c[place]])
    return {
        "arch_code_a": architecture.arch_code_a.tolist(),
        "arch_code_c": codes.tolist(),
        "node_a": architecture.node_a.tolist(),
        "network_def": {
            "_target_": "monai.networks.nets.DiNTS",
            "dints_space": {
                "_target_": "monai.networks.nets.TopologyInstance",
                "arch_code": ["$np.array(@arch_code_a)", "$np.array(@arch_code_c)"],
                "channel_mul": model.info["channel_mul"],
                "num_blocks": architecture.num_blocks,
                "num_depths": architecture.num_depths,
                "use_downsample": architecture.use_downsample,
            },
            "in_channels": task.num_channels,
            "num_classes": task.num_classes,
            "use_downsample": architecture.use_downsample,
            "node_a": "$torch.tensor(@node_a)",
        },
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "initialize": [
            "$@network_def.load_state_dict(torch.load(@checkpoint, map_location='cpu', "
            "weights_only=True))"
        ],
    }


def _monais_weights(definition: dict, model: Model) -> dict[str, torch.Tensor]:
    """Return the state dict of MONAI's network: ours, and zeros in unused stems."""
    with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints its advice about patch sizes
        theirs = ConfigParser(definition).get_parsed_content("network_def").state_dict()
    ours = model.network.state_dict()
    foreign = [key for key in ours if key not in theirs or ours[key].shape != theirs[key].shape]
    foreign += [
        key for key in theirs if key not in ours and not key.startswith(model.network.unused_stems)
    ]
    if foreign:
        raise UserError(
            f"--export bundle: MONAI {monai.__version__} has another network of this architecture, "
            f"{foreign[0]} differs: use exported_program"
        )
    return {
        key: ours[key].cpu() if key in ours else torch.zeros_like(value)
        for key, value in theirs.items()
    }


def _places(task: Task) -> dict:
    """Name inputs and outputs; of channels in files of their own, the first stands for the case."""
    images = "sorted(glob.glob(@dataset_dir + '/*.nii*'))"
    if task.channel_files:
        images = (
            f"[[first.replace('_0000.nii', f'_{{channel:04d}}.nii') for channel in "
            f"range({task.num_channels})] for first in sorted(glob.glob(@dataset_dir + "
            "'/*_0000.nii*'))]"
        )
    return {
        "imports": ["$import glob", "$from collections import deque"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/segmentations'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": f"${images}",
    }


def _transforms(task: Task) -> dict:
    """Describe transforms; probabilities are brought back to the image's grid, not labels."""
    preprocessing = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    ]
    if task.spacing is not None:
        spacing = {"pixdim": list(task.spacing), "mode": "bilinear", "align_corners": True}
        preprocessing.append({"_target_": "Spacingd", "keys": "image", **spacing})
    if task.intensity is None:
        z_score = {"nonzero": True, "channel_wise": True}
        preprocessing.append({"_target_": "NormalizeIntensityd", "keys": "image", **z_score})
    else:
        low, high = task.intensity
        window = {"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True}
        preprocessing.append({"_target_": "ScaleIntensityRanged", "keys": "image", **window})
    saving = {
        "output_postfix": "",
        "output_dtype": "$np.uint8",
        "separate_folder": False,
        "print_log": False,
    }
    inversion = {"transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False}
    postprocessing = [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {"_target_": "Invertd", "keys": "pred", **inversion},
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", **saving},
    ]
    return {
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing},
        "postprocessing": {"_target_": "Compose", "transforms": postprocessing},
    }


def _run(task: Task, overlap: float) -> dict:
    """Describe the loop over images; ``evaluator`` is it for applications, and needs ignite."""
    return {
        "network": "$@network_def.to(@device).eval().requires_grad_(False)",
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': image} for image in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(task.patch_size),
            "sw_batch_size": 6,
            "overlap": overlap,
            "mode": "gaussian",
            "padding_mode": "reflect",
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "scores": "$lambda image: @inferer(image.as_tensor()[None].to(@device), @network)[0].cpu()",
        "run": [
            "$deque((@postprocessing({**case, 'pred': @scores(case['image'])}) for case in "
            "@dataset), maxlen=0)"
        ],
    }


def _metadata(task: Task) -> dict:
    """Describe the bundle by MONAI's schema; sizes and channels are those of one patch."""
    is_ct = task.modality == "CT"
    tensor = {
        "type": "image",
        "spatial_shape": list(task.patch_size),
        "dtype": "float32",
        "is_patch_data": True,
    }
    image = {
        **tensor,
        "format": "hounsfield" if is_ct else "magnitude",
        "modality": "CT" if is_ct else "MR",
        "num_channels": task.num_channels,
        "value_range": [0, 1] if task.intensity else [],
        "channel_def": {str(channel): "image" for channel in range(task.num_channels)},
    }
    scores = {
        **tensor,
        "format": "segmentation",
        "num_channels": task.num_classes,
        "value_range": [],
        "channel_def": {str(value): name for value, name in enumerate(task.class_names)},
    }
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by infer_dints.py of dints-scripts {__version__}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": nibabel.__version__, **FOR_THE_COMMAND},
        "name": f"{task.name} DiNTS segmentation",
        "task": f"segment {', '.join(task.class_names[1:])} in {'CT' if is_ct else 'MRI'}",
        "description": "A network whose topology was searched by DiNTS (He et al., CVPR 2021), "
        "then retrained",
        "authors": "not stated by the model file",
        "copyright": "not stated by the model file",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": scores}},
    }


def _readme(task: Task) -> str:
    labels = "\n".join(f"- {value}: {name}" for value, name in enumerate(task.class_names))
    patch_size = " x ".join(map(str, task.patch_size))
    images = "NIfTI files"
    if task.channel_files:
        images = "`<case>_0000.nii.gz`, `<case>_0001.nii.gz`, ..., a file a channel,"
    return f"""# {task.name}

A 3D segmentation network that DiNTS found and trained, as a MONAI bundle. Labels:

{labels}

In this bundle's folder, with the packages that `configs/metadata.json` names:

```bash
files="--meta_file configs/metadata.json --config_file configs/inference.json"
python -m monai.bundle run $files --dataset_dir SCANS --output_dir SEGMENTATIONS
python -m monai.bundle verify_net_in_out network_def $files
```

SCANS holds {images} in mm. A volume that has less than about a third of {patch_size} voxels along
an axis is too small to be segmented. `evaluator`, for applications that ask for one, needs
`pytorch-ignite`.

Not a medical device; nothing here is a statement about its use on patients.
"""
