"""What a sweep tries, in which order, when it gives up, and who wins."""
