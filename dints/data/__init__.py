"""From a dataset's folder to batches of patches and to whole volumes."""
