"""Decoding where no picture can do harm: threads that can be given up, and child processes."""
