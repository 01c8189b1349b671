"""Ahead-of-time compilation for machines that are not here: memory and predicted time of a stage."""
