"""Stages of a pipeline: read, embed, score and filter, remove duplicates, write."""
