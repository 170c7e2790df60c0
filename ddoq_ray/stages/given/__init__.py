"""given: an image set that another method made."""
