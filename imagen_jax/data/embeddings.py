"""Text embeddings on their way into a batch."""

import numpy as np
from jaxtyping import Shaped


def cut_embedding(
    embedding: Shaped[np.ndarray, "tokens width"], length: int
) -> Shaped[np.ndarray, "_ width"]:
    """A text's embedding with at most `length` tokens: the first ones and, always, the end token's.

    The one way in which texts are shortened. The text was encoded whole, so that cutting in two steps (when
    records are made, and to a stage's length) gives what cutting at once gives (at sampling).

    Args:
      embedding: of a whole text, or of one that was cut so; the last token is the end token.
      length: tokens that are kept, at least 1.

    Returns:
      The embedding itself where it is short enough.

    Raises:
      ValueError: length is below 1.
    """
    if length < 1:
        raise ValueError(f"max_length must be at least 1, got {length}")
    if len(embedding) <= length:
        return embedding
    return np.concatenate([embedding[: length - 1], embedding[-1:]])
