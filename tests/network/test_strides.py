"""Networks whose depths halve some axes: the layers, the plan, the files, and runs with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import everything, halving
from monai.networks.blocks.dints_block import FactorizedReduceBlock
from torch import nn

from dints.data.fingerprint import Fingerprint, halvings
from dints.errors import UserError
from dints.exports.bundle import check_operations
from dints.network import discrete, space
from dints.network.architecture import load_architecture, save_architecture
from dints.network.baselines import ram_ratio, u_shaped
from dints.network.discrete import DiscreteNetwork, check_patch_size
from dints.network.drawing import draw_architecture
from dints.network.operations import PUBLISHED, operations_of
from dints.network.space import SearchSpace, supernet_of
from dints.network.strided import StridedReduce
from dints.network.strides import coarse_axes, halved_first, isotropic, patch_step

IN_PLANE = (2, 2, 1)
STRIDES = ((1, 1, 1), IN_PLANE, (2, 2, 2))
HALVED = (IN_PLANE, (2, 2, 2), (2, 2, 2))


@pytest.mark.parametrize(
    ("spacing", "shape", "planned"),
    [
        ((1, 1, 1), (96, 128, 72), [(2, 2, 2)] * 4),
        # 3, then 6 mm beside 10 mm
        ((1.5, 1.5, 10), (160, 160, 9), [IN_PLANE, IN_PLANE, (2, 2, 2), IN_PLANE]),
        ((5, 1, 1), (20, 200, 200), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((1, 1, 2), (64, 64, 64), [IN_PLANE, (2, 2, 2), (2, 2, 2), (2, 2, 2)]),
        # few voxels alone wait for no one
        ((1, 1, 1), (32, 32, 32), [(2, 2, 2)] * 4),
        ((1, 1, 4), (6, 6, 40), [IN_PLANE, IN_PLANE, (1, 1, 2), IN_PLANE]),
    ],
    ids=str,
)
def test_an_axis_waits_until_the_others_are_as_coarse(spacing, shape, planned):
    assert halvings(spacing, shape, 4) == planned


@pytest.mark.parametrize(
    ("spacing", "shape", "patch_size"),
    [
        ((1.5, 1.5, 10), (160, 160, 9), (160, 160, 8)),  # no deeper than the volumes
        ((1, 1, 1), (96, 128, 72), (96, 128, 64)),
        ((0.8, 0.8, 3), (512, 512, 100), (160, 160, 32)),  # in their proportions
        ((1, 1, 1), (300, 300, 300), (96, 96, 96)),
        ((1, 1, 1), (9, 9, 40), (8, 8, 40)),
    ],
    ids=str,
)
def test_a_patch_is_planned_like_the_strides(spacing, shape, patch_size):
    measured = Fingerprint("", 1, spacing, shape, None)
    assert measured.patch_size("auto", 4) == patch_size
    strides = ((1, 1, 1), *halvings(spacing, shape, 4))
    check_patch_size(patch_size, strides)


def test_strides_say_what_halves_which_axes_wait_and_what_a_patch_must_be():
    assert halved_first(STRIDES, True) == (IN_PLANE, (2, 2, 2), (2, 2, 2))
    assert halved_first(HALVED, False) == ((1, 1, 1), IN_PLANE, (2, 2, 2))
    assert halved_first(isotropic(4), False) == isotropic(4, False)
    assert [coarse_axes(STRIDES, depth) for depth in range(3)] == [(2,), (), ()]
    assert not any(coarse_axes(isotropic(4, False), depth) for depth in range(4))
    assert patch_step(STRIDES) == (4, 4, 2)
    check_patch_size((8, 4, 2), STRIDES)
    with pytest.raises(UserError, match="multiples of 4 4 2, .* for example 8 8 4$"):
        check_patch_size((4, 4, 2), STRIDES)


def test_a_layer_that_halves_two_axes_is_monais_of_each_slice():
    torch.manual_seed(0)
    ours, monais = StridedReduce(3, 5), FactorizedReduceBlock(3, 5, spatial_dims=2)
    for mine, theirs in ((ours.conv_1, monais.conv_1), (ours.conv_2, monais.conv_2)):
        mine.stride = IN_PLANE
        theirs.weight.data = mine.weight.data.squeeze(-1)
    ours.norm = monais.norm = nn.Identity()
    image = torch.randn(2, 3, 8, 6, 3)
    slices = [monais(image[..., slice_]) for slice_ in range(3)]
    torch.testing.assert_close(ours(image), torch.stack(slices, -1))


@pytest.mark.parametrize("strides", [STRIDES, HALVED], ids=["full", "half"])
def test_a_network_is_as_fast_layers_compute_it_and_turns_with_its_axes(strides, monkeypatch):
    architecture = replace(everything(2, 3), strides=strides)
    fast = DiscreteNetwork(architecture, 1, 2, 1 / 16)
    image = torch.randn(1, 1, 16, 24, 4)
    scores = fast(image)
    assert scores.shape == (1, 2, 16, 24, 4)
    monkeypatch.setattr(discrete, "accelerate", lambda network: network)
    plain = DiscreteNetwork(architecture, 1, 2, 1 / 16)
    plain.load_state_dict(fast.state_dict())
    torch.testing.assert_close(plain(image), scores, rtol=1e-4, atol=1e-4)

    u = u_shaped(2, 3, strides=strides)
    turned = replace(u, strides=tuple((z, x, y) for x, y, z in strides))
    first, second = (DiscreteNetwork(one, 1, 2, 1 / 16) for one in (u, turned))
    second.load_state_dict(
        {
            key: value.permute(0, 1, 4, 2, 3) if value.ndim == 5 else value
            for key, value in first.state_dict().items()
        }
    )
    expected = first(image).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(second(image.permute(0, 1, 4, 2, 3)), expected, rtol=1e-4, atol=1e-4)


def test_upsampling_along_two_axes_is_that_of_each_slice():
    network = DiscreteNetwork(replace(everything(1, 2), strides=STRIDES[:2]), 1, 2, 1 / 16)
    ups = [one for one in network.modules() if getattr(one, "scale_factor", 0) == (2.0, 2.0, 1.0)]
    image = torch.randn(1, 3, 4, 6, 3, requires_grad=True)
    expected = torch.stack(
        [
            F.interpolate(image[..., k], scale_factor=2, mode="bilinear", align_corners=True)
            for k in range(3)
        ],
        -1,
    )
    assert {type(up).__module__ for up in ups} == {"dints.network.fast.layers"}
    torch.testing.assert_close(ups[0](image), expected, rtol=1e-4, atol=1e-5)


def test_a_search_space_mixes_as_fast_layers_do_and_counts_memory_by_its_strides(monkeypatch):
    operations = operations_of((), STRIDES)
    assert operations == (*PUBLISHED, "plane_3x3x1")
    fast = SearchSpace(1 / 16, 2, 3, operations, STRIDES)
    image = torch.randn(1, 1, 8, 8, 4)
    supernet = supernet_of(fast, 1, 2)
    monkeypatch.setattr(space, "accelerate", lambda network: network)
    plain = supernet_of(SearchSpace(1 / 16, 2, 3, operations, STRIDES), 1, 2)
    plain.load_state_dict(supernet.state_dict())
    torch.testing.assert_close(plain(image), supernet(image), rtol=1e-4, atol=1e-4)

    # a depth that halves two axes has twice the voxels that MONAI's has
    u = u_shaped(2, 3, operations, strides=STRIDES)
    wide = SearchSpace(1, 2, 3, operations, STRIDES)
    assert wide.ram_ratio_of(u.arch_code_a, u.arch_code_c) == pytest.approx(ram_ratio(u))
    assert wide.depth_sizes == [32, 16, 4] and SearchSpace(1, 2, 3).depth_sizes == [32, 8, 2]
    assert fast.architecture().strides == STRIDES


def test_a_u_works_in_the_plane_while_the_third_axis_is_coarse():
    operations = operations_of((), STRIDES)
    u = u_shaped(4, 3, operations, strides=STRIDES)
    names = np.array(operations)[u.arch_code_c[u.arch_code_a == 1]]
    assert {*names} == {"plane_3x3x1", "conv_3x3x3"}
    assert operations[u.arch_code_c[0, 0]] == "plane_3x3x1"  # at the image's resolution
    assert u_shaped(4, 3, strides=STRIDES).operations == PUBLISHED


def test_files_and_drawings_hold_strides_and_monais_bundle_refuses_them(tmp_path):
    found = replace(everything(2, 3), strides=STRIDES)
    save_architecture(tmp_path / "found.pth", found)
    loaded = load_architecture(tmp_path / "found.pth")
    assert loaded.strides == STRIDES and not loaded.is_isotropic and not loaded.use_downsample
    assert loaded.codes() != halving(everything(2, 3), False).codes()
    with pytest.raises(UserError, match="MONAI lacks --strides auto: use exported_program"):
        check_operations(type("Model", (), {"architecture": loaded}))
    try:
        source = draw_architecture(loaded, "found", tmp_path, "svg").source
    except UserError:  # without graphviz's program the source is there
        source = (tmp_path / "found.gv").read_text()
    assert all(part in source for part in ("1/1", "1/2x2x1", "1/4x4x2"))
