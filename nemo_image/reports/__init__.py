"""What is in a dataset, for people and for machines."""
