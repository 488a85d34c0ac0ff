"""Bring rows together by bucket through files, and what was found back to the rows."""
