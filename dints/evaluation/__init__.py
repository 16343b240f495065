"""From two folders of masks to scores and their summaries, without PyTorch."""
