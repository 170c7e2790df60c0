"""Networks: priors (encoder, latent diffusion, decoder), classifiers (teachers, students), their training.

Nothing here imports Ray, so every model runs alone on a bare machine.
"""
