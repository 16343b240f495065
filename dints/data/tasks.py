"""What belongs to the data: channels, classes, spacing and intensity of a segmentation task.

The ten tasks of the Medical Segmentation Decathlon (MSD; Antonelli et al., Nature Communications
2022) and the built-in phantom are a table; `dints.data.formats` reads a task from any
``dataset.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Task:
    """A segmentation task.

    Attributes:
        name: for messages and files, for example ``Task07_Pancreas``.
        modality: ``CT`` (intensities are absolute) or ``MRI`` (they are not).
        num_channels: image channels.
        class_names: one per label value, background first.
        spacing: voxel size in mm that images are resampled to; None leaves them as they are.
        intensity: CT window in HU that is mapped to 0..1 and clipped; None: z-score of the non-zero
            voxels per channel.
        patch_size: voxels of a training patch.
        channel_files: each channel is a file of its own, ``<case>_0000``, ``<case>_0001``, ..., as
            in nnU-Net; else one file holds all.
    """

    name: str
    modality: str
    num_channels: int
    class_names: tuple[str, ...]
    spacing: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    intensity: tuple[float, float] | None = None
    patch_size: tuple[int, int, int] = (96, 96, 96)
    channel_files: bool = False

    @property
    def num_classes(self) -> int:
        """Label values, background included."""
        return len(self.class_names)

    def to_dict(self) -> dict:
        """Return plain types only, for checkpoints that ``weights_only=True`` reads; `from_dict` is
        the inverse.
        """
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @staticmethod
    def from_dict(values: dict) -> Task:
        """Return the task of a checkpoint; an attribute that an older one lacks has its default."""
        return Task(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
        )


@dataclass(frozen=True)
class Archive:
    """A task's archive on the MSD server, and how many cases a whole one holds."""

    num_training: int
    num_test: int
    md5: str


# Window, spacing and class facts: the published DiNTS configurations; counts: the Decathlon's
# dataset.json files.
TASKS = {
    task.name: task
    for task in (
        Task(
            "Task01_BrainTumour",
            "MRI",
            4,
            ("background", "edema", "non-enhancing tumor", "enhancing tumour"),
            spacing=None,
        ),
        Task("Task02_Heart", "MRI", 1, ("background", "left atrium")),
        Task("Task03_Liver", "CT", 1, ("background", "liver", "cancer"), intensity=(-21.0, 189.0)),
        Task(
            "Task04_Hippocampus",
            "MRI",
            1,
            ("background", "Anterior", "Posterior"),
            spacing=None,
            patch_size=(32, 32, 32),
        ),
        Task("Task05_Prostate", "MRI", 2, ("background", "PZ", "TZ"), patch_size=(96, 96, 32)),
        Task("Task06_Lung", "CT", 1, ("background", "cancer"), intensity=(-1000.0, 1000.0)),
        Task(
            "Task07_Pancreas",
            "CT",
            1,
            ("background", "pancreas", "cancer"),
            intensity=(-87.0, 199.0),
        ),
        Task(
            "Task08_HepaticVessel",
            "CT",
            1,
            ("background", "Vessel", "Tumour"),
            intensity=(0.0, 230.0),
        ),
        Task("Task09_Spleen", "CT", 1, ("background", "spleen"), intensity=(-125.0, 275.0)),
        Task(
            "Task10_Colon",
            "CT",
            1,
            ("background", "colon cancer primaries"),
            intensity=(-57.0, 175.0),
        ),
        # Written by dints/data/phantom.py, not by the Decathlon.
        Task(
            "Task00_Phantom",
            "CT",
            1,
            ("background", "liver", "lesion"),
            spacing=(2.0, 2.0, 2.0),
            intensity=(-150.0, 250.0),
            patch_size=(32, 32, 32),
        ),
    )
}

ARCHIVE_URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/{task}.tar"
ARCHIVES = {
    "Task01_BrainTumour": Archive(484, 266, "240a19d752f0d9e9101544901065d872"),
    "Task02_Heart": Archive(20, 10, "06ee59366e1e5124267b774dbd654057"),
    "Task03_Liver": Archive(131, 70, "a90ec6c4aa7f6a3d087205e23d4e6397"),
    "Task04_Hippocampus": Archive(260, 130, "9d24dba78a72977dbd1d2e110310f31b"),
    "Task05_Prostate": Archive(32, 16, "35138f08b1efaef89d7424d2bcc928db"),
    "Task06_Lung": Archive(63, 32, "8afd997733c7fc0432f71255ba4e52dc"),
    "Task07_Pancreas": Archive(281, 139, "4f7080cfca169fa8066d17ce6eb061e4"),
    "Task08_HepaticVessel": Archive(303, 139, "641d79e80ec66453921d997fbf12a29c"),
    "Task09_Spleen": Archive(41, 20, "410d4a301da4e5b2f6f86ec3ddba524e"),
    "Task10_Colon": Archive(126, 64, "bad7a188931dc2f6acf72b08eb6202d0"),
}

MAX_CLASSES = 255  # label values 0 to 254: segmentations are uint8
