"""Training configs: each file has get_config(variant)."""
