"""From an error metric to nested factors: one decomposition of each unit serves every rank."""
