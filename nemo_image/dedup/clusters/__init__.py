"""Cluster embeddings, and judge the rows of each cluster."""
