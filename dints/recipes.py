"""Recipes: named sets of options, so that one word chooses what was measured to go together."""

from __future__ import annotations

# By the options' names; an option that is given overrides its recipe's value. What each was
# measured to bring: docs/recipes.md.
RECIPES = {
    "published": {
        "use_downsample": "yes",
        "strides": "isotropic",
        "flip_axes": ("all",),
        "learning_rate_schedule": "halvings",
        "average_decay": 0.0,
        "augmentation": "published",
        "learning_rate_scaling": "processes",
    },
    "recommended": {
        "use_downsample": "auto",
        "strides": "auto",
        "flip_axes": ("auto",),
        "learning_rate_schedule": "polynomial",
        "average_decay": 0.99,
        "augmentation": "auto",
        "learning_rate_scaling": "none",
    },
}
