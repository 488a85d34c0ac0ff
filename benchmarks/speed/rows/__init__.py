"""The rows of the table, each a module with a function ``row(material)``."""

NAMES = (
    "decode",
    "embed",
    "embed_lite0",
    "gpu",
    "index",
    "export",
    "shuffled_export",
    "pairwise",
    "kmeans",
    "scheduling",
    "many_shards",
    "columns",
    "workers",
)
