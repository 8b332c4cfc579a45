"""Training recipes: how the weights in the package were made, and how to make others."""
