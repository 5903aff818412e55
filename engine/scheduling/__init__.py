"""Which tokens run next and where their keys and values lie: integers only, the same on every rank."""
