"""DeepFloyd IF's pipelines in diffusers' folders, into a model folder and back.

Weights are streamed: one tensor at a time is in memory, whatever the size of the file.
"""
