"""How work is run on Ray: session, pool, workers, console; what a stage computes is not here."""
