"""The two stages on TRL's trainers."""
