"""Configs of the model in the box."""
