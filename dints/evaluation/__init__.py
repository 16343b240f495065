"""From two folders of masks to scores: surfaces, lesions, a case's scores, summaries; without
PyTorch.
"""
