"""The rows of the table, each a module with a function ``row(material)``."""

NAMES = (
    "decode",
    "embed",
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
