"""Methods for vision-language models."""
