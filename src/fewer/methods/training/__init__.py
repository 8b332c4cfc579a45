"""Methods on the training loss: which tokens teach."""
