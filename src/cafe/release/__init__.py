"""A model made ready for others: exported, verified, described."""
