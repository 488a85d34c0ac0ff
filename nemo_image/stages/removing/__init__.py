"""Lists of images to remove."""
