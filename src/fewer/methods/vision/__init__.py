"""Methods for vision transformers."""
