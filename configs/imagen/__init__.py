"""The stages of the paper."""
