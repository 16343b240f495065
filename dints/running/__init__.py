"""How a script runs on its machine: processes, device, precision, seeds and the run folder."""
