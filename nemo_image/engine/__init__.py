"""Running work: clients, threads, one model copy a process, shards through a window of tasks, ledgers, progress."""
