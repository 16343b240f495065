"""What both training stages do: a step of the weights, validation, and going on whatever stops them."""
