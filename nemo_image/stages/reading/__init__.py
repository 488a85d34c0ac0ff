"""Read samples, and decode them ahead."""
