"""Compare the rows of one cluster, exactly, in bounded memory."""
