"""Pack samples of many tars into new, full shards."""
