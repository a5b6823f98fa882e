"""What makes TRL's trainers faster without changing what they compute."""
