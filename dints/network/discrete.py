from dints.network.found import FoundNetwork as DiscreteNetwork, check_patch_size, count_parameters  # noqa
