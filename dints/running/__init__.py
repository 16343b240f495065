"""A script on its machine: processes, device, precision, seeds, and a run in its folder."""
