"""Images of any collection to shards, their index and the class list."""
