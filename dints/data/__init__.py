"""From a dataset's folder to batches: the task, its cases, and loaders of patches and of whole
volumes.
"""
