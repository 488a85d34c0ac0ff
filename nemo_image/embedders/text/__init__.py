"""Captions: where they are found, their tokens, and their scores beside their pictures."""
