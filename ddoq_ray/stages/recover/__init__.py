"""recover: images found in the teacher by gradients."""
