"""An evaluation set, and which rows of a dataset are too like it."""
