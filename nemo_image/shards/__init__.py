"""One shard on disk: list and identify its files, index and read its tar, decode its pictures, write a new one."""
