"""The places where tokens leave, one file each."""
