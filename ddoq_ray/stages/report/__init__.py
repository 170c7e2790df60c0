"""results.json, the page and the table."""
