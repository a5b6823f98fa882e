"""What a stage would train, and what that takes: steps, memory, disk, time. No weight is loaded."""
