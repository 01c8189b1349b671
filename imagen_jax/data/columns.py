"""Which of a data set's columns are the picture and the caption."""

from collections.abc import Sequence

from imagen_jax.errors import UserError

# Last part of a column's name, in lower case.
_USUAL = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "picture", "image_bytes"),
    "text": ("caption", "captions", "text", "texts", "sentences", "description", "prompt"),
}


def choose_column(role: str, wanted: str | None, candidates: Sequence[str], where: str) -> str:
    """Finds the column of a role.

    Args:
      role: `image` or `text`: the option of SPEC that names it.
      wanted: the name that was given; None: the only candidate, or the only one with a usual name.
      candidates: columns of the right type; parts of nested names are divided by `/` or `.`.
      where: the data set, for messages.

    Raises:
      UserError: no such column, or not clear which.
    """
    there = ", ".join(candidates) or "none"
    if wanted is not None:
        if wanted not in candidates:
            raise UserError(f"--source: {role}={wanted}: {where} has no such {role} column (there: {there})")
        return wanted
    if not candidates:
        raise UserError(f"--source: {where} has no {role} column")
    usual = [name for name in candidates if name.replace(".", "/").split("/")[-1].lower() in _USUAL[role]]
    chosen = candidates if len(candidates) == 1 else usual
    if len(chosen) != 1:
        raise UserError(
            f"--source: {where} has several {role} columns ({there}); say which with ,{role}=COLUMN"
        )
    return chosen[0]
