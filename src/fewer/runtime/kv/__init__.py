"""The KV cache of a decoder, with rows missing."""
