"""Pictures, texts and scenes to train on and to measure with."""
