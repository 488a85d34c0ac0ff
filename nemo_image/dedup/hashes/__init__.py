"""Hash images, and find equal or near hashes."""
