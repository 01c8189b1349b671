"""Configs that fine-tune DeepFloyd IF."""
