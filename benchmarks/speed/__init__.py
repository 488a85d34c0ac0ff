"""The speed of the main work beside its rivals, interleaved in one run: ``make bench``."""
