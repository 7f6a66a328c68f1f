"""Many networks below one run: shared out to workers, trained as stacks, gone on with."""
