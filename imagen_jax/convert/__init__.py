"""Other projects' files, into model folders and back."""
