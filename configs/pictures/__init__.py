"""Configs for a user's own small pictures."""
