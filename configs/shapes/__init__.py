"""Configs of the embedded data."""
