"""How frames get to the root and replies back: one file per way."""
