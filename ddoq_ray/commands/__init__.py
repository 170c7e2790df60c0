"""What a person can ask for beyond `run`, one file a command."""
