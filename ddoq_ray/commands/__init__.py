"""What users can ask for beyond `run`, one file a command."""
