"""Write samples and rows."""
