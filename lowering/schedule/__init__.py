"""What a loop costs, and which form of it to run."""
