"""What a run will need: bytes, memory, time."""
