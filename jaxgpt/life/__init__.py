"""What is made of run directories: listings, comparisons, sweeps, lives and their cards."""
