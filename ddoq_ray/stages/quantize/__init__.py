"""The latent log to codebooks: centroids, counts and weights of each class."""
