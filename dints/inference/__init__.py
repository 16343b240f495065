"""A batch of volumes to segment: what is done, and what failed."""
