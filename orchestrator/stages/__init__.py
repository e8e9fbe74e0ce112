"""What a run does, a file per stage."""
