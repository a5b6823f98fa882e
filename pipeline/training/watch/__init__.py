"""A run while it trains: its record, its panel on the terminal, its health."""
