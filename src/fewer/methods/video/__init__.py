"""Methods for videos, one file each."""
