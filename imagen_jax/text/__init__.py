"""Text encoding and the embedding job."""
